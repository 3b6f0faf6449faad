"""LMCache's StorageManager over a remote backend, as ``store_peers.py`` runs it.

    .venv-peers/bin/python peer_lmcache.py URL LAYERS KV_HEADS HEAD_DIM TOKENS

``URL`` is ``redis://host:port`` (its Python connector) or ``resp://host:port`` (its native one).
All KV of the tokens, bf16, in LMCache's chunks of 256 tokens. A put counts until every chunk is in
the backend; what takes no part: copying KV into and out of LMCache's memory. A get ends when the
chunks lie there. Threads share the chunks.
"""

import hashlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer

import redis  # noqa: E402
import torch  # noqa: E402
from lmcache.utils import CacheEngineKey  # noqa: E402
from lmcache.v1.config import LMCacheEngineConfig  # noqa: E402
from lmcache.v1.event_manager import EventManager  # noqa: E402
from lmcache.v1.memory_management import MemoryFormat  # noqa: E402
from lmcache.v1.metadata import LMCacheMetadata  # noqa: E402
from lmcache.v1.storage_backend.storage_manager import StorageManager  # noqa: E402

CHUNK_TOKENS = 256
MODEL = "meta-llama/Llama-3.1-8B-Instruct"  # a name that it knows; the shape is told apart


def answer(**found: float) -> None:
    print(json.dumps(found), file=ANSWERS, flush=True)


class Cache:
    """The manager, the KV to store, and the keys of the last put."""

    def __init__(self, url: str, layers: int, heads: int, head_dim: int, tokens: int) -> None:
        self._count = tokens // CHUNK_TOKENS
        self._shape = torch.Size([2, layers, CHUNK_TOKENS, heads * head_dim])
        config: dict[str, Any] = {"remote_url": url, "remote_serde": "naive", "local_cpu": False}
        if url.startswith("resp"):
            config["save_unfull_chunk"] = False
            config["extra_config"] = {"save_chunk_meta": False, "resp_num_threads": 2}
        self._manager = StorageManager(
            config=LMCacheEngineConfig.from_defaults(
                chunk_size=CHUNK_TOKENS, max_local_cpu_size=2.0, **config
            ),
            metadata=LMCacheMetadata(
                model_name=MODEL,
                world_size=1,
                local_world_size=1,
                worker_id=0,
                local_worker_id=0,
                kv_dtype=torch.bfloat16,
                kv_shape=(layers, 2, CHUNK_TOKENS, heads, head_dim),
            ),
            event_manager=EventManager(),
        )
        names = self._manager.get_all_backend_names()
        self._name = next(name for name in names if "Remote" in name)
        self._backend = self._manager.storage_backends[self._name]
        self._redis = redis.Redis.from_url(url.replace("resp://", "redis://"))
        self._source = [torch.randn(self._shape).to(torch.bfloat16) for _ in range(self._count)]
        self._keys: list[Any] = []
        self._generation = 0
        self.num_bytes = sum(part.nbytes for part in self._source)

    def put(self, threads: int) -> float:
        """Store everything under new keys; return seconds until all of it is there."""
        self._redis.flushall()
        self._generation += 1
        self._keys = [self._key(number) for number in range(self._count)]
        made = self._manager.batched_allocate(
            self._shape, torch.bfloat16, self._count, fmt=MemoryFormat.KV_2LTD, busy_loop=False
        )
        for part, source in zip(made, self._source, strict=True):
            part.tensor.copy_(source)

        def store(share: slice) -> None:
            self._manager.batched_put(self._keys[share], made[share])
            left = list(self._keys[share])
            while left:
                if self._backend.contains(left[0]):
                    left.pop(0)
                else:
                    time.sleep(0.001)

        return self._timed(threads, store)

    def get(self, threads: int) -> float:
        """Fetch everything; return seconds."""
        found: dict[int, Any] = {}

        def fetch(share: slice) -> None:
            parts = self._manager.batched_get(self._keys[share], location=self._name)
            numbers = range(*share.indices(self._count))
            found.update(zip(numbers, parts, strict=True))

        seconds = self._timed(threads, fetch)
        for number, part in found.items():
            assert part is not None, "a miss"
            assert torch.equal(part.tensor.view(self._shape), self._source[number])
            part.ref_count_down()
        return seconds

    def _key(self, number: int) -> Any:
        name = f"{self._generation}-{number}".encode()
        return CacheEngineKey(
            model_name=MODEL,
            world_size=1,
            worker_id=0,
            chunk_hash=int(hashlib.sha256(name).hexdigest()[:15], 16),
            dtype=torch.bfloat16,
        )

    def _timed(self, threads: int, work: Any) -> float:
        shares = [slice(i, None, threads) for i in range(min(threads, self._count))]
        with ThreadPoolExecutor(len(shares)) as pool:
            start = time.perf_counter()
            list(pool.map(work, shares))
            return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    cache = Cache(sys.argv[1], *map(int, sys.argv[2:]))
    answer(bytes=cache.num_bytes)
    for line in sys.stdin:
        op, threads = line.split()
        answer(seconds=getattr(cache, op)(int(threads)))
    os._exit(0)  # its close() hangs for half a minute with remote backends


if __name__ == "__main__":
    main()
