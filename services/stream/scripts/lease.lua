-- ARGV: owner, token, loaded incarnation ('' if none), loaded step, time to live in ms.
local owner, call, ttl = ARGV[1], ARGV[2], tonumber(ARGV[5])
local call_key = P .. 'call:' .. call

local function answer(id)
  local g = redis.call('HMGET', group_key(id), 'attempt', 'epoch', 'order', 'prompt')
  return { 'lease', id, g[1], g[2], g[3], g[4] }
end

local had = redis.call('GET', call_key)
if had and redis.call('HGET', group_key(had), 'call') == call and state_of(had) == 'leased' then return answer(had) end

local gate = redis.call('HMGET', P .. 'gate', 'incarnation', 'step', 'weights', 'limit')
if not gate[1] then return { 'wait', 'gate' } end
if ARGV[3] ~= gate[1] or ARGV[4] ~= gate[2] then return { 'load', gate[1], gate[2], gate[3] } end

local id = redis.call('ZRANGE', state_key('pending'), 0, 0)[1]
if not id then return { 'wait', 'empty' } end
local key = group_key(id)

-- Admitted, and not failed: all of the lower ones, since none of them is pending. The group's place among those that can
-- be trained decides, not how many are under way: after a restart the run stands at an earlier step with later groups
-- already there, and a lower one that was lost must not wait for room behind them.
local lower = '(' .. redis.call('HGET', key, 'order')
local admitted = settled('committed')
for _, state in ipairs({ 'leased', 'generated', 'scored', 'consumed', 'committed' }) do
  admitted = admitted + redis.call('ZCOUNT', state_key(state), '-inf', lower)
end
if admitted >= tonumber(gate[4]) then return { 'wait', 'gate' } end
if redis.call('HEXISTS', key, 'prompt') == 0 then return { 'wait', 'no_payload' } end

-- A group at its last chance is held alone, for what is held with it loses its lease with it, and would fail beside it.
-- Whoever holds others finishes them first; nobody overtakes the group meanwhile.
local function holds_one_of(ids)
  for _, held in ipairs(ids) do
    if redis.call('HGET', group_key(held), 'owner') == owner then return true end
  end
  return false
end

local alone = redis.call('SMEMBERS', ALONE)
if holds_one_of(alone) then return { 'wait', 'alone' } end
if redis.call('SISMEMBER', ALONE, id) == 1 and holds_one_of(redis.call('ZRANGE', state_key('leased'), 0, -1)) then
  return { 'wait', 'alone' }
end

local now = now_ms()
local expires = text(now + ttl)
move(id, 'pending', 'leased')
redis.call('HINCRBY', key, 'attempt', 1)
redis.call('HSET', key, 'owner', owner, 'leased_ms', text(now), 'expires_ms', expires,
  'version_inc', gate[1], 'version_step', gate[2], 'call', call)
redis.call('ZADD', P .. 'expiry', expires, id)
redis.call('SET', call_key, id, 'PX', '60000')
return answer(id)
