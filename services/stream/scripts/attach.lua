-- ARGV: pairs (group id, encoded prompt). A group that is done, or unknown, takes no payload.
local n = 0
for i = 1, #ARGV, 2 do
  local id = ARGV[i]
  local state = state_of(id)
  if state and state ~= 'committed' and state ~= 'failed' then
    redis.call('HSET', group_key(id), 'prompt', ARGV[i + 1])
    redis.call('ZREM', P .. 'bare', id)
    n = n + 1
  end
end
return n
