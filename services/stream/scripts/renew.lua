-- ARGV: owner, group id, attempt, time to live in ms.
local key = group_key(ARGV[2])
local g = redis.call('HMGET', key, 'state', 'attempt', 'owner')
if g[1] ~= 'leased' or g[2] ~= ARGV[3] or g[3] ~= ARGV[1] then return 0 end
local expires = text(now_ms() + tonumber(ARGV[4]))
redis.call('HSET', key, 'expires_ms', expires)
redis.call('ZADD', P .. 'expiry', expires, ARGV[2])
return 1
