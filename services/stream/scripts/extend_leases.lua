-- ARGV: ms from now within which no lease ends.
local least = text(now_ms() + tonumber(ARGV[1]))
for _, id in ipairs(redis.call('ZRANGEBYSCORE', P .. 'expiry', '-inf', '(' .. least)) do
  redis.call('HSET', group_key(id), 'expires_ms', least)
  redis.call('ZADD', P .. 'expiry', least, id)
end
return 1
