"""Whose hints hold for which blocks: sessions, their priorities, and when they are forgotten.

A block has the highest priority of the sessions that use it, and is not below normal once somebody
used it without a hint. A released session has low priority until it is forgotten, so what it alone
used goes first, and a hint given again takes that back.

Example: session ``s`` (high) looked blocks 1 to 9 up, somebody without a hint 1 to 4. All nine are
high. ``s`` is released: 1 to 4 are normal, 5 to 9 low.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from kvstrata.kvstore_service import counters as names
from kvstrata.kvstore_service.block_run import BlockRun
from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.pin_table import Clock
from kvstrata.kvstore_service.ranked_leaves import Rank
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from kvstrata.protos.retention import LOW, NORMAL, Retention
from kvstrata.protos.retention_pb2 import Priority

Name = tuple[str, str, str]
"""Tenant, account, session."""

_ANYBODY: Name = ("", "", "")
MAX_SESSION_BLOCKS = 1 << 14
"""Of one session, a million tokens: a change of its priority takes time for each, below 1 us."""

_SLACK = 64  # ends that there may always be in vain


@dataclass(slots=True)
class _Session:
    priority: int
    end_s: float
    keys: set[BlockKey] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Standing:
    """What hints say of a block: priority, how many sessions, and for how many seconds yet."""

    priority: int
    num_sessions: int
    keep_s: float


class RetentionTable:
    """The hints of one process. One event loop owns it.

    Args:
        counters: Where what is taken and refused is counted.
        clock: Monotonic seconds.
        max_uses: Bound on pairs of session and block, about 300 bytes each; further ones are
            refused until others are forgotten, as are those of a session with
            ``MAX_SESSION_BLOCKS``.

    Attributes:
        on_changed: Called with blocks whose rank may be another one now.
    """

    def __init__(
        self, counters: Counters, clock: Clock = time.monotonic, max_uses: int = 1 << 18
    ) -> None:
        self._counters = counters
        self._clock = clock
        self._max_uses = max_uses
        self._sessions: dict[Name, _Session] = {}
        self._users: dict[ScopeDigest, dict[BlockHash, set[Name]]] = {}
        self._ends: list[tuple[float, Name]] = []
        self._num_uses = 0
        self._num_unnamed = 0
        self.on_changed: Callable[[Iterable[BlockKey]], None] = _ignore

    def note(self, tenant: str, retention: Retention, keys: Sequence[BlockKey]) -> None:
        """Take a hint of ``tenant`` for blocks, here or not, in place of the session's earlier."""
        self.expire()
        name = (tenant, retention.account, retention.session or self._unnamed())
        session = self._sessions.get(name)
        if session is None and (not keys or self._num_uses >= self._max_uses):
            self._counters.add(names.RETENTIONS, len(keys), outcome="refused")
            return  # without a block it would not count as a use, so their number had no bound
        changed: list[BlockKey] = []
        if session is None:
            session = self._sessions[name] = _Session(retention.priority, 0.0)
        elif session.priority != retention.priority:
            session.priority = retention.priority
            changed += session.keys
        session.end_s = self._clock() + retention.keep_s
        self._await_end(name, session.end_s)
        num_refused = 0
        for key in keys:
            if key in session.keys:
                continue
            if self._num_uses >= self._max_uses or len(session.keys) >= MAX_SESSION_BLOCKS:
                num_refused += 1
                continue
            session.keys.add(key)
            users = self._users.setdefault(key.scope, {}).setdefault(key.block_hash, set())
            users.add(name)
            self._num_uses += 1
            changed.append(key)
        what = Priority.Name(retention.priority).removeprefix("PRIORITY_").lower()
        self._counters.add(names.RETENTIONS, len(keys) - num_refused, outcome=what)
        self._counters.add(names.RETENTIONS, num_refused, outcome="refused")
        self.on_changed(changed)

    def note_use(self, keys: Sequence[BlockKey]) -> None:
        """Know that somebody wanted these blocks of one scope without a hint."""
        known = self._users.get(keys[0].scope) if self._users and keys else None
        if not known:
            return
        hashes = keys.block_hashes() if isinstance(keys, BlockRun) else [k.block_hash for k in keys]
        changed = []
        for i, block_hash in enumerate(hashes):
            users = known.get(block_hash)
            if users is not None and _ANYBODY not in users:
                users.add(_ANYBODY)
                changed.append(keys[i])
        self.on_changed(changed)

    def release(self, tenant: str, account: str, session: str) -> int:
        """Give a session low priority until it is forgotten; return how many blocks it has."""
        self.expire()
        found = self._sessions.get((tenant, account, session))
        if found is None:
            return 0
        found.priority = LOW
        self._counters.add(names.RELEASED, len(found.keys))
        self.on_changed(found.keys)
        return len(found.keys)

    def expire(self) -> None:
        """Forget sessions whose time is over."""
        now_s = self._clock()
        while self._ends and self._ends[0][0] <= now_s:
            end_s, name = heapq.heappop(self._ends)
            session = self._sessions.get(name)
            if session is not None and session.end_s == end_s:
                self._forget(name, self._sessions.pop(name).keys)

    def _await_end(self, name: Name, end_s: float) -> None:
        heapq.heappush(self._ends, (end_s, name))
        if len(self._ends) > 2 * len(self._sessions) + _SLACK:  # of sessions that were prolonged
            self._ends = [(session.end_s, name) for name, session in self._sessions.items()]
            heapq.heapify(self._ends)

    def _forget(self, name: Name, keys: set[BlockKey]) -> None:
        self._num_uses -= len(keys)
        for key in keys:
            known = self._users[key.scope]
            users = known[key.block_hash]
            users.remove(name)
            if users <= {_ANYBODY}:
                del known[key.block_hash]
                if not known:
                    del self._users[key.scope]
        self.on_changed(keys)

    def rank(self, key: BlockKey) -> Rank | None:
        """Return the block's rank; None if it is like any other."""
        users = self._users.get(key.scope, {}).get(key.block_hash) if self._users else None
        if users is None:
            return None
        priority, name = max(
            (NORMAL if name == _ANYBODY else self._sessions[name].priority, name) for name in users
        )
        return None if priority == NORMAL else Rank(priority, name[:2])

    def standing(self, key: BlockKey) -> Standing | None:
        """Return what hints say of a block; None without any."""
        self.expire()
        users = self._users.get(key.scope, {}).get(key.block_hash)
        if users is None:
            return None
        rank = self.rank(key)
        sessions = [self._sessions[name] for name in users if name != _ANYBODY]
        keep_s = max(session.end_s for session in sessions) - self._clock()
        return Standing(rank.priority if rank else NORMAL, len(sessions), keep_s)

    @property
    def num_sessions(self) -> int:
        """Sessions that are known."""
        return len(self._sessions)

    def _unnamed(self) -> str:
        """Return a name that no session has."""
        self._num_unnamed += 1
        return f"\0{self._num_unnamed}"


def _ignore(keys: Iterable[BlockKey]) -> None:
    """Nobody listens."""
