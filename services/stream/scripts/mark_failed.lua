-- ARGV: pairs (group id, failure as JSON), of a manifest or of one to come: failed, from whatever state. Settled ones are
-- passed over.
local broken = broken_chain()
if broken then return broken end
local epochs = settled_epochs()
for i = 1, #ARGV, 2 do
  local id = ARGV[i]
  local state = state_of(id)
  if state or not is_settled(id, epochs) then
    if not state then
      create(id, string.match(id, '^(%d+):') or '-1', '-1', 'failed')
    elseif state ~= 'failed' then
      drop_entry(id, state)
      move(id, state, 'failed')
    end
    redis.call('HSET', group_key(id), 'failure', ARGV[i + 1])
  end
end
mark()
return 1
