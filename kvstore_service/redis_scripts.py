"""The accounting that all store processes share in Redis, as Lua scripts over a few keys.

The keys share one hash tag, so a script runs on one node of a cluster; the values live elsewhere.

* ``sizes``: a hash, block key to ``"420000 1:220000 2:200000 @17:5f..."`` (bytes in all, then
  stratum:bytes; then how many blocks come before it in its prompt, and the hash of the last of
  those), and the sum of all under ``total``. One key, so that sum and parts are only lost together.
* ``used``: a sorted set, block key by its last use, in milliseconds of the Redis server's clock
  with the microseconds as a fraction.
* ``order``: a sorted set, block key by its rank for eviction, the lowest goes first: the time of
  its last use, 10 ms less for each block before it, since the end of a prompt goes first; and 2^43
  more for a block that was read, as long as at most half of the blocks are such. So a flood of
  blocks that nobody reads again pushes out itself (segmented LRU).
* ``kids``: a hash, block key to how many of the blocks after it are here. While it has any, a block
  goes only when nothing else is left.
* ``mid``, ``fine``: sorted sets like ``order``, of the blocks from which that stratum may be shed.
* ``pins``, ``leases``: sorted sets, block key by the end of its pin, of its lease.
* ``doomed``: a sorted set, block key by the time until which a process may be about to delete its
  values; no lease and no pin is given on those. Or ``key:2``: of that stratum; it counts as gone.

A put *reserves* before it writes values and *records* after; a process that dies in between leaves
too much accounted, never too little, and the next look at the block corrects it.

A put of 300 bytes where 900 of 1000 are used: reserve returns ``{0, "a", "1700", "2", 50, "b",
"1650", "", 150}``: shed stratum 2 of block ``a``, whose rank is 1700, which frees 50 bytes, then
evict ``b``. The caller deletes those values, calls forget with the same list, which leaves alone
what somebody used or wrote since, and reserves again: ``{1}``.

What Redis loses of this by itself is made anew: the orders from ``sizes``, ``sizes`` from the
values as they are looked at.
"""

_NAMES = ("sizes", "order", "used", "kids", "mid", "fine", "pins", "leases", "doomed")
INDEX_KEYS = tuple(f"kvs:{{index}}:{name}" for name in _NAMES)
SIZES_KEY, ORDER_KEY, USED_KEY, KIDS_KEY, MID_KEY, FINE_KEY, PINS_KEY, _, DOOMED_KEY = INDEX_KEYS
TOTAL_FIELD = "total"

