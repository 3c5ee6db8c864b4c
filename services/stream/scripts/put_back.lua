-- ARGV: group id, attempt, incarnation and step that generated it, encoded group with scores. The samples of a consumed
-- group, onto the stream again where they are lost.
local broken = broken_chain()
if broken then return broken end
local id = ARGV[1]
local key = group_key(id)
if state_of(id) ~= 'consumed' then return refuse('group ' .. id .. ' is not consumed') end
if not has_entry(id, STREAM_SCORED) then
  local entry = redis.call('XADD', STREAM_SCORED, '*', 'group', ARGV[5])
  redis.call('HSET', key, 'entry', entry, 'version_inc', ARGV[3], 'version_step', ARGV[4])
  if tonumber(redis.call('HGET', key, 'attempt')) < tonumber(ARGV[2]) then redis.call('HSET', key, 'attempt', ARGV[2]) end
end
mark()
return 1
