-- After the manifest's groups have their state: everything that a crash left in between.
-- Returns {returned to scored, returned to pending}.
local broken = broken_chain()
if broken then return broken end
local scored, pending = 0, 0
for _, id in ipairs(redis.call('ZRANGE', state_key('consumed'), 0, -1)) do
  -- Lower in order than all that was scored after it: taken again in the same step and place.
  move(id, 'consumed', 'scored')
  redis.call('HDEL', group_key(id), 'step')
  scored = scored + 1
end
for _, id in ipairs(redis.call('ZRANGE', state_key('scored'), 0, -1)) do
  if not has_entry(id, STREAM_SCORED) then
    redis.call('HDEL', group_key(id), 'entry')
    move(id, 'scored', 'pending')
    pending = pending + 1
  end
end
for _, id in ipairs(redis.call('ZRANGE', state_key('generated'), 0, -1)) do
  if not has_entry(id, STREAM_GENERATED) then
    redis.call('HDEL', group_key(id), 'entry')
    move(id, 'generated', 'pending')
    pending = pending + 1
  end
end
for _, id in ipairs(redis.call('ZRANGE', state_key('leased'), 0, -1)) do
  move(id, 'leased', 'pending')
  pending = pending + 1
end
-- What scorers had been given and not finished is given out again at once, not after its idle time.
if redis.call('EXISTS', STREAM_GENERATED) == 1 then redis.call('XGROUP', 'DESTROY', STREAM_GENERATED, SCORERS) end
redis.call('XGROUP', 'CREATE', STREAM_GENERATED, SCORERS, '0', 'MKSTREAM')
mark()
return { scored, pending }
