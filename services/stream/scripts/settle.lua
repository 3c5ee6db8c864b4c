-- ARGV: epochs, the first place in lease order after them, groups of them that a manifest has as committed, as failed.
-- The groups of the first epochs, all of them done in a manifest, leave the ledger: their number stays. At most 500 go in
-- one call. Returns how many are still to go. Groups whose place is not known yet (-1) are none of them. A ledger that has
-- none of them, made anew, takes the numbers as they are.
local broken = broken_chain()
if broken then return broken end
local epochs, before = tonumber(ARGV[1]), '(' .. ARGV[2]
local had = settled_epochs()
if epochs > had then
  for _, state in ipairs({ 'pending', 'leased', 'generated', 'scored', 'consumed' }) do
    local n = redis.call('ZCOUNT', state_key(state), '0', before)
    if n > 0 then return refuse(n .. ' groups of the first ' .. ARGV[1] .. ' epochs are ' .. state .. ', not committed or failed') end
  end
  local done = {
    committed = settled('committed') + redis.call('ZCOUNT', state_key('committed'), '0', before),
    failed = settled('failed') + redis.call('ZCOUNT', state_key('failed'), '0', before),
  }
  if done.committed + done.failed == 0 then
    redis.call('HSET', SETTLED, 'committed', ARGV[3], 'failed', ARGV[4])
  elseif done.committed ~= tonumber(ARGV[3]) or done.failed ~= tonumber(ARGV[4]) then
    return refuse('of the first ' .. ARGV[1] .. ' epochs ' .. done.committed .. ' groups are committed and ' .. done.failed ..
      ' failed, in the manifest ' .. ARGV[3] .. ' and ' .. ARGV[4])
  end
  redis.call('HSET', SETTLED, 'epochs', ARGV[1])
end
local left = 0
if epochs >= had then
  for _, state in ipairs({ 'committed', 'failed' }) do
    local ids = redis.call('ZRANGEBYSCORE', state_key(state), '0', before, 'LIMIT', 0, 500)
    for _, id in ipairs(ids) do
      redis.call('DEL', group_key(id))
      redis.call('ZREM', state_key(state), id)
    end
    redis.call('HINCRBY', SETTLED, state, #ids)
    left = left + redis.call('ZCOUNT', state_key(state), '0', before)
  end
end
mark()
return left
