"""How a tenant's blocks are named in the store: under scopes that no other tenant can write.

The stored scope is a hash of the tenant's name and the scope in the request. So another tenant that
knows a block's whole key asks, with the same key, for another block, which is absent. Frames are
stored with the stored scope in their header, so every tier verifies them as ever; each reader gets
back the header that was put.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvstrata.kvstore_service.block_run import BlockRun
from kvstrata.protos.call_context import DEFAULT_TENANT
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import under_scope
from kvstrata.protos.identity import BlockKey, ScopeDigest, digest

_MAX_SCOPES = 65_536


class ScopeOwners:
    """Which tenant stores under which scope, as seen in the requests of this process.

    Encryption at rest needs it: tiers know keys of blocks, not tenants.
    """

    def __init__(self) -> None:
        self._owners: OrderedDict[ScopeDigest, str] = OrderedDict()

    def note(self, scope: ScopeDigest, tenant: str) -> None:
        """Remember whose a stored scope is; the longest unseen of 65,536 is forgotten."""
        self._owners[scope] = tenant
        self._owners.move_to_end(scope)
        if len(self._owners) > _MAX_SCOPES:
            self._owners.popitem(last=False)

    def of(self, scope: ScopeDigest) -> str | None:
        """Return the tenant; None if no request named the scope."""
        return self._owners.get(scope)


@dataclass(frozen=True, slots=True)
class Namespace:
    """The blocks of one owner.

    Attributes:
        owner: Whose; without one blocks are stored as they come.
        owners: Told of every stored scope.
    """

    owner: str = ""
    owners: ScopeOwners | None = field(default=None, repr=False, compare=False)

    def scope(self, scope: ScopeDigest) -> ScopeDigest:
        """Return the stored scope of a requested one."""
        stored = scope
        if self.owner:
            stored = ScopeDigest(digest("tenant", (self.owner.encode(), scope)))
        if self.owners is not None:
            self.owners.note(stored, self.owner or DEFAULT_TENANT)
        return stored

    def run(self, keys: BlockRun) -> BlockRun:
        """Return the stored keys of a requested run."""
        return BlockRun(self.scope(keys.scope), keys.hashes)

    def keys(self, keys: Iterable[BlockKey]) -> list[BlockKey]:
        """Return the stored key of each requested one."""
        if not self.owner:
            plain = list(keys)
            if self.owners is not None:
                for scope in {key.scope for key in plain}:
                    self.owners.note(scope, DEFAULT_TENANT)
            return plain
        scopes: dict[ScopeDigest, ScopeDigest] = {}
        stored = []
        for key in keys:
            if key.scope not in scopes:
                scopes[key.scope] = self.scope(key.scope)
            stored.append(BlockKey(scopes[key.scope], key.block_hash))
        return stored

    def stored(self, key: BlockKey, frames: Mapping[int, bytes]) -> dict[int, bytes]:
        """Return the frames of the requested key as they are stored.

        A frame that is damaged or another block's stays as it is: the commit rule refuses it.
        """
        stored_scope = self.scope(key.scope)
        if stored_scope == key.scope:
            return dict(frames)
        return {
            stratum: _moved(frame, key.scope, stored_scope) for stratum, frame in frames.items()
        }

    def shown(self, scope: ScopeDigest, frame: bytes) -> bytes:
        """Return a stored frame as it was put under ``scope``."""
        stored_scope = self.scope(scope)
        return frame if stored_scope == scope else under_scope(frame, stored_scope, scope)


def _moved(frame: bytes, old: ScopeDigest, new: ScopeDigest) -> bytes:
    try:
        return under_scope(frame, old, new)
    except CorruptFrameError:
        return frame
