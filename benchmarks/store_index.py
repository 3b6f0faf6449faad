"""How much memory the dram tier's index takes a block, and how long a look-up in it takes.

Run as a program it fills a tier with ``COUNT`` blocks in prompts of 2,048, each below the one
before, as their writers would: ``python -P store_index.py COUNT`` prints one JSON object. Memory is
what the process grew by, less the frames, which have a hundred bytes each so that ten million fit.
"""

import asyncio
import gc
import json
import resource
import struct
import sys
import time
from pathlib import Path

from kvstrata.kvstore_service.block_run import BlockRun
from kvstrata.kvstore_service.dram_tier import DramTier
from kvstrata.protos.frame import MAGIC, PRELUDE_BYTES
from kvstrata.protos.frame_pb2 import FrameHeader
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest, digest

PROMPT_BLOCKS = 2048
SCOPE = ScopeDigest(b"index of a store")
LOOKS = 200
_PRELUDE = struct.Struct("<8sHHIQQ")


def frame_of(block_hash: bytes, parent: bytes) -> bytes:
    """Return a frame that says where the block belongs, and holds nothing."""
    header = FrameHeader(scope=SCOPE, block_hash=block_hash, parent_hash=parent, stratum=1)
    head = header.SerializeToString()
    size = PRELUDE_BYTES + len(head)
    return _PRELUDE.pack(MAGIC, 1, 0, len(head), size, 0) + head


def resident_bytes() -> int:
    """Return the memory that the process has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


async def measure(count: int) -> dict[str, float]:
    """Return memory a block and times, in a tier of ``count`` blocks."""
    tier, frames_bytes, prompts = DramTier(1 << 60), 0, []
    gc.collect()
    before = resident_bytes()
    longest_s = 0.0
    began = time.perf_counter()
    for first in range(0, count, PROMPT_BLOCKS):
        parent: bytes = SCOPE
        hashes = []
        for number in range(first, min(first + PROMPT_BLOCKS, count)):
            block_hash = BlockHash(digest("index", (number.to_bytes(8, "little"),)))
            frame = frame_of(block_hash, parent)
            start = time.perf_counter()
            await tier.put(BlockKey(SCOPE, block_hash), {1: frame})
            longest_s = max(longest_s, time.perf_counter() - start)
            frames_bytes += -(-sys.getsizeof(frame) // 16) * 16  # small objects: no header
            hashes.append(block_hash)
            parent = block_hash
        if first % (count // 64 or 1) < PROMPT_BLOCKS:
            prompts.append(BlockRun(SCOPE, b"".join(hashes)))
    filled_s = time.perf_counter() - began
    gc.collect()
    grown = resident_bytes() - before
    seconds = []
    for number in range(LOOKS):
        run = prompts[number * 7919 % len(prompts)]
        start = time.perf_counter()
        held = tier.look(run)
        seconds.append(time.perf_counter() - start)
        assert held.strata.all(), "blocks are missing"
    seconds.sort()
    return {
        "blocks": count,
        "bytes_a_block": round((grown - frames_bytes) / count, 1),
        "put_us": round(1e6 * filled_s / count, 2),
        "longest_put_ms": round(1e3 * longest_s, 2),
        "p50_ms": round(1e3 * seconds[len(seconds) // 2], 3),
        "p99_ms": round(1e3 * seconds[len(seconds) * 99 // 100], 3),
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure(int(sys.argv[1])))))
