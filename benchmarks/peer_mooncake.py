"""Mooncake's store over TCP, as ``store_peers.py`` runs it.

    .venv-peers/bin/python peer_mooncake.py BLOCK_BYTES COUNT

A master, a process that owns the memory, and this one as a client that owns none, so that bytes
cross a socket. Every block's KV, bf16, is an object. Batch calls from and into a registered buffer
(its fastest way); threads share the blocks.
"""

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer

from mooncake.store import MooncakeDistributedStore  # noqa: E402

OWNED_BYTES = 2 << 30
LOCAL_BYTES = 64 << 20


def answer(**found: float) -> None:
    print(json.dumps(found), file=ANSWERS, flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def store(master: str, metadata: str, owned: int, local: int) -> Any:
    """Return a member of the cluster."""
    member = MooncakeDistributedStore()
    code = member.setup(f"127.0.0.1:{free_port()}", metadata, owned, local, "tcp", "", master)
    assert code == 0, f"setup returned {code}"
    return member


def own(master: str, metadata: str) -> None:
    """Own memory until the input ends."""
    member = store(master, metadata, OWNED_BYTES, LOCAL_BYTES)
    answer(bytes=OWNED_BYTES)
    sys.stdin.read()
    member.close()


class Client:
    """The client, its buffer, and the keys of the last put."""

    def __init__(self, member: Any, block_bytes: int, count: int) -> None:
        self._member = member
        self._block_bytes, self._count = block_bytes, count
        self.num_bytes = block_bytes * count
        self._buffer = (ctypes.c_char * self.num_bytes)()
        self._at = ctypes.addressof(self._buffer)
        self._body = os.urandom(self.num_bytes)
        assert member.register_buffer(self._at, self.num_bytes) == 0
        self._keys: list[str] = []
        self._generation = 0

    def put(self, threads: int) -> float:
        """Store everything under new keys; return seconds."""
        for key in self._keys:
            self._member.remove(key, True)
        ctypes.memmove(self._buffer, self._body, self.num_bytes)
        self._generation += 1
        self._keys = [f"{self._generation}-{number}" for number in range(self._count)]
        return self._timed(threads, self._member.batch_put_from, 0)

    def get(self, threads: int) -> float:
        """Fetch everything; return seconds."""
        ctypes.memset(self._buffer, 0, self.num_bytes)
        seconds = self._timed(threads, self._member.batch_get_into, self._block_bytes)
        assert bytes(self._buffer) == self._body, "other bytes"
        return seconds

    def _timed(self, threads: int, call: Any, expected: int) -> float:
        def work(numbers: range) -> None:
            keys = [self._keys[number] for number in numbers]
            places = [self._at + number * self._block_bytes for number in numbers]
            codes = call(keys, places, [self._block_bytes] * len(keys))
            assert all(code == expected for code in codes), f"returned {codes}"

        shares = [range(i, self._count, threads) for i in range(min(threads, self._count))]
        with ThreadPoolExecutor(len(shares)) as pool:
            start = time.perf_counter()
            list(pool.map(work, shares))
            return time.perf_counter() - start


def main() -> None:
    if sys.argv[1] == "own":
        own(*sys.argv[2:])
        return
    rpc, http, metrics = free_port(), free_port(), free_port()
    master = subprocess.Popen(
        [
            os.path.join(os.path.dirname(sys.executable), "mooncake_master"),
            f"--rpc_port={rpc}", "--rpc_address=127.0.0.1",
            "--enable_http_metadata_server=true", "--http_metadata_server_host=127.0.0.1",
            f"--http_metadata_server_port={http}",
            f"--metrics_port={metrics}", "--metrics_host=127.0.0.1",
            "--default_kv_lease_ttl=10000",  # of a shorter one, gets come back short
        ],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )  # fmt: skip
    addresses = f"127.0.0.1:{rpc}", f"http://127.0.0.1:{http}/metadata"
    owner = None
    try:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", http), 1):
                break
            time.sleep(0.2)
        time.sleep(1)  # its RPC port opens after the metadata port
        owner = subprocess.Popen(
            [sys.executable, "-P", __file__, "own", *addresses],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert owner.stdout is not None
        assert owner.stdout.readline(), "the owner of the memory died"
        client = Client(store(*addresses, 0, 512 << 20), *map(int, sys.argv[1:]))
        answer(bytes=client.num_bytes)
        for line in sys.stdin:
            op, threads = line.split()
            answer(seconds=getattr(client, op)(int(threads)))
    finally:
        if owner is not None:
            owner.kill()
            owner.wait()
        master.kill()
        master.wait()
    os._exit(0)


if __name__ == "__main__":
    main()
