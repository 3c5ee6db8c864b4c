-- ARGV: step, size, '1' if fewer will do once nothing else is left, oldest policy step allowed ('' if any).
-- Returns {'ready', ids...} in lease order or {'wait'}.
local broken = broken_chain()
if broken then return broken end
local step, size, final, oldest = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1', tonumber(ARGV[4])

local function ready(ids)
  mark()
  table.insert(ids, 1, 'ready')
  return ids
end

-- Asked again (a lost reply, a learner that was slow): the same batch.
local had = redis.call('ZRANGE', batch_key(step), 0, -1)
if #had > 0 then return ready(had) end

local ids = redis.call('ZRANGE', state_key('scored'), 0, size - 1)
if oldest then
  local regenerated = false
  for _, id in ipairs(ids) do
    if tonumber(redis.call('HGET', group_key(id), 'version_step')) < oldest then
      drop_entry(id, 'scored')
      move(id, 'scored', 'pending')
      count('regenerated')
      regenerated = true
    end
  end
  if regenerated then return { 'wait' } end
end

local bound = '+inf'
if #ids == size then
  bound = '(' .. redis.call('HGET', group_key(ids[size]), 'order')
elseif not final then
  return { 'wait' }
end
-- No group that is not yet scored may stand before the last one of the batch: it would be overtaken for good.
for _, state in ipairs({ 'pending', 'leased', 'generated' }) do
  if redis.call('ZCOUNT', state_key(state), '-inf', bound) > 0 then return { 'wait' } end
end
for _, id in ipairs(ids) do
  local key = group_key(id)
  redis.call('HSET', key, 'step', step)
  redis.call('ZADD', batch_key(step), redis.call('HGET', key, 'order'), id)
  move(id, 'scored', 'consumed')
end
return ready(ids)
