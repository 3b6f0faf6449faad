"""The keys of one prompt's blocks, as they come over the wire: a scope and concatenated hashes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from kvstrata.protos.identity import HASH_BYTES, BlockHash, BlockKey, ScopeDigest


@dataclass(frozen=True, slots=True)
class BlockRun(Sequence[BlockKey]):
    """A sequence of keys that makes a key only when one is asked for.

    Attributes:
        scope: Of all of them.
        hashes: 16 bytes each, concatenated.
    """

    scope: ScopeDigest
    hashes: bytes

    def __post_init__(self) -> None:
        if len(self.hashes) % HASH_BYTES or (self.hashes and len(self.scope) != HASH_BYTES):
            raise ValueError(
                f"a scope and its block hashes are {HASH_BYTES} bytes each, got {len(self.scope)} "
                f"and {len(self.hashes)} in all"
            )

    def __len__(self) -> int:
        return len(self.hashes) // HASH_BYTES

    @overload
    def __getitem__(self, index: int) -> BlockKey: ...

    @overload
    def __getitem__(self, index: slice) -> "BlockRun": ...

    def __getitem__(self, index: "int | slice") -> "BlockKey | BlockRun":
        if isinstance(index, slice):
            first, last, step = index.indices(len(self))
            assert step == 1, "a run has no gaps"
            return BlockRun(self.scope, self.hashes[HASH_BYTES * first : HASH_BYTES * last])
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = HASH_BYTES * index
        return BlockKey(self.scope, BlockHash(self.hashes[first : first + HASH_BYTES]))

    def block_hashes(self) -> list[BlockHash]:
        """Return the hash of each block, without a key an object."""
        joined = self.hashes
        return [BlockHash(joined[i : i + HASH_BYTES]) for i in range(0, len(joined), HASH_BYTES)]

    def __iter__(self) -> Iterator[BlockKey]:
        for first in range(0, len(self.hashes), HASH_BYTES):
            yield BlockKey(self.scope, BlockHash(self.hashes[first : first + HASH_BYTES]))
