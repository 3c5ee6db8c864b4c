-- ARGV: expiries that a group is allowed (-1: any number), failure as JSON for one that has had more.
local allowed = tonumber(ARGV[1])
local ids = redis.call('ZRANGEBYSCORE', P .. 'expiry', '-inf', text(now_ms()))
for _, id in ipairs(ids) do
  local n = redis.call('HINCRBY', group_key(id), 'expiries', 1)
  count('expired')
  if allowed >= 0 and n > allowed then
    move(id, 'leased', 'failed')
    redis.call('HSET', group_key(id), 'failure', ARGV[2])
  else
    move(id, 'leased', 'pending')
  end
end
return ids
