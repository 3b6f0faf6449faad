"""Whether this store encrypts at rest: its keys, and the tiers that are sealed with them."""

import logging
import os
from typing import Protocol

from kvstrata.kvstore_service.counters import Counters
from kvstrata.kvstore_service.namespace import ScopeOwners
from kvstrata.kvstore_service.tenants import Tenants
from kvstrata.kvstore_service.tier import Tier
from kvstrata.protos.errors import KVStrataError

KEYS_VARIABLE = "KVSTRATA_KEYS"

logger = logging.getLogger(__name__)


class Sealed(Protocol):
    """A tier that is sealed."""

    def forget_refusals(self) -> None:
        """Try anew what could not be read."""
        ...


class Encryption:
    """The keys of a store, if it has any. Without keys nothing is imported, and nothing wrapped.

    Args:
        tenants: Who there is.
        key_file: The store's master keys; without it the environment's or the tenants' own.
        counters: Where sealed and opened strata are counted.

    Raises:
        ConfigurationError: A file of keys is bad.
    """

    def __init__(self, tenants: Tenants, key_file: str, counters: Counters) -> None:
        own = any(tenant.key_file for tenant in tenants.all())
        self.is_on = bool(key_file or os.environ.get(KEYS_VARIABLE) or own)
        self._counters = counters
        self._tiers: list[Sealed] = []
        if self.is_on:
            from kvstrata.kvstore_service.key_ring import KeyRing

            self._owners = ScopeOwners()
            self._ring = KeyRing(tenants.all(), key_file)
            tenants.tell_owners(self._owners)

    def around(self, tier: Tier) -> Tier:
        """Return the tier, sealed if there are keys."""
        if not self.is_on:
            return tier
        from kvstrata.kvstore_service.sealed_tier import SealedTier

        sealed = SealedTier(tier, self._ring, self._owners, self._counters)
        self._tiers.append(sealed)
        return sealed

    def reload(self, tenants: Tenants) -> bool:
        """Read the keys again; bad ones are logged and change nothing. Return whether they held.

        A store that has started without keys stays without.
        """
        if not self.is_on:
            return True
        try:
            self._ring.load(tenants.all())
        except KVStrataError as error:
            logger.error("keys not read again, the old ones stay", extra={"error": str(error)})
            return False
        for tier in self._tiers:
            tier.forget_refusals()
        logger.info("keys read again")
        return True
