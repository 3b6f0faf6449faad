"""Which blocks a tier gives up: the contract of every policy.

A prefix is read from its first block on, so a block is worth nothing without those before it. The
blocks of a tier form a forest, each below its parent, and only leaves are given up: a policy says
in which order. What a leaf is worth is the 64 tokens that would be computed again, times the chance
that somebody asks; what it costs is its bytes. Blocks whose parent is unknown count as roots.
"""

from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

Key = TypeVar("Key", bound=Hashable)
Exempt = Callable[[Key], bool]


class EvictionPolicy(Protocol[Key]):
    """Knows keys, parents, sizes and uses of the blocks held; never their bytes.

    Time is counted in calls. Calls that name a block that is not held do nothing.
    """

    def insert(self, key: Key, parent: Key | None, num_bytes: int) -> None:
        """Know the block from now on; a block that is held already is used and gets that size.

        Args:
            key: The block.
            parent: The block before it, held or not; None for a first or a foreign block.
            num_bytes: Its size.
        """
        ...

    def touch(self, key: Key) -> None:
        """Count a use of the block."""
        ...

    def resize(self, key: Key, num_bytes: int) -> None:
        """Know the block's new size; no use."""
        ...

    def remove(self, key: Key) -> None:
        """Forget a block that was deleted."""
        ...

    def evict(self, num_bytes: int, is_exempt: Exempt[Key]) -> list[Key] | None:
        """Forget blocks of at least ``num_bytes`` together, one by one, and return them in order.

        Every block goes after its children; an ancestor of an exempt block only when nothing else
        is left. Returns None, and forgets nothing, if all that is not exempt is too little.
        """
        ...

    def __len__(self) -> int:
        """Return the number of blocks known."""
        ...

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless tree, queues and sizes agree."""
        ...
