-- ARGV: losses that a group may have ('' any number), failure as JSON for a lease that was not renewed.
local ids = redis.call('ZRANGEBYSCORE', P .. 'expiry', '-inf', text(now_ms()))
for _, id in ipairs(ids) do
  count('expired')
  lose(id, ARGV[1], ARGV[2])
end
return ids