_PRELUDE = (
    f"""
local {", ".join(_NAMES)} = {", ".join(f"KEYS[{i}]" for i in range(1, len(_NAMES) + 1))}
"""
    + """
local doom_ms, depth_ms, read_bonus = 10000, 10, 2^43
local refinements = {{'3', fine}, {'2', mid}}  -- in the order in which they are shed
local clock = redis.call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000  -- to the microsecond, two with the bonus

local function bytes_in(entry)
  return entry and tonumber(string.match(entry, '^%d+')) or 0
end

local function entry_of(member)
  return redis.call('HGET', sizes, member) or nil
end

local function total()
  return tonumber(redis.call('HGET', sizes, 'total') or '0')
end

local function size_of(entry, stratum)
  return entry and tonumber(string.match(entry, ' ' .. stratum .. ':(%d+)')) or nil
end

local function depth_of(entry)
  return entry and tonumber(string.match(entry, '@(%d+)')) or 0
end

-- The block before: in the same scope, which is the member's part up to the dot.
local function parent_of(member, entry)
  local hash = entry and string.match(entry, '@%d+:(%x+)$')
  return hash and string.match(member, '^[^.]*%.') .. hash or nil
end

local function count_kid(parent, change)
  if parent and redis.call('HINCRBY', kids, parent, change) <= 0 then
    redis.call('HDEL', kids, parent)
  end
end

local function rank_refinements(member, entry, rank)
  for _, pair in ipairs(refinements) do
    if size_of(entry, pair[1]) and size_of(entry, '1') and string.find(entry, '@', 1, true) then
      redis.call('ZADD', pair[2], rank, member)
    else
      redis.call('ZREM', pair[2], member)
    end
  end
end

local function rank(member, entry, bonus)
  local score = now - depth_of(entry) * depth_ms + bonus
  redis.call('ZADD', order, score, member)
  rank_refinements(member, entry, score)
end

local function spare(member)
  redis.call('ZREM', doomed, member, member .. ':2', member .. ':3')
end

local function forget(member)
  local entry = entry_of(member)
  spare(member)  -- first: without memory, no script may start by adding
  for _, set in ipairs({order, used, mid, fine}) do redis.call('ZREM', set, member) end
  if entry then
    redis.call('HDEL', sizes, member)
    redis.call('HINCRBY', sizes, 'total', -bytes_in(entry))
    count_kid(parent_of(member, entry), -1)
  end
end

-- An entry that does not say what comes before the block keeps what was known of that.
local function set(member, entry)
  if redis.call('EXISTS', sizes) == 0 then redis.call('DEL', kids, mid, fine) end  -- lost with it
  local old = entry_of(member)
  if old and not string.find(entry, '@', 1, true) then
    entry = entry .. (string.match(old, ' @.*$') or '')
  end
  redis.call('HINCRBY', sizes, 'total', bytes_in(entry) - bytes_in(old))
  redis.call('HSET', sizes, member, entry)
  local before, parent = parent_of(member, old), parent_of(member, entry)
  if before ~= parent then
    count_kid(before, -1)
    count_kid(parent, 1)
  end
  return entry
end

local function without(entry, stratum)
  local size = size_of(entry, stratum)
  if not size then return entry end
  local rest = string.gsub(entry, ' ' .. stratum .. ':%d+', '')
  return string.gsub(rest, '^%d+', string.format('%d', bytes_in(entry) - size)), nil
end

-- Whether it is here and nobody is about to delete it.
local function stays(member)
  local doom = redis.call('ZSCORE', doomed, member)
  return redis.call('HEXISTS', sizes, member) == 1 and not (doom and tonumber(doom) > now)
end

-- Exempts ARGV[2] and further members for ARGV[1] ms; returns the positions of those that do not
-- stay anyway, from 1.
local function exempt(holders)
  local missing = {}
  for i = 2, #ARGV do
    if stays(ARGV[i]) then
      redis.call('ZADD', holders, 'GT', now + tonumber(ARGV[1]), ARGV[i])
    else
      table.insert(missing, i - 1)
    end
  end
  return missing
end

local function is_exempt(member)
  return redis.call('ZSCORE', pins, member) or redis.call('ZSCORE', leases, member)
end

local function touch(member)
  local entry = entry_of(member)
  if not entry then return end
  redis.call('ZADD', used, now, member)
  rank(member, entry, read_bonus)
end

-- Of read blocks beyond half of all, the coldest rank as if they had just come.
local function cool()
  local read, half = redis.call('ZCOUNT', order, read_bonus, '+inf'), redis.call('ZCARD', order) / 2
  local most = math.min(math.ceil(read - half), 128)
  if most <= 0 then return end
  local coldest = redis.call('ZRANGEBYSCORE', order, read_bonus, '+inf', 'LIMIT', 0, most)
  for _, member in ipairs(coldest) do
    local entry = entry_of(member)
    if entry then rank(member, entry, 0) end
  end
end

local function rebuild()
  redis.call('DEL', kids, mid, fine)
  local entries = redis.call('HGETALL', sizes)
  for i = 1, #entries, 2 do
    local member, entry = entries[i], entries[i + 1]
    if member ~= 'total' then
      redis.call('ZADD', order, 'NX', now - depth_of(entry) * depth_ms, member)
      redis.call('ZADD', used, 'NX', now, member)
      rank_refinements(member, entry, tonumber(redis.call('ZSCORE', order, member)))
      count_kid(parent_of(member, entry), 1)
    end
  end
  redis.call('HSET', kids, '', 0)  -- so that it is seen when one of them is lost
  for _, pair in ipairs(refinements) do redis.call('ZADD', pair[2], '+inf', '') end
end

local function sweep(ttl_ms)
  redis.call('ZREMRANGEBYSCORE', pins, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', leases, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', doomed, '-inf', now)
  local held = redis.call('HLEN', sizes)
  if held > 1 and (redis.call('ZCARD', order) + 1 < held or redis.call('ZCARD', used) + 1 < held
      or redis.call('EXISTS', kids, mid, fine) < 3) then
    rebuild()
  end
  local old = redis.call('ZRANGEBYSCORE', used, '-inf', now - ttl_ms, 'LIMIT', 0, 256)
  for _, member in ipairs(old) do forget(member) end
end
"""
)

