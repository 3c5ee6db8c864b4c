-- ARGV: step, then the groups that a living learner has trained in it, or is training: consumed, from whatever state, with
-- the scored entry that they still have.
local broken = broken_chain()
if broken then return broken end
local step = ARGV[1]
for i = 2, #ARGV do
  local id = ARGV[i]
  local state = state_of(id)
  if not state then return refuse('group ' .. id .. ' is not registered') end
  if state == 'committed' then return refuse('group ' .. id .. ' is committed and cannot be consumed') end
end
for i = 2, #ARGV do
  local id = ARGV[i]
  local state, key = state_of(id), group_key(ARGV[i])
  if state ~= 'scored' and state ~= 'consumed' then drop_entry(id, state) end
  move(id, state, 'consumed')
  redis.call('HSET', key, 'step', step)
  redis.call('ZADD', batch_key(step), redis.call('HGET', key, 'order'), id)
end
mark()
return 1
