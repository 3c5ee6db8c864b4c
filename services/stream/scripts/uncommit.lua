-- ARGV: groups that were committed by a commit which the run does not resume from. Their samples are gone, so they are
-- generated again.
for _, id in ipairs(ARGV) do
  if state_of(id) == 'committed' then
    move(id, 'committed', 'pending')
    count('uncommitted')
  end
end
return 1
