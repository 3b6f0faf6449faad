"""The identity of a model as far as its KV goes: 16 bytes, equal on every machine.

Two processes may share stored KV only if their fingerprints are equal. It covers the bytes of the
weight files, the config fields that change K or V, and the dtype; not paths, names, the tokenizer
or the version of any library.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kvstrata.engine.storage import cache_folder, write_atomically

FINGERPRINT_BYTES = 16

_CONFIG_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "rope_parameters",
    "attention_bias",
    "mlp_bias",
    "max_position_embeddings",
    # OPT
    "activation_function",
    "do_layer_norm_before",
    "_remove_final_layer_norm",
    "enable_bias",
    "ffn_dim",
    "layer_norm_elementwise_affine",
    "word_embed_proj_dim",
)


def compute_fingerprint(weights: Sequence[Path], config: Any, dtype: torch.dtype | None) -> bytes:
    """Return the first 16 bytes of a SHA-256 over weights, config and dtype.

    Args:
        weights: The files the weights are read from, in a fixed order; their names do not count.
        config: A transformers config.
        dtype: The weights are served in; None leaves it out, which names the model as such.
    """
    fields = {name: getattr(config, name, None) for name in _CONFIG_FIELDS}
    fields["rope_parameters"] = _canonical_rope(fields["rope_parameters"])
    identity = {
        "config": {name: value for name, value in fields.items() if value is not None},
        **({} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}),
        "weights": [hash_file(path) for path in weights],
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()[:FINGERPRINT_BYTES]


def _canonical_rope(rope: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the parameters without what means nothing, for versions differ in spelling it out."""
    if rope is None:
        return None
    return {
        name: float(value) if isinstance(value, int) else value
        for name, value in rope.items()
        if value is not None and (name, value) != ("partial_rotary_factor", 1)
    }


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex.

    Remembered in the cache folder under path, inode, size and both times (ns), so a large model is
    read once and not at each start. An unwritable cache folder costs only the time.
    """
    stat = path.stat()
    facts = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    key = "\0".join([str(path.resolve()), *map(str, facts)])
    note = cache_folder() / "hashes" / hashlib.sha256(key.encode()).hexdigest()
    try:
        digest = note.read_text()
        if len(digest) == 64:
            return digest
    except OSError:
        pass
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    write_atomically(note, digest)
    return digest
