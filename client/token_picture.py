"""How a block keeps its tokens, drawn for a terminal: a row a layer, a column a token."""

from typing import Any

from rich.text import Text

SHADES = " ▁▂▃▄▅▆▇█"
NUM_TOKENS = 64
LEGEND = "E escape   # mid in all heads   + in most   - in some   . base   x dropped in all"


def saliency_rows(layers: list[dict[str, Any]]) -> list[tuple[str, Text]]:
    """Return one bar a token and layer, taller is more attended; blank is unknown.

    Saliency is a logarithm, so bars are shares of the block's own range, not of the maximum.
    """
    known = [code for layer in layers for code in layer["saliency"] if code]
    if not known:
        return []
    lowest, span = min(known), max(1, max(known) - min(known))
    steps = len(SHADES) - 2
    rows = []
    for layer in layers:
        bars = "".join(
            SHADES[1 + round((code - lowest) / span * steps)] if code else " "
            for code in layer["saliency"]
        )
        rows.append((f"layer {layer['layer']}", Text(bars, "cyan")))
    return rows


def class_rows(layers: list[dict[str, Any]]) -> list[tuple[str, Text]]:
    """Return one letter a token and layer, over all KV heads and K and V together."""
    return [(f"layer {layer['layer']}", _classes(_masks(layer), None)) for layer in layers]


def head_rows(layer: dict[str, Any]) -> list[tuple[str, Text]]:
    """Return one letter a token for K and V of each KV head of one layer."""
    masks = _masks(layer)
    heads = len(masks["escape"]) // 2
    return [
        (f"{side} head {head}", _classes(masks, index * heads + head))
        for index, side in enumerate("KV")
        for head in range(heads)
    ]


def _masks(layer: dict[str, Any]) -> dict[str, list[int]]:
    return {name: [int(mask, 16) for mask in layer[name]] for name in ("escape", "mid", "dropped")}


def _classes(masks: dict[str, list[int]], row: int | None) -> Text:
    """Return the letters of one row of masks, or of all of them together."""
    chosen = {name: rows if row is None else [rows[row]] for name, rows in masks.items()}
    text = Text()
    for token in range(NUM_TOKENS):
        count = {name: sum(mask >> token & 1 for mask in rows) for name, rows in chosen.items()}
        total = len(chosen["escape"])
        text.append(*_letter(count["escape"], count["mid"], count["dropped"], total))
    return text


def _letter(escapes: int, mids: int, dropped: int, total: int) -> tuple[str, str]:
    """Return the letter and its style."""
    if escapes:
        return "E", "bold red"
    if dropped == total:
        return "x", "dim"
    if mids == total:
        return "#", "yellow"
    if mids:
        return ("+" if mids * 2 >= total else "-"), "yellow"
    return ".", "default"
