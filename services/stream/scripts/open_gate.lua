-- ARGV: incarnation, step, weights, limit. The version and, within a version, the limit never go back.
local broken = broken_chain()
if broken then return broken end
local gate = redis.call('HMGET', P .. 'gate', 'incarnation', 'step', 'limit')
local inc, step, limit = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[4])
if gate[1] then
  local had_inc, had_step = tonumber(gate[1]), tonumber(gate[2])
  if inc < had_inc or (inc == had_inc and step < had_step) then
    return refuse('the gate is at version (' .. gate[1] .. ', ' .. gate[2] .. ') and cannot go back to (' ..
      ARGV[1] .. ', ' .. ARGV[2] .. ')')
  end
  if inc == had_inc and limit < tonumber(gate[3]) then
    return refuse('the admission limit of incarnation ' .. ARGV[1] .. ' is ' .. gate[3] .. ' and cannot shrink to ' .. ARGV[4])
  end
end
redis.call('HSET', P .. 'gate', 'incarnation', ARGV[1], 'step', ARGV[2], 'weights', ARGV[3], 'limit', ARGV[4])
mark()
return 1
