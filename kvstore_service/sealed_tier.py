"""Encryption at rest: what a tier outside this process's memory holds is sealed, a tenant a key."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from kvstrata.kvstore_service.ancestry import Ancestry, ancestry
from kvstrata.kvstore_service.counters import SEALS, Counters
from kvstrata.kvstore_service.key_ring import KeyRing
from kvstrata.kvstore_service.namespace import ScopeOwners
from kvstrata.kvstore_service.seal import NoKeyError, TamperedError, seal, unseal
from kvstrata.kvstore_service.tier import SEALED_MAGIC, StratumSizes, Tier, Wanted
from kvstrata.kvstore_service.wrapped_tier import WrappedTier
from kvstrata.protos.errors import CapacityError
from kvstrata.protos.identity import BlockKey

_DAMAGED = b""
_MAX_UNREADABLE = 16_384


class SealedTier(WrappedTier):
    """Seals what goes into ``inner`` and opens what comes out; keeps ``Tier``.

    A value that cannot be opened for want of its key comes back as ``SEALED_MAGIC``, and stays
    where it is: another process may have the key. ``contains`` then says that the block is absent,
    so that a Put writes it anew. A value that does not open although the key is here is damaged,
    and comes back empty, which no frame is. Sizes are those at rest.

    A tenant whose blocks are to be encrypted is given no plaintext, whoever wrote it.

    Args:
        inner: Where sealed values are.
        ring: The keys.
        owners: Whose a scope is.
        counters: Gets ``sealed_strata_total`` by tier and outcome.
    """

    def __init__(self, inner: Tier, ring: KeyRing, owners: ScopeOwners, counters: Counters) -> None:
        super().__init__(inner)
        self._ring = ring
        self._owners = owners
        self._counters = counters
        self._unreadable: OrderedDict[BlockKey, None] = OrderedDict()

    async def get(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """See ``Tier.get``."""
        return self._open_all(key, await self.inner.get(key, strata))

    async def get_all(self, wanted: Wanted) -> list[dict[int, bytes]]:
        """See ``Tier.get_all``."""
        found = await self.inner.get_all(wanted)
        return [self._open_all(key, v) for (key, _), v in zip(wanted, found, strict=True)]

    async def examine(self, key: BlockKey, strata: Sequence[int]) -> dict[int, bytes]:
        """See ``Tier.examine``."""
        return self._open_all(key, await self.inner.examine(key, strata))

    def _open_all(self, key: BlockKey, values: Mapping[int, bytes]) -> dict[int, bytes]:
        return {stratum: self._open(key, stratum, value) for stratum, value in values.items()}

    def _open(self, key: BlockKey, stratum: int, value: bytes) -> bytes:
        owner = self._owners.of(key.scope)
        if not value.startswith(SEALED_MAGIC):
            if owner is not None and self._ring.encrypts(owner):
                return self._refuse(key, "plaintext")
            return value
        try:
            tenant, frame = unseal(self._ring, key, stratum, value)
        except NoKeyError:
            return self._refuse(key, "undecryptable")
        except TamperedError:
            self._count("damaged")
            return _DAMAGED
        if owner is None:
            self._owners.note(key.scope, tenant)
        elif owner != tenant:
            return self._refuse(key, "foreign")
        self._count("opened")
        return frame

    def _refuse(self, key: BlockKey, outcome: str) -> bytes:
        self._count(outcome)
        self._unreadable[key] = None
        if len(self._unreadable) > _MAX_UNREADABLE:
            self._unreadable.popitem(last=False)
        return SEALED_MAGIC

    def _count(self, outcome: str) -> None:
        self._counters.add(SEALS, tier=self.name, outcome=outcome)

    async def put(
        self, key: BlockKey, frames: Mapping[int, bytes], standing: Ancestry | None = None
    ) -> list[BlockKey]:
        """Seal and put; see ``Tier.put``.

        Raises:
            CapacityError: As for every tier, and when nobody knows whose the block is: it is
                written nowhere rather than in plaintext.
        """
        if self._ring:
            owner = self._owners.of(key.scope)
            if owner is None:
                raise CapacityError(
                    f"tier {self.name} cannot encrypt block {key.encode()}: its tenant is unknown",
                    "put it again",
                    tier=self.name,
                )
            session = self._ring.sealing(owner)
            if session is not None:
                standing = standing or ancestry(key, frames)
                frames = {s: seal(session, key, s, frame) for s, frame in frames.items()}
                self._counters.add(SEALS, len(frames), tier=self.name, outcome="sealed")
        victims = await self.inner.put(key, frames, standing)
        self._unreadable.pop(key, None)
        return victims

    async def contains(self, keys: Sequence[BlockKey]) -> list[StratumSizes | None]:
        """See ``Tier.contains``; a block that could not be read for want of a key is absent."""
        held = await self.inner.contains(keys)
        if not self._unreadable:
            return held
        return [
            None if key in self._unreadable else sizes
            for key, sizes in zip(keys, held, strict=True)
        ]

    def forget_refusals(self) -> None:
        """Try anew what could not be read: keys have changed."""
        self._unreadable.clear()
