"""What ``kvctl`` prints for people about blocks, drawn from the dictionaries of ``admin``."""

from typing import Any

from rich.table import Table
from rich.text import Text

from kvstrata.client.tables import add, draw, line, retention_text, right, size
from kvstrata.client.token_picture import LEGEND, class_rows, head_rows, saliency_rows

_HEADER_ROWS = {
    "encoding id": "encoding_id",
    "profile": "profile",
    "parent": "parent_hash",
    "rope": "rope",
    "dtype": "kv_dtype",
    "KV heads": "num_kv_heads",
    "head dim": "head_dim",
    "first position": "first_position",
    "tokens": "num_tokens",
}
_STYLES = {"cached": "green", "unreachable": "yellow", "missing": "red"}


def show_block(found: dict[str, Any], layer: int | None = None) -> None:
    """Print one block, the header of each stratum, and how its tokens are kept."""
    line(f"{found['key']}{' (pinned)' if found['pinned'] else ''}")
    line(f"{size(found['bytes'])} in {', '.join(found['tiers'])}")
    if kept := retention_text(found):
        line(f"priority {kept}")
    table = Table("", *(header["stratum"] for header in found["headers"]))
    headers = found["headers"]
    add(table, "frame bytes", *(found["strata"].get(h["stratum"], "") for h in headers))
    add(table, "codec", *(f"{h['codec']}/{h['codec_version']}" for h in headers))
    add(table, "layers", *(f"{len(h['layers'])} of {h['num_layers']}" for h in headers))
    for title, key in _HEADER_ROWS.items():
        add(table, title, *(header[key] for header in headers))
    add(table, "attachments", *(", ".join(h["attachments"]) for h in headers))
    draw(table)
    if found.get("tokens_unknown"):
        line(f"tokens: {found['tokens_unknown']}")
    layers = found.get("layers", [])
    if layers:
        _draw_rows("saliency of the 64 tokens (taller is more attended)", saliency_rows(layers))
        chosen = next((row for row in layers if row["layer"] == layer), None)
        if chosen:
            _draw_rows(f"layer {layer}, head by head: {LEGEND}", head_rows(chosen))
        else:
            _draw_rows(f"tokens: {LEGEND}", class_rows(layers))


def _draw_rows(title: str, rows: list[tuple[str, Text]]) -> None:
    if not rows:
        return
    line(title)
    picture = Table.grid(padding=(0, 1))
    for name, cells in rows:
        picture.add_row(Text(name), cells)
    draw(picture)


def show_run(found: dict[str, Any]) -> None:
    """Print how much of a prompt is cached."""
    tokens = f" of {found['prompt_tokens']}" if found["prompt_tokens"] else ""
    line(
        f"{found['run']} of {found['num_blocks']} blocks cached, "
        f"{found['cached_tokens']}{tokens} tokens"
        f"{'; a tier does not answer' if found['degraded'] else ''}"
    )
    for block in found["blocks"]:
        strata = "+".join(block["strata"])
        line(f"  {block['index']:>4}  {block['key']}  {strata}  {','.join(block['tiers'])}")


def show_explanation(found: dict[str, Any]) -> None:
    """Print the verdict, then a line for each block and each other scope."""
    line(found["why"])
    if found["codec"]:
        line(f"asked for: {found['codec']} {found['settings']}, {found['kv_dtype']} KV")
    if found["blocks"]:
        table = Table(*right("block", "token"), "state", "why", "key")
        for block in found["blocks"]:
            cells = (block["index"], block["first_token"], block["state"], block["why"])
            add(table, *cells, block["key"].partition(".")[2][:12])
            table.rows[-1].style = _STYLES[block["state"]]
        draw(table)
    for other in found["others"]:
        run = f", {other['run']} blocks of this prompt" if other["run"] else ""
        line(f"also stored under scope {other['scope']}{run}: {'; '.join(other['differs'])}")


def show_pinned(found: dict[str, Any]) -> None:
    """Print how many blocks are pinned, and which are not there."""
    line(f"{found['pinned']} pinned, {len(found['missing'])} not there")
    for key in found["missing"]:
        line(f"  not there: {key}")


def show_unpinned(found: dict[str, Any]) -> None:
    """Print how many blocks are pinned no more."""
    line(f"{found['unpinned']} unpinned")


def show_moved(found: dict[str, Any]) -> None:
    """Print how many blocks were moved, and why others were not."""
    line(f"{found['moved']} moved, {len(found['problems'])} not")
    for key, reason in found["problems"].items():
        line(f"  {key}: {reason}")


def progress_text(found: dict[str, Any]) -> str:
    """Return one line about a verification that runs."""
    return (
        f"{found['checked_blocks']} of {found['total_blocks']} blocks, "
        f"{size(found['checked_bytes'])}, {found['num_damaged']} damaged strata"
    )


def show_verified(found: dict[str, Any]) -> None:
    """Print what was checked, and what is damaged."""
    line(progress_text(found))
    if found["num_undecryptable"]:
        line(f"{found['num_undecryptable']} strata are encrypted with a key that is not here")
    for damage in found["damaged"]:
        done = "deleted" if found["repaired"] else "damaged"
        line(f"  {done}: {damage['key']} {damage['stratum']} in {damage['tier']}: {damage['what']}")
    for tier in found["unavailable"]:
        line(f"  tier {tier} did not answer")
    line("done" if found["done"] else "not finished")
