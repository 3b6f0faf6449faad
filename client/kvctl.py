"""The ``kvctl`` command: look into a running gateway or store, and act on its blocks."""

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvstrata.client import tables
from kvstrata.client.admin import Admin, parse_key
from kvstrata.client.terminal import (
    DEFAULT_ADDRESS,
    FAILED,
    Address,
    ErrorReportingGroup,
    Json,
    TlsCa,
    TlsCert,
    TlsKey,
    credentials,
    report,
    run,
)
from kvstrata.client.validation import check_integer
from kvstrata.protos.errors import DeadlineError, InvalidRequestError, UnavailableError
from kvstrata.protos.identity import HASH_BYTES

app = typer.Typer(
    cls=ErrorReportingGroup,
    help="Look into a running KVStrata gateway or store, and act on its blocks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Timeout = Annotated[float, typer.Option(help="Time limit in seconds.")]
Key = Annotated[str, typer.Argument(help="A block key as `kvctl ls` prints it.")]


@app.callback()
def _root(
    ctx: typer.Context, tls_ca: TlsCa = "", tls_cert: TlsCert = "", tls_key: TlsKey = ""
) -> None:
    ctx.obj = credentials(tls_ca, tls_cert, tls_key)


@app.command()
def stats(
    ctx: typer.Context,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """Show tiers, hits, misses and counters since start."""
    with Admin(address, timeout, ctx.obj) as admin:
        _show(admin.stats(), json_output, tables.show_stats)


@app.command()
def ls(
    ctx: typer.Context,
    limit: Annotated[int, typer.Option(help="At most this many blocks; 0 lists all.")] = 100,
    scope: Annotated[str, typer.Option(help="Only this scope, 32 hex digits.")] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """List blocks, most recently used first."""
    check_integer("--limit", limit, 0, 2**31)
    wanted = _parse_scope(scope)
    with Admin(address, timeout, ctx.obj) as admin:
        _show(admin.list_blocks(limit, wanted), json_output, tables.show_blocks)


@app.command()
def inspect(
    ctx: typer.Context,
    key: Key,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """Show everything about one block except its values."""
    block_key = parse_key(key)
    with Admin(address, timeout, ctx.obj) as admin:
        _show(admin.inspect(block_key), json_output, tables.show_block)


@app.command()
def health(
    ctx: typer.Context,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """Tell whether the server serves and is whole; exits 1 and says why where it is not."""
    try:
        with Admin(address, timeout, ctx.obj) as admin:
            found = _health(admin.serving_status(), admin.stats())
    except (UnavailableError, DeadlineError) as error:
        if not json_output:
            raise
        report(error)
        found = {"ok": False, "status": "UNREACHABLE", "health": "", "why": [error.message]}
    _show(found, json_output, tables.show_health)
    if not found["ok"]:
        raise typer.Exit(FAILED)


@app.command()
def evict(
    ctx: typer.Context,
    keys: Annotated[list[str] | None, typer.Argument(help="Block keys.")] = None,
    all_blocks: Annotated[bool, typer.Option("--all", help="Every block instead.")] = False,
    tier: Annotated[str, typer.Option(help="Only from this tier; else from all.")] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    json_output: Json = False,
) -> None:
    """Remove blocks from one tier or all; pinned ones stay and are counted."""
    if bool(keys) == all_blocks:
        raise InvalidRequestError(
            "keys and --all are both given" if keys else "no block is named",
            "name block keys, or say --all",
        )
    block_keys = [parse_key(key) for key in keys or ()]
    with Admin(address, timeout, ctx.obj) as admin:
        _show(admin.evict(block_keys, tier), json_output, tables.show_evicted)


@app.command()
def drain(
    ctx: typer.Context,
    timeout: Annotated[float, typer.Option(help="Seconds that running work may take.")] = 30.0,
    address: Address = DEFAULT_ADDRESS,
    json_output: Json = False,
) -> None:
    """Stop the server from taking new work; exits 1 if work still runs when the time is over."""
    with Admin(address, 10.0, ctx.obj) as admin:
        found = admin.drain(timeout)
    _show(found, json_output, tables.show_drained)
    if not found["drained"]:
        raise typer.Exit(FAILED)


def _health(status: str, found: dict[str, Any]) -> dict[str, Any]:
    why = [] if status == "SERVING" else [f"the health service says {status}"]
    if found["health"] != "ok":
        why.append(found["health"] or "the server tells no health")
    for name, tier in found["tiers"].items():
        if not tier["healthy"]:
            why.append(f"tier {name}: {tier['detail'] or 'not healthy'}")
    return {
        "ok": status == "SERVING" and found["health"] == "ok",
        "status": status,
        "health": found["health"],
        "why": why,
    }


def _parse_scope(text: str) -> bytes:
    try:
        scope = bytes.fromhex(text)
    except ValueError:
        scope = b"?"
    if len(scope) not in (0, HASH_BYTES):
        raise InvalidRequestError(
            f"not a scope (32 hex digits): {text[:80]!r}",
            "take the part of a block key before its dot",
        )
    return scope


def _show(found: dict[str, Any], as_json: bool, draw: Callable[[dict[str, Any]], None]) -> None:
    if as_json:
        typer.echo(json.dumps(found))
    else:
        draw(found)


def main() -> None:
    """Run the ``kvctl`` command."""
    run(app)
