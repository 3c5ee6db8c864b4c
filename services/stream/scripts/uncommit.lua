-- ARGV: groups that were committed by a commit which the run does not resume from. Their samples are gone, so they are
-- generated again.
local broken = broken_chain()
if broken then return broken end
for _, id in ipairs(ARGV) do
  if state_of(id) == 'committed' then
    move(id, 'committed', 'pending')
    count('uncommitted')
  end
end
mark()
return 1
