"""TTFT of KVStrata: the whole service as ``kvstrata up`` starts it, asked over gRPC.

A prompt is first asked cold, then found in each tier: the tiers above are emptied before. Redis and
ssd get blocks a while after a request has ended; they are waited for, and what a request found, and
where, is checked against its report.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc

from kvstrata.client import Client
from kvstrata.methods.presets import from_preset
from kvstrata.prefill_node.prefill import num_prompt_blocks
from kvstrata.protos import admin_pb2, admin_pb2_grpc
from kvstrata.protos.identity import BLOCK_TOKENS
from kvstrata.protos.service import CALL_METADATA

STATES = {"cold": "", "warm-dram": "dram", "warm-redis": "redis", "warm-ssd": "ssd"}
START_S, SETTLE_S = 300.0, 30.0


class Service:
    """A running service with all local tiers, and a client of it."""

    def __init__(self, address: str) -> None:
        self._client = Client(address, timeout_s=300)
        self._channel = grpc.insecure_channel(address)
        self._admin: Any = admin_pb2_grpc.AdminStub(self._channel)

    def close(self) -> None:
        """Close both connections."""
        self._client.close()
        self._channel.close()

    def ask(self, prompt: Sequence[int], preset: str) -> tuple[float, Any]:
        """Return the seconds until the first token came, and the request's report."""
        start = time.perf_counter()
        stream = self._client.stream(list(prompt), preset=preset, max_tokens=1, ignore_eos=True)
        with stream:
            next(stream)
            seconds = time.perf_counter() - start
            return seconds, stream.read().cache

    def states(self, prompt: Sequence[int], preset: str) -> Iterator[tuple[str, float, Any]]:
        """Yield state, seconds and report of one prompt that the service has not seen."""
        num_blocks = num_prompt_blocks(len(prompt), from_preset(preset))
        self.empty()
        for state, tier in STATES.items():
            if tier:
                self._leave_only(tier, num_blocks)
            seconds, report = self.ask(prompt, preset)
            cached = num_blocks * BLOCK_TOKENS if tier else 0
            if (report.cached_tokens, report.tier) != (cached, tier) or report.recomputes:
                raise AssertionError(f"{state}: the request was not that: {report}")
            yield state, seconds, report

    def _leave_only(self, tier: str, num_blocks: int) -> None:
        """Wait until ``tier`` has all blocks; empty those above it."""
        deadline = time.monotonic() + SETTLE_S
        while not self._has(tier, num_blocks):
            if time.monotonic() > deadline:
                raise AssertionError(f"{num_blocks} blocks did not reach {tier}")
            time.sleep(0.05)
        names = list(STATES.values())[1:]
        for name in names[: names.index(tier)]:
            self._call(self._admin.Evict, admin_pb2.EvictRequest(tier=name))

    def empty(self) -> None:
        """Forget all blocks, in all tiers."""
        self._call(self._admin.Evict, admin_pb2.EvictRequest())

    def _has(self, tier: str, num_blocks: int) -> bool:
        """Tell whether nothing is on its way to any tier, and ``tier`` has so many blocks."""
        tiers = {t.tier: t for t in self._call(self._admin.Stats, admin_pb2.StatsRequest()).tiers}
        settled = not any(found.behind_bytes for found in tiers.values())
        return settled and tiers[tier].blocks >= num_blocks

    @staticmethod
    def _call(method: Any, request: Any) -> Any:
        return method(request, timeout=30, metadata=CALL_METADATA)


@contextlib.contextmanager
def running(dtype: str) -> Iterator[Service]:
    """Start ``kvstrata up`` with Redis and ssd, and end it."""
    with tempfile.TemporaryDirectory(prefix="kvt-", dir="/tmp") as folder:  # Ray needs it short
        process = subprocess.Popen(
            [
                str(Path(sys.executable).parent / "kvstrata"),
                *("up", "--listen", "127.0.0.1:0", "--dtype", dtype),
                *("--ssd-path", f"{folder}/ssd", "--dram-mib", "2048"),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": folder},
        )
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], START_S)
            line = process.stdout.readline() if ready else ""
            if not line:
                raise AssertionError("kvstrata up did not start; it says why above")
            service = Service(json.loads(line)["address"])
            try:
                yield service
            finally:
                service.close()
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
