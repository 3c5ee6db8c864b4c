-- ARGV: group id, attempt, incarnation and step that generated it, token, encoded group.
-- Accepted: the attempt that holds the lease, by weights not older than those it was given with. The second condition
-- fences answers from before a ledger was rebuilt from nothing, where attempts begin again.
local id, attempt, inc, step, call = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]), ARGV[5]
local had = earlier_reply(id, call)
if had then return had end
local key = group_key(id)
local g = redis.call('HMGET', key, 'state', 'attempt', 'version_inc', 'version_step')
local fenced = g[1] ~= 'leased' or g[2] ~= attempt
if not fenced then
  local was_inc, was_step = tonumber(g[3]), tonumber(g[4])
  fenced = inc < was_inc or (inc == was_inc and step < was_step)
end
if fenced then
  count('late')
  return '0'
end
local entry = redis.call('XADD', STREAM_GENERATED, '*', 'group', ARGV[6])
move(id, 'leased', 'generated')
redis.call('HSET', key, 'entry', entry, 'version_inc', ARGV[3], 'version_step', ARGV[4])
remember(id, call, '1')
return '1'
