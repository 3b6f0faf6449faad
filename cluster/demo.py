"""``kvstrata demo``: one long document, three client processes, and what the cache did for them."""

import asyncio
import contextlib
import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from kvstrata.cluster.commands import PARENT_VARIABLE
from kvstrata.cluster.stored_blocks import StoredBlocks, read_store

if TYPE_CHECKING:
    from kvstrata.engine.model import Model
    from kvstrata.engine.sequence import RunningSequence
    from kvstrata.methods.presets import Method

DOCUMENT_CHARS = 8_560  # about 2,000 tokens
QUESTIONS = (
    "What does this text explain?",
    "What is the target of an assignment?",
    "Which statement should I use to check a condition while debugging?",
)
CLIENT = "from kvstrata.client.kvstrata import main; main()"
STOP_TIMEOUT_S = 60.0
NUM_FACT_CONTEXTS = 5

console = Console()


@dataclass(frozen=True, slots=True)
class Answer:
    """What one client process printed, and the prompt it sent."""

    name: str
    prompt: str
    output: dict[str, Any]


def demo(
    preset: Annotated[str, typer.Option(help="How KV is stored: balanced or exact.")] = "balanced",
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer.")] = 48,
    model: Annotated[str, typer.Option(help="Folder or hub id; default: SmolLM2-135M.")] = "",
    output: Annotated[Path, typer.Option(help="Where the plot and the figures go.")] = Path("demo"),
    quality: Annotated[bool, typer.Option(help="Measure quality afterwards (a minute).")] = True,
) -> None:
    """Ask three questions about one document, from three processes: two of them reuse its KV."""
    output.mkdir(parents=True, exist_ok=True)
    document = read_document()
    with running_stack(model) as stack:
        console.print(f"gateway at {stack['address']}, store at {stack['store']}\n")
        warm_up(stack, preset)
        answers = [
            ask(stack, name, document, question, preset, max_tokens)
            for name, question in zip(("cold", "warm 1", "warm 2"), QUESTIONS, strict=True)
        ]
        stored = asyncio.run(read_store(stack["store"]))
    figures = {"preset": preset, "sessions": [session_figures(answer) for answer in answers]}
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", folder)  # importing transformers makes it
        figures |= measure(answers, stored, preset, model or None, quality=quality)
    show(figures)
    from kvstrata.cluster.timeline import draw_timeline

    (output / "demo.json").write_text(json.dumps(figures, indent=1))
    draw_timeline(answers, output / "timeline.png")
    console.print(f"figures: {output / 'demo.json'}, timeline: {output / 'timeline.png'}")


def read_document(number: int = 0) -> str:
    """Return about 2,000 tokens of real prose, piece ``number`` of Python's own documentation."""
    topics = pydoc_data.topics.topics
    names = ("assignment", "assert", "debugger", "specialnames")
    text = "\n\n".join(topics[name] for name in names)
    piece = text[number * DOCUMENT_CHARS : (number + 1) * DOCUMENT_CHARS]
    return piece.rpartition("\n\n")[0]


@contextlib.contextmanager
def running_stack(model: str) -> Iterator[dict[str, Any]]:
    """Run ``kvstrata up`` for the body, and end it whatever happens."""
    command = [sys.executable, "-P", "-c", CLIENT, "up", "--listen", "127.0.0.1:0"]
    for number in (signal.SIGTERM, signal.SIGHUP):  # leave through `finally`, as Ctrl-C does
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    process = subprocess.Popen(
        command + (["--model", model] if model else []),
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {PARENT_VARIABLE: str(os.getpid())},
    )
    try:
        assert process.stdout is not None
        # `up` ends by itself when its workers are not ready in time, so this read ends too.
        line = process.stdout.readline()
        if not line:
            raise typer.Exit(process.wait(STOP_TIMEOUT_S))
        yield json.loads(line)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)


def ask(
    stack: dict[str, Any], name: str, document: str, question: str, preset: str, max_tokens: int
) -> Answer:
    """Send one question about the document from a client process of its own."""
    prompt = f"{document}\n\nQuestion: {question}\nAnswer:"
    command = [sys.executable, "-P", "-c", CLIENT, "generate", "-", "--json", "--preset", preset]
    command += ["--address", stack["address"], "--max-tokens", str(max_tokens)]
    with console.status(f"{name}: {question}"):
        done = subprocess.run(command, input=prompt, capture_output=True, text=True, check=False)
    if done.returncode:
        console.print(done.stderr)
        raise typer.Exit(1)
    answer = Answer(name, prompt, json.loads(done.stdout))
    console.print(
        f"[bold]{name}[/bold] {question}\n  [dim]{answer.output['text'].strip()[:200]}[/dim]"
    )
    return answer


def warm_up(stack: dict[str, Any], preset: str) -> None:
    """Send a short unrelated prompt: the cold row shall time prefill, not first-use set-up."""
    ask(stack, "warm-up", "Good morning. " * 30, "How are you?", preset, 8)


