"""The accounting that all store processes share in Redis, as Lua scripts over three keys.

The keys share one hash tag, so a script runs on one node of a cluster; the values live elsewhere.

* ``sizes``: a hash, block key to ``"420000 1:220000 2:200000"`` (bytes in all, then stratum:bytes),
  and the sum of all under ``total``. One key, so that sum and parts can only be lost together.
* ``lru``: a sorted set, block key by its last use in milliseconds of the Redis server's clock.
* ``pins``, ``leases``: sorted sets, block key by the end of its pin, of its lease.
* ``doomed``: a sorted set, block key by the time until which a process may be about to delete its
  values; no lease is given on those.

A put *reserves* before it writes values and *records* after; a process that dies in between leaves
too much accounted, never too little, and the next look at the block corrects it.

A put of 300 bytes where 800 of 1000 are used: reserve returns ``{0, "a", "1700"}``: block ``a``,
last used at 1700, must go. The caller deletes a's values, calls forget with ``a 1700``, which does
nothing if somebody used or wrote ``a`` since, and reserves again: ``{1}``.
"""

SIZES_KEY = "kvs:{index}:sizes"
LRU_KEY = "kvs:{index}:lru"
PINS_KEY = "kvs:{index}:pins"
LEASES_KEY = "kvs:{index}:leases"
DOOMED_KEY = "kvs:{index}:doomed"
INDEX_KEYS = (SIZES_KEY, LRU_KEY, PINS_KEY, LEASES_KEY, DOOMED_KEY)
TOTAL_FIELD = "total"

_PRELUDE = """
local sizes, lru, pins, leases, doomed = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local doom_ms = 10000
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function bytes_of(member)
  local entry = redis.call('HGET', sizes, member)
  return entry and tonumber(string.match(entry, '^%d+')) or 0
end

local function total()
  return tonumber(redis.call('HGET', sizes, 'total') or '0')
end

local function forget(member)
  local freed = bytes_of(member)
  redis.call('ZREM', lru, member)  -- first: without memory, no script may start by adding
  redis.call('ZREM', doomed, member)
  redis.call('HDEL', sizes, member)
  redis.call('HINCRBY', sizes, 'total', -freed)
end

local function is_exempt(member)
  return redis.call('ZSCORE', pins, member) or redis.call('ZSCORE', leases, member)
end

local function set(member, entry)
  local grown = tonumber(string.match(entry, '^%d+')) - bytes_of(member)
  redis.call('HINCRBY', sizes, 'total', grown)
  redis.call('HSET', sizes, member, entry)
end

local function sweep(ttl_ms)
  if redis.call('ZCARD', lru) + 1 < redis.call('HLEN', sizes) then
    for _, member in ipairs(redis.call('HKEYS', sizes)) do
      if member ~= 'total' then redis.call('ZADD', lru, 'NX', now, member) end
    end
  end
  local old = redis.call('ZRANGEBYSCORE', lru, '-inf', now - ttl_ms, 'LIMIT', 0, 256)
  for _, member in ipairs(old) do forget(member) end
  redis.call('ZREMRANGEBYSCORE', pins, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', doomed, '-inf', now)
end
"""

# ARGV: member, entry, capacity, ttl_ms. Returns {1} with the entry accounted; {0, member, score,
# ...}, the victims to delete first; or {2} when pinned blocks leave no room.
RESERVE = (
    _PRELUDE
    + """
local member, entry, capacity = ARGV[1], ARGV[2], tonumber(ARGV[3])
sweep(tonumber(ARGV[4]))
local excess = total() - bytes_of(member) + tonumber(string.match(entry, '^%d+')) - capacity
if excess <= 0 then
  set(member, entry)
  redis.call('ZADD', lru, now, member)
  redis.call('ZREM', doomed, member)
  return {1}
end
local reply, first = {0}, 0
while excess > 0 do
  local batch = redis.call('ZRANGE', lru, first, first + 127, 'WITHSCORES')
  if #batch == 0 then return {2} end
  for i = 1, #batch, 2 do
    if excess > 0 and batch[i] ~= member and not is_exempt(batch[i]) then
      table.insert(reply, batch[i])
      table.insert(reply, batch[i + 1])
      excess = excess - bytes_of(batch[i])
    end
  end
  first = first + 128
end
for i = 2, #reply, 2 do redis.call('ZADD', doomed, now + doom_ms, reply[i]) end
return reply
"""
)

# ARGV: member, score, ... Forgets those whose last use is still that score; returns how many.
FORGET = (
    _PRELUDE
    + """
local count = 0
for i = 1, #ARGV, 2 do
  if redis.call('ZSCORE', lru, ARGV[i]) == ARGV[i + 1] then
    forget(ARGV[i])
    count = count + 1
  end
end
return count
"""
)

# ARGV: member, entry, ... Makes the accounting say so; an empty entry forgets the member.
RECORD = (
    _PRELUDE
    + """
for i = 1, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    forget(ARGV[i])
  else
    set(ARGV[i], ARGV[i + 1])
    redis.call('ZADD', lru, 'NX', now, ARGV[i])
  end
end
"""
)

# ARGV: member, ... Counts as a use.
TOUCH = (
    _PRELUDE
    + """
for i = 1, #ARGV do redis.call('ZADD', lru, 'XX', now, ARGV[i]) end
"""
)

# ARGV: member, ... Removes members from the accounting and their pins; returns how many were there.
DELETE = (
    _PRELUDE
    + """
local count = 0
for i = 1, #ARGV do
  count = count + redis.call('HEXISTS', sizes, ARGV[i])
  forget(ARGV[i])
  redis.call('ZREM', pins, ARGV[i])
  redis.call('ZREM', leases, ARGV[i])
end
return count
"""
)

# ARGV: ttl_ms, member, ... Pins those that exist.
PIN = (
    _PRELUDE
    + """
for i = 2, #ARGV do
  if redis.call('HEXISTS', sizes, ARGV[i]) == 1 then
    redis.call('ZADD', pins, 'GT', now + tonumber(ARGV[1]), ARGV[i])
  end
end
"""
)

# ARGV: ttl_ms, member, ... Leases those that exist; returns the positions of the others, from 1.
LEASE = (
    _PRELUDE
    + """
local missing = {}
for i = 2, #ARGV do
  local doom = redis.call('ZSCORE', doomed, ARGV[i])
  if redis.call('HEXISTS', sizes, ARGV[i]) == 0 or (doom and tonumber(doom) > now) then
    table.insert(missing, i - 1)
  else
    redis.call('ZADD', leases, 'GT', now + tonumber(ARGV[1]), ARGV[i])
  end
end
return missing
"""
)

# ARGV: ttl_ms. Returns {blocks, bytes}.
USAGE = (
    _PRELUDE
    + """
sweep(tonumber(ARGV[1]))
return {redis.call('ZCARD', lru), total()}
"""
)
