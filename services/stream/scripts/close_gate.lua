-- No lease is given until the gate is opened again.
if redis.call('EXISTS', P .. 'gate') == 0 then return 0 end
redis.call('HSET', P .. 'gate', 'limit', '0')
return 1
