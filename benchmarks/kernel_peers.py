"""quanto's and hqq's 4-bit quantisers, through transformers' cache layers, as peers of ours.

Each is called layer by layer, as transformers does, on bf16; ``INSTALL`` says how to get them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from codec_caches import BACKENDS, GROUP
from kernel_rounds import Entry
from kernel_shapes import Shape

INSTALL = "make peers-codec"
BITS = 4
# hqq's optimiser takes a second for a megabyte, so it gets one layer to encode.
HQQ = "hqq"


def missing_peers() -> list[str]:
    """Return the peers that cannot run here."""
    return [name for name in BACKENDS if _maker(name) is None]


def peer_entries(shape: Shape, blocks: int) -> tuple[list[Entry], list[Entry]]:
    """Return the entries that encode, and those that decode, noise of a shape."""
    encoders, decoders = [], []
    for name in BACKENDS:
        make = _maker(name)
        if make is None:
            continue
        few = 1 if name == HQQ else shape.layers
        pairs = [
            (shape.tokens(1, blocks).flatten(2, 3), shape.tokens(1, blocks).flatten(2, 3))
            for _ in range(few)
        ]
        size = sum(2 * tensor.numel() for pair in pairs for tensor in pair)
        impl = f"{name}-{BITS}"
        encoders.append(Entry(impl, partial(_encode, make, pairs), size))
        # Codes of one layer serve for all: what they say does not matter to the speed.
        done = _encode(make, pairs) * (shape.layers // few)
        decoders.append(Entry(impl, partial(_decode, done), size * (shape.layers // few)))
    return encoders, decoders


def _maker(name: str) -> Callable[[], Any] | None:
    import transformers.cache_utils

    layer, axes = BACKENDS[name]
    make = partial(
        getattr(transformers.cache_utils, layer),
        nbits=BITS,
        q_group_size=GROUP,
        residual_length=128,
        **axes,
    )
    try:
        make()
    except ImportError:
        return None
    return make


def _encode(
    make: Callable[[], Any], pairs: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[tuple[Any, Any]]:
    done = []
    for keys, values in pairs:
        layer = make()
        layer.update(keys, values)
        done += [(layer, layer._quantized_keys), (layer, layer._quantized_values)]
    return done


def _decode(done: list[tuple[Any, Any]]) -> None:
    for layer, codes in done:
        layer._dequantize(codes)
