-- ARGV: group id, attempt, kind, failure as JSON, retries allowed for this kind, token, the entry that was read and the
-- owner of the lease ('' where it is the other's to say). The last two fence what was begun before a ledger was rebuilt
-- from nothing, where attempts begin again.
local id, attempt, kind, budget, call = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[5]), ARGV[6]
local had = earlier_reply(id, call)
if had then return had end
local key = group_key(id)
local g = redis.call('HMGET', key, 'state', 'attempt', 'entry', 'owner')
local fenced = (g[1] ~= 'leased' and g[1] ~= 'generated') or g[2] ~= attempt
if fenced or (ARGV[7] ~= '' and g[3] ~= ARGV[7]) or (ARGV[8] ~= '' and g[4] ~= ARGV[8]) then
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
