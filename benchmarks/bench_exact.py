"""Claim: with the preset `exact` the service generates what the model alone generates.

For 20 prompts of real text, 50 to 2,000 tokens, greedy: transformers' own `generate` against
KVStrata over gRPC and Redis, cold and warm (dram evicted in between, so warm blocks come from
Redis). A token may differ only at a near-tie of the reference's two best logits; ties are counted.
"""

import argparse
import contextlib
import json
import os
import platform
import pydoc_data.topics
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import torch
import transformers
from rich.progress import track
from rich.table import Table

from kvstrata.client import Client
from kvstrata.engine.gguf_conversion import read_model
from kvstrata.engine.loading import find_default_model
from kvstrata.engine.model import Model
from kvstrata.protos import admin_pb2, admin_pb2_grpc
from kvstrata.protos.service import CALL_METADATA

NEAR_TIE = 1e-3
NUM_TOKENS = 64
RESULTS = Path(__file__).parent / "results" / "exact.json"


@contextlib.contextmanager
def running_stack() -> Iterator[dict[str, Any]]:
    command = [Path(sys.executable).parent / "kvstrata", "up", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def lengths(count: int) -> list[int]:
    return [round(50 + i * 1950 / max(1, count - 1)) for i in range(count)]


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics) if len(topics[name]) > 3000)
    ids = tokenizer.encode(text)
    return [ids[i * 2100 : i * 2100 + n] for i, n in enumerate(lengths(count))]


def reference(model: Any, ids: list[int]) -> tuple[list[int], list[float]]:
    """Return generate()'s greedy tokens and, per token, the gap between its two best logits."""
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    gaps = [(top := step[0].topk(2).values)[0].item() - top[1].item() for step in out.logits]
    return out.sequences[0, len(ids) :].tolist(), gaps


def verdict(tokens: list[int], wanted: list[int], gaps: list[float]) -> str:
    for token, want, gap in zip(tokens, wanted, gaps, strict=True):
        if token != want:
            return "near-tie" if gap <= NEAR_TIE else "different"
    return "equal"


def measure(count: int, *, quiet: bool) -> list[dict[str, Any]]:
    folder, name = find_default_model()
    model = read_model(folder / name, torch.float32).eval()
    model.generation_config.eos_token_id = None  # both go on past the end of the text
    tokenizer = Model.load().tokenizer
    rows = []
    with running_stack() as stack, Client(stack["address"], timeout_s=300) as client:
        admin: Any = admin_pb2_grpc.AdminStub(grpc.insecure_channel(stack["address"]))
        for ids in track(prompts(tokenizer, count), "prompts", disable=quiet):
            wanted, gaps = reference(model, ids)
            row: dict[str, Any] = {"bench": "exact", "prompt_tokens": len(ids)}
            for state in ("cold", "warm"):
                done = client.generate(ids, preset="exact", max_tokens=NUM_TOKENS, ignore_eos=True)
                row[state] = verdict(list(done.token_ids), wanted, gaps)
                row[f"{state}_cached_tokens"] = done.cache.cached_tokens
                row[f"{state}_tier"] = done.cache.tier
                admin.Evict(admin_pb2.EvictRequest(tier="dram"), timeout=30, metadata=CALL_METADATA)
            rows.append(row)
    return rows


def save(rows: list[dict[str, Any]]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    machine = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    RESULTS.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")
    parser.add_argument("--quick", action="store_true", help="5 prompts instead of 20, not saved")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows = measure(5 if options.quick else 20, quiet=options.json)
    if not options.quick:
        save(rows)
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        from rich.console import Console

        table = Table(title=f"greedy tokens against transformers' generate, {NUM_TOKENS} each")
        for key in rows[0]:
            table.add_column(key)
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
        Console(width=140).print(table)
    counts = {
        v: sum(r[s] == v for r in rows for s in ("cold", "warm"))
        for v in ("equal", "near-tie", "different")
    }
    print(json.dumps({"bench": "exact", "summary": counts}))
    return int(counts["different"] > 0)


if __name__ == "__main__":
    sys.exit(main())
