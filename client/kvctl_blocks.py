"""The subcommands of ``kvctl`` that are about blocks."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvstrata.client import block_tables, tables
from kvstrata.client.admin import Admin, parse_key
from kvstrata.client.admin_command import Key, Keys, Timeout, parse_scope, show
from kvstrata.client.explanation import explanation_dict
from kvstrata.client.prompt_reading import as_prompt, read_prompt
from kvstrata.client.request import build_request
from kvstrata.client.terminal import DEFAULT_ADDRESS, FAILED, Address, Json
from kvstrata.client.validation import check_integer
from kvstrata.protos.admin_pb2 import ExplainRequest
from kvstrata.protos.errors import InvalidRequestError, InvalidTokenError
from kvstrata.protos.identity import BLOCK_TOKENS, ScopeDigest, block_hashes

Prompt = Annotated[
    str | None, typer.Argument(help="The prompt, asked of a gateway; - reads stdin, as it is.")
]
PromptFile = Annotated[
    Path | None,
    typer.Option("--file", help="Read the prompt from this file.", exists=True, dir_okay=False),
]
Preset = Annotated[str | None, typer.Option(help="Cache preset; the server's default if absent.")]
Chat = Annotated[bool, typer.Option("--chat", help="The prompt is a user's message.")]
System = Annotated[str | None, typer.Option(help="System message; implies --chat.")]
TokenIds = Annotated[
    str, typer.Option(help="Token ids with commas, in place of text; --scope asks a store.")
]
Scope = Annotated[str, typer.Option(help="Scope of the token ids, 32 hex digits.")]
TenantName = Annotated[str, typer.Option("--tenant", help="Whose prompt it is; default: yours.")]
Tier = Annotated[str, typer.Option(help="Only this tier; else all.")]


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
    wanted = parse_scope(scope)
    with Admin(address, timeout, ctx.obj) as admin:
        show(admin.list_blocks(limit, wanted), json_output, tables.show_blocks)


def inspect(
    ctx: typer.Context,
    key: Key,
    tokens: Annotated[bool, typer.Option(help="Draw how each token is kept.")] = True,
    layer: Annotated[
        int | None, typer.Option(help="Draw this layer head by head instead of all layers.")
    ] = None,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """Show everything about one block except its values, its tokens as a picture."""
    block_key = parse_key(key)
    with Admin(address, timeout, ctx.obj) as admin:
        found = admin.inspect(block_key, tokens)
    if layer is not None and layer not in [row["layer"] for row in found.get("layers", [])]:
        raise InvalidRequestError(
            f"the block shows no layer {layer}", "leave --layer out to see which there are"
        )
    show(found, json_output, lambda block: block_tables.show_block(block, layer))


def lookup(
    ctx: typer.Context,
    prompt: Prompt = None,
    file: PromptFile = None,
    preset: Preset = None,
    chat: Chat = False,
    system: System = None,
    token_ids: TokenIds = "",
    scope: Scope = "",
    tenant: TenantName = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    json_output: Json = False,
) -> None:
    """Tell how much of a prompt is cached, and where; counted as no lookup and no use."""
    request = _question(prompt, file, preset, chat, system, token_ids, scope, tenant)
    with Admin(address, timeout, ctx.obj) as admin:
        found = explanation_dict(admin.explain(request))
    run = [block for block in found["blocks"] if block["state"] == "cached"]
    fields = ("run", "num_blocks", "cached_tokens", "prompt_tokens", "codec", "scope", "degraded")
    show(
        {**{field: found[field] for field in fields}, "blocks": run},
        json_output,
        block_tables.show_run,
    )


def explain(
    ctx: typer.Context,
    prompt: Prompt = None,
    file: PromptFile = None,
    preset: Preset = None,
    chat: Chat = False,
    system: System = None,
    token_ids: TokenIds = "",
    scope: Scope = "",
    tenant: TenantName = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 30.0,
    json_output: Json = False,
) -> None:
    """Tell which block of a prompt would miss and why: evicted when and by what, another scope."""
    request = _question(prompt, file, preset, chat, system, token_ids, scope, tenant)
    with Admin(address, timeout, ctx.obj) as admin:
        found = explanation_dict(admin.explain(request))
    show(found, json_output, block_tables.show_explanation)


def _question(
    prompt: str | None,
    file: Path | None,
    preset: str | None,
    chat: bool,
    system: str | None,
    token_ids: str,
    scope: str,
    tenant: str,
) -> ExplainRequest:
    """Return what to ask: of a gateway about a prompt, of a store about blocks."""
    ids = _parse_token_ids(token_ids) if token_ids else []
    wanted = parse_scope(scope)
    if not ids:
        if wanted:
            raise InvalidRequestError("--scope goes with --token-ids", "give both, or a prompt")
        text = as_prompt(read_prompt(prompt, file), chat=chat, system=system)
        return ExplainRequest(prompt=build_request(text, {"preset": preset}), tenant=tenant)
    if prompt is not None or file is not None:
        raise InvalidRequestError("a prompt and --token-ids are both given", "give one")
    if not wanted:
        return ExplainRequest(prompt=build_request(ids, {"preset": preset}), tenant=tenant)
    hashes = block_hashes(ScopeDigest(wanted), ids)
    return ExplainRequest(
        scope=wanted,
        block_hashes=b"".join(hashes),
        token_ids=ids[:BLOCK_TOKENS] if hashes else (),
        tenant=tenant,
    )


def _parse_token_ids(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    bad = next((part for part in parts if not part.isdecimal() or int(part) >= 2**32), None)
    if bad is not None:
        raise InvalidTokenError(f"not a token id: {bad[:40]!r}", "give numbers with commas")
    return [int(part) for part in parts]


def pin(
    ctx: typer.Context,
    keys: Keys,
    ttl: Annotated[
        float, typer.Option(help="For how many seconds, up to the server's limit.")
    ] = 600.0,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """Exempt blocks from eviction for a while; exits 1 if one is not there."""
    block_keys = [parse_key(key) for key in keys]
    with Admin(address, timeout, ctx.obj) as admin:
        found = admin.pin(block_keys, ttl)
    show(found, json_output, block_tables.show_pinned)
    if found["missing"]:
        raise typer.Exit(FAILED)


def unpin(
    ctx: typer.Context,
    keys: Keys,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 10.0,
    json_output: Json = False,
) -> None:
    """End pins early, whoever set them."""
    block_keys = [parse_key(key) for key in keys]
    with Admin(address, timeout, ctx.obj) as admin:
        show(admin.unpin(block_keys), json_output, block_tables.show_unpinned)


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
        show(admin.evict(block_keys, tier), json_output, tables.show_evicted)


def move(
    ctx: typer.Context,
    keys: Keys,
    target: Annotated[str, typer.Option("--to", help="The tier to copy them into.")],
    source: Annotated[
        str, typer.Option("--from", help="The tier to remove them from; else they stay everywhere.")
    ] = "",
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 60.0,
    json_output: Json = False,
) -> None:
    """Move blocks between tiers; exits 1 if one was not moved, and says why."""
    block_keys = [parse_key(key) for key in keys]
    with Admin(address, timeout, ctx.obj) as admin:
        found = admin.move(block_keys, source, target)
    show(found, json_output, block_tables.show_moved)
    if found["problems"]:
        raise typer.Exit(FAILED)


def verify(
    ctx: typer.Context,
    keys: Annotated[
        list[str] | None, typer.Argument(help="Only these blocks; else every block.")
    ] = None,
    tier: Tier = "",
    repair: Annotated[bool, typer.Option("--repair", help="Delete what is damaged.")] = False,
    address: Address = DEFAULT_ADDRESS,
    timeout: Timeout = 3600.0,
    json_output: Json = False,
) -> None:
    """Check the checksums of everything; exits 1 if something is damaged or could not be read."""
    block_keys = [parse_key(key) for key in keys or ()]
    damaged: list[dict[str, Any]] = []
    last: dict[str, Any] = {"done": False}
    console = Console(stderr=True)
    with (
        Admin(address, timeout, ctx.obj) as admin,
        console.status("verifying", spinner="dots") as status,
    ):
        for last in admin.verify(block_keys, tier, repair, timeout):
            damaged += last["damaged"]
            if sys.stderr.isatty():
                status.update(block_tables.progress_text(last))
    found = {**last, "damaged": damaged, "repaired": repair}
    show(found, json_output, block_tables.show_verified)
    if damaged or not found["done"] or found["unavailable"]:
        raise typer.Exit(FAILED)
