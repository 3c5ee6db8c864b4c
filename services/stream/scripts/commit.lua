-- ARGV: step, then group ids. The manifest on the disk is the truth, so a group is committed from whatever state it is
-- in; one that the ledger does not know is made, its order unknown until it is registered. Settled ones are passed over.
local broken = broken_chain()
if broken then return broken end
local step, moved, epochs = ARGV[1], 0, settled_epochs()
for i = 2, #ARGV do
  local g = redis.call('HMGET', group_key(ARGV[i]), 'state', 'step')
  if g[1] == 'committed' and g[2] ~= step then
    return refuse('group ' .. ARGV[i] .. ' is committed in step ' .. g[2] .. ' and cannot be in step ' .. step .. ' too')
  end
end
for i = 2, #ARGV do
  local id = ARGV[i]
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
