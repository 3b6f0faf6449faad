"""Listing blocks over all tiers, a page at a time, over a snapshot of the keys."""

import secrets
from collections import OrderedDict

from kvstrata.kvstore_service.store import BlockStore, Presence
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import InvalidRequestError
from kvstrata.protos.identity import BlockKey

_MAX_SNAPSHOTS = 8
_MAX_KEYS = 1_000_000


class Listing:
    """Hands out pages of snapshots; the oldest of eight is forgotten when a ninth is taken.

    A page token is ``<snapshot>.<position>``, such as ``5fd0b0c1d2e3f405.200``.
    """

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._snapshots: OrderedDict[str, list[BlockKey]] = OrderedDict()

    async def all_keys(self, tier_name: str = "", scope: bytes = b"") -> list[BlockKey]:
        """Return the keys of the named tier, or of all, most recently used first within each."""
        keys: dict[BlockKey, None] = {}
        for tier in self._store.tiers:
            if tier_name not in ("", tier.name):
                continue
            try:
                keys |= dict.fromkeys(await tier.keys(_MAX_KEYS))
            except TierUnavailableError:
                continue
        return [key for key in keys if not scope or key.scope == scope]

    async def page(
        self, size: int, token: str, scope: bytes
    ) -> tuple[list[tuple[BlockKey, Presence]], str]:
        """Return the next blocks that still exist, and the next page's token, empty at the end.

        Raises:
            InvalidRequestError: A token that was never given out, or whose snapshot is forgotten.
        """
        if token:
            snapshot, first = self._parse(token)
        else:
            snapshot, first = secrets.token_hex(8), 0
            self._remember(snapshot, await self.all_keys(scope=scope))
        keys = self._snapshots[snapshot]
        last = first + size
        found, _ = await self._store.locate(keys[first:last])
        page = [(k, p) for k, p in zip(keys[first:last], found, strict=True) if p]
        if last < len(keys):
            return page, f"{snapshot}.{last}"
        self._snapshots.pop(snapshot, None)
        return page, ""

    def _remember(self, snapshot: str, keys: list[BlockKey]) -> None:
        self._snapshots[snapshot] = keys
        while len(self._snapshots) > _MAX_SNAPSHOTS:
            self._snapshots.popitem(last=False)

    def _parse(self, token: str) -> tuple[str, int]:
        snapshot, _, position = token.partition(".")
        keys = self._snapshots.get(snapshot)
        if (
            keys is None
            or not position.isdecimal()
            or len(position) > 9
            or int(position) >= len(keys)
        ):
            raise InvalidRequestError(
                f"unknown or expired page token {token[:40]!r}", "start again without a token"
            )
        self._snapshots.move_to_end(snapshot)
        return snapshot, int(position)
