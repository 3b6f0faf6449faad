"""The ``kvstrata`` command: ``generate`` here, the other subcommands through ``plugins``."""

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from kvstrata.client.method_settings import StratumName
from kvstrata.client.plugins import PluginGroup
from kvstrata.client.prompt_reading import (
    as_prompt,
    read_prompt,
    read_visuals,
    show_images,
)
from kvstrata.client.request import GenerateOptions
from kvstrata.client.results import Completion
from kvstrata.client.sync_client import Client, Stream
from kvstrata.client.terminal import (
    DEFAULT_ADDRESS,
    Address,
    Json,
    TlsCa,
    TlsCert,
    TlsKey,
    credentials,
    run,
)
from kvstrata.protos.errors import printable

app = typer.Typer(
    name="kvstrata",
    cls=PluginGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvstrata {version('kvstrata')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """KVStrata: a distributed KV cache for large language models."""


@app.command()
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; - reads it from stdin, as it is.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Read the prompt from this file.", exists=True, dir_okay=False),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="A PNG or JPEG file; a folder of them is a video. May be repeated. Each has its "
            "place where the prompt has the model's placeholder, or all before it.",
            exists=True,
        ),
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    preset: Annotated[
        str | None, typer.Option(help="Cache preset; the server's default if absent.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="At most this many new tokens.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy, the default.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Nucleus sampling, above 0 and at most 1.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Sample from the k likeliest; 0 is off.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop at this text; may be repeated.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user's message.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    coarsest: Annotated[
        str | None,
        typer.Option(help="Stratum to read down to, such as base, if the first token is late."),
    ] = None,
    first_token_s: Annotated[
        float | None, typer.Option(help="When the first token is wanted, in seconds.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Time limit in seconds.")] = 120.0,
    tls_ca: TlsCa = "",
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    json_output: Json = False,
) -> None:
    """Continue a prompt; text goes to stdout as it comes, a line about the cache to stderr."""
    options: GenerateOptions = {
        "preset": preset,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
        "stop": stop,
        "coarsest": cast(StratumName | None, coarsest),
        "first_token_s": first_token_s,
    }
    text = read_prompt(prompt, file)
    options["images"] = images = read_visuals(image or [])
    shown = credentials(tls_ca, tls_cert, tls_key)
    with Client(address, timeout_s=timeout, credentials=shown) as client:
        if images:
            text = show_images(text, client.model().placeholder, len(images))
        asked = as_prompt(text, chat=chat, system=system)
        start_s = time.monotonic()
        with client.stream(asked, **options) as stream:
            write: Callable[[str], None] = (lambda _: None) if json_output else _write
            times = _follow(stream, start_s, write)
            completion = stream.completion
    if json_output:
        typer.echo(json.dumps({**completion.to_dict(), **times}, ensure_ascii=False))
    else:
        if not completion.text.endswith("\n"):
            typer.echo()
        typer.echo(summary(completion, times), err=True)


def summary(completion: Completion, times: dict[str, Any]) -> str:
    """Return the line about the cache and the speed of one request."""
    cache = completion.cache
    found = f"cache: {cache.cached_tokens} of {cache.shareable_tokens} shareable tokens"
    if cache.cached_tokens:
        found += f" ({cache.cached_fraction:.0%}) from {cache.tier}, {cache.precision}"
    parts = [found, f"{cache.committed_blocks} blocks committed"]
    parts += [f"{again.tokens} recomputed ({again.reason})" for again in cache.recomputes]
    speed = f"{completion.usage.completion_tokens} tokens"
    if times["ttft_s"] is not None:
        speed += f", first after {times['ttft_s']:.3f} s"
    if times["tpot_s"] is not None:
        speed += f", then {times['tpot_s'] * 1000:.1f} ms each"
    return printable("; ".join([*parts, speed]))


def _follow(stream: Stream, start_s: float, write: Callable[[str], None]) -> dict[str, Any]:
    """Read ``stream`` to its end; return time to first token and time per token after it."""
    first_s = last_s = None
    first_tokens = tokens = 0
    for chunk in stream:
        last_s = time.monotonic()
        tokens += len(chunk.token_ids)
        if first_s is None:
            first_s, first_tokens = last_s, tokens
        write(chunk.text)
    if first_s is None or last_s is None:
        return {"ttft_s": None, "tpot_s": None}
    later = tokens - first_tokens
    return {"ttft_s": first_s - start_s, "tpot_s": (last_s - first_s) / later if later else None}


def _write(text: str) -> None:
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def main() -> None:
    """Run the ``kvstrata`` command."""
    run(app)
