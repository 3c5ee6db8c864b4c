-- ARGV: group id, attempt, kind, failure as JSON, retries allowed for this kind, token.
local id, attempt, kind, budget, call = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5]), ARGV[6]
local had = earlier_reply(id, call)
if had then return had end
local key = group_key(id)
local g = redis.call('HMGET', key, 'state', 'attempt')
if (g[1] ~= 'leased' and g[1] ~= 'generated') or g[2] ~= attempt then
  count('late_failures')
  return 'late'
end
local n = redis.call('HINCRBY', key, 'failures_' .. kind, 1)
count('failures_' .. kind)
drop_entry(id, g[1])
local to = n > budget and 'failed' or 'pending'
move(id, g[1], to)
redis.call('HSET', key, 'failure', ARGV[4])
remember(id, call, to)
return to
