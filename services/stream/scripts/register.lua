-- ARGV: epoch, then pairs (group id, order). New groups become pending; known ones are left as they are, and so
-- are the epochs that are settled.
-- And looked at: a server that lost the end of its log in the middle of a script's writes, and is restarted once more, may
-- have carried out a part of them (Redis 6.2 cuts the log behind the writes it has read, not before their MULTI).
local broken = broken_chain()
if broken then return broken end
local epoch, made = ARGV[1], 0
local gone = tonumber(epoch) < settled_epochs()
for i = 2, #ARGV, 2 do
  local known = redis.call('HMGET', group_key(ARGV[i]), 'order', 'epoch', 'state')
  for _, state in ipairs(STATES) do
    local there = redis.call('ZSCORE', state_key(state), ARGV[i]) ~= false
    if there ~= (state == known[3]) then return lost('group ' .. ARGV[i] .. ' is not in the one state that it has') end
  end
  if known[1] and known[1] ~= '-1' and (known[1] ~= ARGV[i + 1] or known[2] ~= epoch) then
    return refuse('group ' .. ARGV[i] .. ' is registered as epoch ' .. known[2] .. ', order ' .. known[1] ..
      ', and cannot become epoch ' .. epoch .. ', order ' .. ARGV[i + 1])
  end
end
for i = 2, #ARGV, 2 do
  local id, order = ARGV[i], ARGV[i + 1]
  local known = redis.call('HMGET', group_key(id), 'state', 'order')
  if not known[1] and gone then
    -- done
  elseif not known[1] then
    create(id, epoch, order, 'pending')
    made = made + 1
  elseif known[2] == '-1' then
    -- Known from a manifest alone, so far without its place in the order.
    redis.call('HSET', group_key(id), 'order', order, 'epoch', epoch)
    redis.call('ZADD', state_key(known[1]), order, id)
  end
end
mark()
return made
