"""The ``kvctl`` command: look into a running gateway or store, and act on its blocks."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from kvstrata.client import kvctl_blocks, tables
from kvstrata.client.admin import Admin
from kvstrata.client.admin_command import Timeout, show
from kvstrata.client.plugins import AdminPluginGroup
from kvstrata.client.terminal import (
    DEFAULT_ADDRESS,
    FAILED,
    Address,
    Json,
    TlsCa,
    TlsCert,
    TlsKey,
    credentials,
    report,
    run,
)
from kvstrata.client.top import watch
from kvstrata.client.validation import check_integer, check_seconds
from kvstrata.protos.errors import DeadlineError, InvalidRequestError, UnavailableError
from kvstrata.protos.sizes import parse_size

app = typer.Typer(
    cls=AdminPluginGroup,
    help="Look into a running KVStrata gateway or store, and act on its blocks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root(
    ctx: typer.Context, tls_ca: TlsCa = "", tls_cert: TlsCert = "", tls_key: TlsKey = ""
) -> None:
    ctx.obj = credentials(tls_ca, tls_cert, tls_key)


def stats(
    ctx: typer.Context,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """Show tiers, hits, misses, times and counters since start."""
    with Admin(address, timeout, ctx.obj) as admin:
        show(admin.stats(), json_output, tables.show_stats)


def top(
    ctx: typer.Context,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 2.0,
    count: Annotated[int, typer.Option(help="End after so many; 0 goes on until Ctrl-C.")] = 0,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Annotated[
        bool, typer.Option("--json", help="Print one JSON object an interval.")
    ] = False,
) -> None:
    """Show live what the server does: hits, misses, bytes, calls and tiers."""
    check_seconds("--interval", interval)
    check_integer("--count", count, 0, 2**31)
    with Admin(address, timeout, ctx.obj) as admin:
        watch(admin.stats, interval, count, json_output)


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
    show(found, json_output, tables.show_health)
    if not found["ok"]:
        raise typer.Exit(FAILED)


def quota(
    ctx: typer.Context,
    tenant: Annotated[str, typer.Argument(help="The tenant; all without it.")] = "",
    quota_bytes: Annotated[
        str, typer.Option("--bytes", help="Bytes of blocks, such as 10GiB; 0 is no limit.")
    ] = "",
    requests_per_s: Annotated[
        float | None, typer.Option(help="Calls a second; 0 is no limit.")
    ] = None,
    in_flight: Annotated[
        str, typer.Option(help="Bytes under way at once, such as 200MiB; 0 is no limit.")
    ] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """Show tenants' limits and use, or set limits until the file of tenants is read again."""
    limits: dict[str, float] = {}
    if quota_bytes:
        limits["quota_bytes"] = parse_size(quota_bytes)
    if requests_per_s is not None:
        limits["requests_per_s"] = requests_per_s
    if in_flight:
        limits["in_flight_bytes"] = parse_size(in_flight)
    if limits and not tenant:
        raise InvalidRequestError("limits for nobody", "name the tenant")
    with Admin(address, timeout, ctx.obj) as admin:
        show(admin.quota(tenant, limits), json_output, tables.show_quota)


def drain(
    ctx: typer.Context,
    timeout: Annotated[float, typer.Option(help="Seconds that running work may take.")] = 30.0,
    address: Address = DEFAULT_ADDRESS,
    json_output: Json = False,
) -> None:
    """Stop the server from taking new work; exits 1 if work still runs when the time is over."""
    with Admin(address, 10.0, ctx.obj) as admin:
        found = admin.drain(timeout)
    show(found, json_output, tables.show_drained)
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


COMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "stats": (stats, "kvctl stats --json | jq .misses"),
    "top": (top, "kvctl top --interval 1"),
    "ls": (kvctl_blocks.ls, "kvctl ls --limit 20"),
    "inspect": (kvctl_blocks.inspect, "kvctl inspect KEY --layer 3"),
    "lookup": (kvctl_blocks.lookup, "kvctl lookup --file prompt.txt --preset exact"),
    "explain": (kvctl_blocks.explain, 'kvctl explain "You are a helpful assistant. ..."'),
    "pin": (kvctl_blocks.pin, "kvctl pin KEY --ttl 300"),
    "unpin": (kvctl_blocks.unpin, "kvctl unpin KEY"),
    "evict": (kvctl_blocks.evict, "kvctl evict --all --tier dram"),
    "move": (kvctl_blocks.move, "kvctl move KEY --from dram --to ssd"),
    "verify": (kvctl_blocks.verify, "kvctl verify --tier ssd --repair"),
    "quota": (quota, "kvctl quota alice --bytes 10GiB --requests-per-s 100"),
    "health": (health, "kvctl health --json"),
    "drain": (drain, "kvctl drain --timeout 60"),
}
for _name, (_function, _example) in COMMANDS.items():
    app.command(_name, epilog=f"Example: {_example}")(_function)


def main() -> None:
    """Run the ``kvctl`` command."""
    run(app)
