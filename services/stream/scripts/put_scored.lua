-- ARGV: entry id in the generated stream, group id, attempt, token, encoded group with scores.
local entry, id, attempt, call = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local had = earlier_reply(id, call)
if had then return had end
local key = group_key(id)
local g = redis.call('HMGET', key, 'state', 'attempt', 'entry')
if g[1] ~= 'generated' or g[2] ~= attempt or g[3] ~= entry then
  if g[1] ~= 'generated' or g[3] ~= entry then
    -- Nobody's entry any more: the group has moved on.
    redis.call('XACK', STREAM_GENERATED, SCORERS, entry)
    redis.call('XDEL', STREAM_GENERATED, entry)
  end
  count('late_scores')
  return '0'
end
drop_entry(id, 'generated')
redis.call('HSET', key, 'entry', redis.call('XADD', STREAM_SCORED, '*', 'group', ARGV[5]))
move(id, 'generated', 'scored')
remember(id, call, '1')
return '1'
