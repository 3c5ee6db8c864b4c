-- No lease is given until the gate is opened again; ARGV[1] '1' forgets the version and limit too.
if ARGV[1] == '1' then return redis.call('DEL', P .. 'gate') end
if redis.call('EXISTS', P .. 'gate') == 0 then return 0 end
redis.call('HSET', P .. 'gate', 'limit', '0')
return 1