# ARGV: member, entry, capacity, ttl_ms. Returns {1} with the entry accounted; {0, member, rank,
# stratum, bytes, ...}: what is to be deleted first, the whole block where the stratum is empty; or
# {2} when blocks that are exempt leave no room.
RESERVE = (
    _PRELUDE
    + """
local member, entry, capacity = ARGV[1], ARGV[2], tonumber(ARGV[3])
sweep(tonumber(ARGV[4]))
local old = entry_of(member)
local excess = total() - bytes_in(old) + bytes_in(entry) - capacity
if excess <= 0 then
  entry = set(member, entry)
  redis.call('ZADD', used, now, member)
  rank(member, entry, old and read_bonus or 0)
  spare(member)
  return {1}
end

cool()
local reply, left = {0}, {}  -- left: bytes of blocks that something is shed from

local function act(target, score, stratum, freed)
  table.insert(reply, target)
  table.insert(reply, score)
  table.insert(reply, stratum)
  table.insert(reply, freed)
  left[target] = (left[target] or bytes_in(entry_of(target))) - freed
  excess = excess - freed
end

local function shed(stratum, holders, half)
  local first = 0
  while true do
    local batch = redis.call('ZRANGE', holders, first, first + 127, 'WITHSCORES')
    if #batch == 0 then return end
    for i = 1, #batch, 2 do
      local target = batch[i]
      local place = redis.call('ZRANK', order, target)
      if excess <= 0 or (place and place >= half) then return end
      local size = place and size_of(entry_of(target), stratum)
      if size and target ~= member and not is_exempt(target) then
        act(target, redis.call('ZSCORE', order, target), stratum, size)
      end
    end
    first = first + 128
  end
end

local kids_gone, gone = {}, {}

local function kids_left(target)
  local held = tonumber(redis.call('HGET', kids, target) or '0')
  return held - (kids_gone[target] or 0)
end

local function may_go(target)
  return target ~= member and not gone[target] and not is_exempt(target)
end

local function evict(target, score)
  gone[target] = true
  local known = entry_of(target)
  act(target, score, '', left[target] or bytes_in(known))
  local parent = parent_of(target, known)
  if parent then kids_gone[parent] = (kids_gone[parent] or 0) + 1 end
  return parent
end

-- Leaves in their order; each lets the one before it become a leaf, which may be older.
local function evict_leaves()
  local first = 0
  while true do
    local batch = redis.call('ZRANGE', order, first, first + 127, 'WITHSCORES')
    if #batch == 0 then return end
    for i = 1, #batch, 2 do
      local target, score = batch[i], batch[i + 1]
      while target and excess > 0 and may_go(target) and kids_left(target) <= 0 do
        target = evict(target, score)
        score = target and redis.call('ZSCORE', order, target)
        if not score or tonumber(score) > tonumber(batch[i + 1]) then break end
      end
      if excess <= 0 then return end
    end
    first = first + 128
  end
end

local function evict_any()
  local first = 0
  while true do
    local batch = redis.call('ZRANGE', order, first, first + 127, 'WITHSCORES')
    if #batch == 0 then return end
    for i = 1, #batch, 2 do
      if excess <= 0 then return end
      if may_go(batch[i]) then evict(batch[i], batch[i + 1]) end
    end
    first = first + 128
  end
end

local parent = parent_of(member, entry)
if parent and not old then kids_gone[parent] = -1 end  -- the one to come is a kid, too
local half = math.floor(redis.call('ZCARD', order) / 2)
for _, pair in ipairs(refinements) do shed(pair[1], pair[2], half) end
evict_leaves()
if excess > 0 then evict_any() end
if excess > 0 then return {2} end
for i = 2, #reply, 4 do
  local what = reply[i + 2] == '' and reply[i] or reply[i] .. ':' .. reply[i + 2]
  redis.call('ZADD', doomed, now + doom_ms, what)
end
return reply
"""
)

# ARGV: member, rank, stratum, bytes, ... Forgets what was deleted where the rank is still that;
# returns how many whole blocks.
FORGET = (
    _PRELUDE
    + """
local count = 0
for i = 1, #ARGV, 4 do
  local member, stratum = ARGV[i], ARGV[i + 2]
  redis.call('ZREM', doomed, member .. ':' .. stratum)
  if redis.call('ZSCORE', order, member) == ARGV[i + 1] then
    if stratum == '' then
      forget(member)
      count = count + 1
    else
      local entry = entry_of(member)
      if entry then
        redis.call('ZREM', stratum == '2' and mid or fine, member)
        set(member, (without(entry, stratum)))
      end
    end
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
  local member = ARGV[i]
  if ARGV[i + 1] == '' then
    forget(member)
  else
    local entry = set(member, ARGV[i + 1])
    redis.call('ZADD', used, 'NX', now, member)
    redis.call('ZADD', order, 'NX', now - depth_of(entry) * depth_ms, member)
    rank_refinements(member, entry, tonumber(redis.call('ZSCORE', order, member)))
  end
end
"""
)

# ARGV: member, ... Counts as a use.
TOUCH = _PRELUDE + "for i = 1, #ARGV do touch(ARGV[i]) end"

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

# ARGV: ttl_ms, member, ... Pins those that stay; returns the positions of the others, from 1.
PIN = _PRELUDE + "return exempt(pins)"

# ARGV: ttl_ms, member, ... Leases those that stay; returns the positions of the others, from 1.
LEASE = _PRELUDE + "return exempt(leases)"

# ARGV: ttl_ms. Returns {blocks, bytes}.
USAGE = (
    _PRELUDE
    + """
sweep(tonumber(ARGV[1]))
return {redis.call('ZCARD', order), total()}
"""
)
