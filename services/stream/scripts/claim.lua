-- ARGV: the name of this call, the token of who calls, the number of its last claim. From now on the chain of the driver's
-- calls goes on from this one, and from no other: an earlier driver that is still there is refused. Who has claimed is
-- kept where all else is forgotten; of two, the one with the higher number came later. Numbers follow the clock (ms), so
-- that this holds, too, of a claim that was made in an empty Redis and of one from before, which comes back with an older
-- copy of the data. The gate is forgotten: no lease is given until it is opened. Returns the number of this claim.
local number = math.max(tonumber(redis.call('HGET', P .. 'owner', 'number') or '0') + 1, tonumber(ARGV[3]) + 1, now_ms())
redis.call('HSET', P .. 'owner', 'number', text(number), 'token', ARGV[2])
redis.call('SET', P .. 'mark', ARGV[1])
redis.call('DEL', P .. 'gate')
return number
