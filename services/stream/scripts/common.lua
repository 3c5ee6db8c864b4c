-- Shared by every script; put in front of each when it is loaded.
-- KEYS[1] is the prefix "attune:{RUN}:". Every key of a run begins with it and so shares its hash tag (one slot of a
-- cluster); the keys of single groups are derived from it here. Numbers that are stored stay strings: Lua would
-- print large ones with an exponent.
local P = KEYS[1]
-- While the run's keys are removed, in several commands, nobody may make new ones of those that are left: whoever calls
-- waits until it is done.
if redis.call('EXISTS', P .. 'forgetting') == 1 then return redis.error_reply('FORGETTING the ledger is being made anew') end
local SETTLED = P .. 'settled'
-- Groups, pending or leased, that have lost as many leases as they may: one more fails them (`lose`, lease.lua).
local ALONE = P .. 'alone'
local STREAM_GENERATED, STREAM_SCORED = P .. 'stream:generated', P .. 'stream:scored'
local SCORERS = 'scorers'
local STATES = { 'pending', 'leased', 'generated', 'scored', 'consumed', 'committed', 'failed' }

local function group_key(id) return P .. 'group:' .. id end
local function state_key(state) return P .. 'state:' .. state end
local function batch_key(step) return P .. 'batch:' .. step end
local function text(number) return string.format('%.0f', number) end
local function count(name) redis.call('HINCRBY', P .. 'counters', name, 1) end

local function now_ms()
  local t = redis.call('TIME')
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end

local function refuse(message) return redis.error_reply('LEDGER ' .. message) end

-- The driver's calls are a chain: each names the one before it, and Redis keeps the name of the last (`mark`). Where the
-- two differ, this Redis has lost something that the driver wrote, or another driver has claimed the ledger; nothing may
-- be built on that. ARGV ends with the two names: they are taken off it.
local CALL = ''
local function lost(what) return redis.error_reply('LOST ' .. what) end
local function broken_chain()
  CALL = table.remove(ARGV)
  local before, mark = table.remove(ARGV), redis.call('GET', P .. 'mark') or ''
  if mark == before or mark == CALL then return false end
  return lost('the ledger of this run is not where its driver left it')
end

local function mark() redis.call('SET', P .. 'mark', CALL) end

-- A call that is sent again because its reply was lost carries the same token: it gets the reply it had.
local function earlier_reply(id, call)
  local seen = redis.call('HMGET', group_key(id), 'call', 'reply')
  if seen[1] == call then return seen[2] end
  return false
end

local function remember(id, call, reply) redis.call('HSET', group_key(id), 'call', call, 'reply', reply) end

-- Takes the group's entry, if it has one, out of the stream that its state says it is in.
local function drop_entry(id, state)
  local entry = redis.call('HGET', group_key(id), 'entry')
  if not entry then return end
  if state == 'generated' then
    redis.call('XACK', STREAM_GENERATED, SCORERS, entry)
    redis.call('XDEL', STREAM_GENERATED, entry)
  else
    redis.call('XDEL', STREAM_SCORED, entry)
  end
  redis.call('HDEL', group_key(id), 'entry')
end

local function has_entry(id, stream)
  local entry = redis.call('HGET', group_key(id), 'entry')
  return entry and #redis.call('XRANGE', stream, entry, entry) > 0
end

-- The only place where a group changes its state.
local function move(id, from, to)
  local key = group_key(id)
  redis.call('ZREM', state_key(from), id)
  redis.call('ZADD', state_key(to), redis.call('HGET', key, 'order'), id)
  redis.call('HSET', key, 'state', to)
  if from == 'leased' then
    redis.call('ZREM', P .. 'expiry', id)
    redis.call('HDEL', key, 'owner', 'leased_ms', 'expires_ms')
  elseif from == 'pending' then
    redis.call('ZREM', P .. 'bare', id)
  elseif from == 'consumed' then
    local step = redis.call('HGET', key, 'step')
    if step then redis.call('ZREM', batch_key(step), id) end
  end
  if to == 'pending' then
    redis.call('HDEL', key, 'step', 'failure')
    if redis.call('HEXISTS', key, 'prompt') == 0 then
      redis.call('ZADD', P .. 'bare', redis.call('HGET', key, 'order'), id)
    end
  elseif to == 'generated' then
    -- It is not what its owners died of.
    redis.call('HDEL', key, 'losses')
  elseif to == 'failed' then
    redis.call('HDEL', key, 'prompt', 'call', 'reply')
  elseif to == 'committed' then
    -- All but its place, its step and its attempt: committed groups stay for the length of the run.
    redis.call('HDEL', key, 'prompt', 'call', 'reply', 'failure', 'losses', 'failures_infra', 'failures_data',
      'version_inc', 'version_step')
  end
  if to ~= 'pending' and to ~= 'leased' then redis.call('SREM', ALONE, id) end
  -- A bell, not work: whoever waits for a batch looks again. So this stream alone is trimmed.
  if to == 'scored' or to == 'failed' then
    redis.call('XADD', P .. 'stream:bell', 'MAXLEN', '~', '256', '*', 'to', to)
  end
end

-- A lease that its owner lost, by dying or by silence; `failure` says which. `allowed` is how many a group may have
-- ('' any number): one more fails it.
local function lose(id, allowed, failure)
  local n = redis.call('HINCRBY', group_key(id), 'losses', 1)
  local most = tonumber(allowed)
  move(id, 'leased', most and n > most and 'failed' or 'pending')
  if n == most then redis.call('SADD', ALONE, id) end
  redis.call('HSET', group_key(id), 'failure', failure)
end

local function create(id, epoch, order, state)
  redis.call('HSET', group_key(id), 'state', state, 'attempt', '0', 'epoch', epoch, 'order', order)
  redis.call('ZADD', state_key(state), order, id)
  if state == 'pending' then redis.call('ZADD', P .. 'bare', order, id) end
end

-- The groups of the first epochs, done in a manifest: no longer here one by one, only their numbers (settle.lua).
local function settled(name) return tonumber(redis.call('HGET', SETTLED, name) or '0') end
local function settled_epochs() return settled('epochs') end
local function is_settled(id, epochs) return (tonumber(string.match(id, '^(%d+):')) or epochs) < epochs end

local function state_of(id) return redis.call('HGET', group_key(id), 'state') end
