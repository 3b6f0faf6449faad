"""Why a prompt hits or misses, in words: from what became of its blocks."""

import time
from collections.abc import Sequence
from typing import Any

from kvstrata.client.admin import listing_dict
from kvstrata.protos import admin_pb2
from kvstrata.protos.identity import BLOCK_TOKENS

_REASONS = {
    "capacity": "evicted from {tier} {ago}, to make room",
    "quota": "given up {ago}, to keep its tenant's quota of bytes",
    "admin": "evicted from {tier} {ago}, by an operator",
    "deleted": "deleted {ago}, by its tenant",
    "corrupt": "found damaged in {tier} {ago}, and deleted there",
    "ttl": "expired in {tier} {ago}: nobody had used it for its time to live",
    "lost": "lost by {tier}, seen {ago}: another hand or {tier}'s own eviction took it",
    "moved": "moved away from {tier} {ago}",
}
_READABLE = ({"base"}, {"exact"})


def explanation_dict(
    reply: admin_pb2.ExplainReply, now_unix_s: float | None = None
) -> dict[str, Any]:
    """Return the reply with a state and a sentence for each block, and one for the whole.

    A block is "cached"; "unreachable", because one before it is missing; or "missing".
    """
    now_s = time.time() if now_unix_s is None else now_unix_s
    blocks = [_block(index, block, reply, now_s) for index, block in enumerate(reply.blocks)]
    others = [_other(other, reply) for other in reply.others]
    found = {
        "run": reply.run,
        "num_blocks": len(blocks),
        "cached_tokens": reply.run * BLOCK_TOKENS,
        "prompt_tokens": reply.prompt_tokens,
        "preset": reply.preset,
        "codec": reply.codec,
        "settings": reply.settings,
        "kv_dtype": reply.kv_dtype,
        "scope": reply.scope.hex(),
        "degraded": reply.degraded,
        "blocks": blocks,
        "others": others,
    }
    return {**found, "why": _verdict(found)}


def _block(
    index: int, block: admin_pb2.BlockState, reply: admin_pb2.ExplainReply, now_s: float
) -> dict[str, Any]:
    listing = listing_dict(block.listing)
    strata = set(listing["strata"])
    is_readable = any(needed <= strata for needed in _READABLE)
    if index < reply.run:
        state, why = "cached", f"in {', '.join(listing['tiers'])}"
    elif is_readable:
        state = "unreachable"
        why = f"in {', '.join(listing['tiers'])}, but block {reply.run} before it is missing"
    else:
        state, why = "missing", _why_missing(block, strata, reply, now_s)
    return {
        "index": index,
        "first_token": index * BLOCK_TOKENS,
        "state": state,
        "why": why,
        "key": listing["key"],
        "tiers": listing["tiers"],
        "strata": listing["strata"],
        "pinned": listing["pinned"],
        "departures": [
            {"tier": d.tier, "reason": d.reason, "unix_s": d.unix_s} for d in block.departures
        ],
    }


def _why_missing(
    block: admin_pb2.BlockState, strata: set[str], reply: admin_pb2.ExplainReply, now_s: float
) -> str:
    if strata:
        return f"its base is gone, {'+'.join(sorted(strata))} alone cannot be read"
    if not block.departures:
        since = ago(reply.remembers_since_unix_s, now_s)
        return f"never stored here, or gone before what the store remembers, which began {since}"
    last = block.departures[-1]
    tier = last.tier or "all tiers"
    refused, _, kind = last.reason.partition(": ")
    if refused == "rejected":
        return f"refused when it was put {ago(last.unix_s, now_s)}: {kind}"
    text = _REASONS.get(last.reason, f"{last.reason} {{ago}}")
    return text.format(tier=tier, ago=ago(last.unix_s, now_s))


def _other(other: admin_pb2.OtherScope, reply: admin_pb2.ExplainReply) -> dict[str, Any]:
    """Return where the same tokens are stored otherwise, and in which of the scope's fields."""
    header = other.header
    differs: list[str] = []
    codec = f"{header.codec}/{header.codec_version}" if header.codec else ""
    if other.preset:
        differs.append(f"preset: {other.preset}, not {reply.preset or 'the default'}")
    if codec and reply.codec and codec != reply.codec:
        differs.append(f"codec: {codec}, not {reply.codec}")
    if header.kv_dtype and reply.kv_dtype and header.kv_dtype != reply.kv_dtype:
        differs.append(f"dtype: {header.kv_dtype}, not {reply.kv_dtype}")
    return {
        "scope": other.scope.hex(),
        "preset": other.preset,
        "run": other.run,
        "codec": codec,
        "kv_dtype": header.kv_dtype,
        "differs": differs or ["model, codec settings, adapter or tenant"],
    }


def _verdict(found: dict[str, Any]) -> str:
    blocks: Sequence[dict[str, Any]] = found["blocks"]
    if not blocks:
        return f"no full block of {BLOCK_TOKENS} tokens: nothing of this prompt can be shared"
    if found["run"] == len(blocks):
        return "every full block is cached"
    first = blocks[found["run"]]
    text = f"block {first['index']} (tokens from {first['first_token']} on): {first['why']}"
    if found["degraded"]:
        text += "; a tier does not answer, so more may be cached than is told"
    if not found["run"] and found["others"]:
        text += f"; the same tokens are stored with another {found['others'][0]['differs'][0]}"
    return text


def ago(unix_s: float, now_s: float) -> str:
    """Return how long ago something was, as people say it.

    >>> ago(1000.0, 1003.2), ago(1000.0, 9000.0)
    ('3 s ago', '2 h 13 min ago')
    """
    seconds = max(0, int(now_s - unix_s))
    if seconds < 120:
        return f"{seconds} s ago"
    minutes, hours = seconds // 60, seconds // 3600
    if minutes < 120:
        return f"{minutes} min ago"
    return f"{hours} h {minutes % 60} min ago" if hours < 48 else f"{hours // 24} days ago"
