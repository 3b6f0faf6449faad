"""A trace against a policy, as the dram tier drives it, and against the optimum.

A request reads the longest run of its blocks that is held, in order, then writes the others in
order, evicting as it goes. A hit is a block of that run. Every block takes the same room.
"""

import heapq
from collections.abc import Sequence

from policy_trace import Request

from kvstrata.kvstore_service.testing import KeyedPolicy

NEVER = 1 << 62


def replay(policy: KeyedPolicy[int], requests: Sequence[Request], num_blocks: int) -> list[int]:
    """Return the hits of each request with room for ``num_blocks`` blocks."""
    held: set[int] = set()
    hits = []
    for request in requests:
        blocks = request.blocks
        run = next((i for i, block in enumerate(blocks) if block not in held), len(blocks))
        hits.append(run)
        for block in blocks[:run]:
            policy.touch(block)
        parent = blocks[run - 1] if run else None
        for block in blocks[run:]:
            policy.insert(block, parent, 1)
            held.add(block)
            if len(held) > num_blocks:
                victims = policy.evict(len(held) - num_blocks, block.__eq__)
                assert victims is not None, "nothing is pinned, so there is always room"
                held.difference_update(victims)
            parent = block
    return hits


def optimum(requests: Sequence[Request], num_blocks: int) -> list[int]:
    """Return the hits of each request under Belady's MIN with bypass.

    No policy has more block hits, whatever it knows: MIN is optimal for blocks of equal size that
    may be left out, and a hit in a prefix cache is a hit there too. MIN is itself a prefix cache:
    a parent is used whenever its child is, so its next use comes first, so the block whose next use
    is farthest has no child in the cache. Hence all its hits lie in the leading run of a request.
    Token hits are those of MIN. The last block of a prompt may have fewer tokens, so a policy that
    weighed them could have more, but never more than a whole block for each of MIN's hits.
    """
    flat = [block for request in requests for block in request.blocks]
    next_use = [NEVER] * len(flat)
    seen: dict[int, int] = {}
    for position in range(len(flat) - 1, -1, -1):
        next_use[position] = seen.get(flat[position], NEVER)
        seen[flat[position]] = position
    held: dict[int, int] = {}
    farthest: list[tuple[int, int]] = []
    hits, position = [], 0
    for request in requests:
        before = len(request.blocks)
        for block in request.blocks:
            if held.pop(block, None) is None:
                before -= 1
            if next_use[position] != NEVER:
                held[block] = next_use[position]
                heapq.heappush(farthest, (-next_use[position], block))
            position += 1
            while len(held) > num_blocks:
                use, victim = heapq.heappop(farthest)
                if held.get(victim) == -use:
                    del held[victim]
        hits.append(before)
    return hits
