"""Which blocks a tier gives up: the contract of every policy.

A prefix is read from its first block on, so a block is worth nothing without those before it. The
blocks of a tier form a forest, each below its parent, and only leaves are given up: a policy says
in which order. What a leaf is worth is the 64 tokens that would be computed again, times the chance
that somebody asks; what it costs is its bytes. Blocks whose parent is unknown count as roots.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvstrata.kvstore_service.ranked_leaves import Rank, RankedLeaves

Exempt = Callable[[int], bool]


class EvictionPolicy(Protocol):
    """Knows slots, parents, sizes and uses of the blocks held; never their bytes.

    A block is named by its slot, which its owner gives it and keeps for it until ``leftovers``
    yields it. Time is counted in calls. Calls that name a block that is not held do nothing.

    Attributes:
        ranked: Blocks that their users gave a rank, which the policy's own order leaves out.
    """

    ranked: RankedLeaves

    def insert(self, slot: int, parent: int, num_bytes: int) -> None:
        """Know the block from now on; a block that is held already is used and gets that size.

        Args:
            slot: The block.
            parent: The block before it, held or not; ``NONE`` for a first or a foreign block.
            num_bytes: Its size.
        """
        ...

    def touch(self, slot: int) -> None:
        """Count a use of the block."""
        ...

    def rank(self, slot: int, rank: Rank | None) -> None:
        """Let the block go before or after all without a rank, or be one of those; no use.

        It is forgotten with the block.
        """
        ...

    def resize(self, slot: int, num_bytes: int) -> None:
        """Know the block's new size; no use."""
        ...

    def remove(self, slot: int) -> None:
        """Forget a block that was deleted."""
        ...

    def evict(self, num_bytes: int, is_exempt: Exempt) -> list[int] | None:
        """Forget blocks of at least ``num_bytes`` together, one by one, and return them in order.

        Every block goes after its children; an ancestor of an exempt block only when nothing else
        is left. Returns None, and forgets nothing, if all that is not exempt is too little.
        """
        ...

    def leftovers(self, gone: Sequence[int]) -> Iterable[int]:
        """Return the slots that may be used again, once each, now that the blocks ``gone`` are.

        A slot stays taken as long as a child of its block is held: the block may come back.
        """
        ...

    def __len__(self) -> int:
        """Return the number of blocks known."""
        ...

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless tree, queues and sizes agree."""
        ...
