-- ARGV: owner. Everything that it holds goes back.
local released = {}
for _, id in ipairs(redis.call('ZRANGE', state_key('leased'), 0, -1)) do
  if redis.call('HGET', group_key(id), 'owner') == ARGV[1] then
    move(id, 'leased', 'pending')
    count('released')
    released[#released + 1] = id
  end
end
return released