def session_figures(answer: Answer) -> dict[str, Any]:
    """Return one row of the table: what the session got from the cache, and how fast."""
    output, cache = answer.output, answer.output["cache"]
    return {
        "session": answer.name,
        "prompt_tokens": cache["prompt_tokens"],
        "shareable_tokens": cache["shareable_tokens"],
        "cached_tokens": cache["cached_tokens"],
        "ttft_ms": 1000 * output["ttft_s"],
        "tpot_ms": 1000 * output["tpot_s"],
        "wire_bytes": cache["bytes_fetched"] + cache["bytes_published"],
        "token_ids": output["token_ids"],
        "stages": cache["stages"],
    }


def measure(
    answers: list[Answer], stored: StoredBlocks, preset: str, source: str | None, *, quality: bool
) -> dict[str, Any]:
    """Compare the blocks that the store really held with bf16, and with the uncompressed model."""
    from kvstrata.engine.model import Model
    from kvstrata.engine.sequence import RunningSequence
    from kvstrata.methods.presets import from_preset

    with console.status("loading the model"):
        model = Model.load(source)
    method = from_preset(preset, model.profile)
    figures: dict[str, Any] = {"kl": [], "same_tokens": []}
    for answer in track(answers, "the stored blocks", console=console, transient=True):
        ids = model.tokenizer.encode(answer.prompt)
        sequence = RunningSequence(model, method, ids)
        blocks = stored.prefix(sequence.scope, sequence.hashes)
        sequence.load([block.frames for block in blocks])
        figures["stored_bytes"] = sum(block.num_bytes for block in blocks)
        figures["bf16_bytes"] = sequence.cache.length * model.spec.kv_bytes_per_token_bf16
        if quality:
            kl, same = compare(sequence, ids, answer.output["token_ids"])
            figures["kl"].append(kl)
            figures["same_tokens"].append(same)
    figures["ratio_to_bf16"] = figures["bf16_bytes"] / figures["stored_bytes"]
    if quality:
        figures |= recall_figures(model, method)
    return figures


def compare(
    compressed: "RunningSequence", ids: list[int], answer: list[int]
) -> tuple[float, float]:
    """Return the KL along the uncompressed model's own answer, and the share of equal tokens."""
    from kvstrata.cluster.quality import kl_divergence, prefilled, teacher_forced

    reference = prefilled(compressed.model, compressed.method, ids)
    greedy = greedy_tokens(reference, ids, len(answer))
    kl = kl_divergence(
        teacher_forced(reference, ids, greedy), teacher_forced(compressed, ids, greedy)
    )
    return kl, sum(a == b for a, b in zip(greedy, answer, strict=True)) / len(greedy)


def recall_figures(model: "Model", method: "Method") -> dict[str, Any]:
    """Return how much less likely the compressed cache makes facts planted in real text."""
    from kvstrata.cluster.quality import plant_facts, recall

    changes: list[float] = []
    contexts = range(NUM_FACT_CONTEXTS)
    for seed in track(contexts, "planted facts", console=console, transient=True):
        text, planted = plant_facts(read_document(seed), seed)
        changes += [r.compressed - r.reference for r in recall(model, method, text, planted)]
    return {"facts": len(changes), "recall_delta_log_p": sum(changes) / len(changes)}


def greedy_tokens(sequence: "RunningSequence", ids: list[int], count: int) -> list[int]:
    """Return the uncompressed model's own greedy continuation, leaving the cache as it was."""
    held = sequence.cache.length
    logits = sequence.model.forward(sequence.cache, ids[held:])
    tokens = [int(logits.argmax())]
    while len(tokens) < count:
        tokens.append(int(sequence.model.forward(sequence.cache, tokens[-1:]).argmax()))
    sequence.cache.truncate(held)
    return tokens


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"preset {figures['preset']}", box=SIMPLE, pad_edge=False)
    for column in (
        "session", "prompt", "cached", "share", "TTFT ms", "TPOT ms", "wire MB", "KL", "same",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    row: Any
    for row, kl, same in zip_longest(figures["sessions"], figures["kl"], figures["same_tokens"]):
        table.add_row(
            row["session"],
            str(row["prompt_tokens"]),
            str(row["cached_tokens"]),
            f"{row['cached_tokens'] / row['shareable_tokens']:.1%}",
            f"{row['ttft_ms']:.0f}",
            f"{row['tpot_ms']:.1f}",
            f"{row['wire_bytes'] / 1e6:.2f}",
            "-" if kl is None else f"{kl:.4f}",
            "-" if same is None else f"{same:.0%}",
        )
    console.print(table)
    console.print(
        "cached: prompt tokens found in the store, and their share of the shareable ones; wire: KV "
        "moved by the request; KL and same tokens: against the uncompressed model\n"
    )
    cold, *warm = (row["ttft_ms"] for row in figures["sessions"])
    console.print(
        f"warm TTFT is 1/{cold / max(warm):.1f} to 1/{cold / min(warm):.1f} of cold; "
        f"stored {figures['stored_bytes'] / 1e6:.2f} MB for one prompt, headers and checksums "
        f"counted: 1/{figures['ratio_to_bf16']:.2f} of bf16"
    )
    if "facts" in figures:
        console.print(
            f"recall of {figures['facts']} planted five-digit facts: mean change of log P(answer) "
            f"{figures['recall_delta_log_p']:+.3f} against the uncompressed model"
        )
