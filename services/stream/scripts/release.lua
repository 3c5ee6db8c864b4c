-- ARGV: owner, losses that a group may have ('' any number), failure as JSON. Everything that a dead owner holds.
local released = {}
for _, id in ipairs(redis.call('ZRANGE', state_key('leased'), 0, -1)) do
  if redis.call('HGET', group_key(id), 'owner') == ARGV[1] then
    count('released')
    lose(id, ARGV[2], ARGV[3])
    released[#released + 1] = id
  end
end
return released
