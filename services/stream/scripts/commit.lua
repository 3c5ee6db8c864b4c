-- ARGV: pairs (group id, step). The manifest on the disk is the truth, so a group is committed from whatever state it is
-- in; one that the ledger does not know is made, its order unknown until it is registered. Settled ones are passed over.
local broken = broken_chain()
if broken then return broken end
local moved, epochs, step_of = 0, settled_epochs(), {}
for i = 1, #ARGV, 2 do
  local id, step = ARGV[i], ARGV[i + 1]
  local g = redis.call('HMGET', group_key(id), 'state', 'step')
  local other = g[1] == 'committed' and g[2] or step_of[id]
  if other and other ~= step then
    return refuse('group ' .. id .. ' is committed in step ' .. other .. ' and cannot be in step ' .. step .. ' too')
  end
  step_of[id] = step
end
for i = 1, #ARGV, 2 do
  local id, step = ARGV[i], ARGV[i + 1]
  local state = state_of(id)
  if not state and is_settled(id, epochs) then
    -- committed before, and counted
  elseif not state then
    create(id, string.match(id, '^(%d+):') or '-1', '-1', 'committed')
    redis.call('HSET', group_key(id), 'step', step)
    moved = moved + 1
  elseif state ~= 'committed' then
    drop_entry(id, state)
    move(id, state, 'committed')
    redis.call('HSET', group_key(id), 'step', step)
    moved = moved + 1
  end
end
mark()
return moved
