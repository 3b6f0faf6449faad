"""transformers' own quantised caches, quanto and hqq, as peers of ``bench_codec.py``.

Their layer classes quantise the whole prompt at once, as they do when a prefill hands it to them;
the residual window of 128 tokens is for what is generated later, so the prompt has none.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers.cache_utils
from codec_peers import Decoded, Encode, Encoded, Prompt

INSTALL = "pip install optimum-quanto hqq"
GROUP = 64
# transformers' default axis is 0 for both. For hqq its documentation advises 1, which is better.
BACKENDS = {
    "quanto": ("QuantoQuantizedLayer", {"axis_key": 0, "axis_value": 0}),
    "hqq": ("HQQQuantizedLayer", {"axis_key": 1, "axis_value": 1}),
}


def cache_peers() -> tuple[dict[str, Encode], dict[str, str]]:
    """Return the peers that can run here, and why each of the others cannot."""
    peers: dict[str, Encode] = {}
    missing: dict[str, str] = {}
    for backend, (name, axes) in BACKENDS.items():
        for bits in (4, 2):
            make = partial(
                getattr(transformers.cache_utils, name),
                nbits=bits,
                q_group_size=GROUP,
                residual_length=128,
                **axes,
            )
            try:
                make()
            except ImportError:
                missing[f"{backend}-{bits}"] = f"not installed here: {INSTALL}"
                continue
            # hqq's many small steps take ten times longer where two threads share busy cores.
            num_threads = 1 if backend == "hqq" else torch.get_num_threads()
            peers[f"{backend}-{bits}"] = partial(_encode, make=make, num_threads=num_threads)
    return peers, missing


def _encode(prompt: Prompt, make: Callable[[], Any], num_threads: int) -> Encoded:
    layers = []
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for keys, values in zip(prompt.keys, prompt.values, strict=True):
            layer = make()
            layer.update(keys[None].contiguous(), values[None].contiguous())
            layers.append(layer)
    finally:
        torch.set_num_threads(before)

    def decode() -> Decoded:
        keys = [layer._dequantize(layer._quantized_keys)[0] for layer in layers]
        values = [layer._dequantize(layer._quantized_values)[0] for layer in layers]
        return torch.stack(keys), torch.stack(values)

    stored = [(layer._quantized_keys, layer._quantized_values) for layer in layers]
    return Encoded(sum(_num_bits(tensor) for tensor in _tensors(stored)), decode)


def _num_bits(tensor: torch.Tensor) -> int:
    """Return the stored size; a float32 parameter counts as the 16 bits a bf16 model gives it."""
    return tensor.numel() * (16 if tensor.is_floating_point() else 8 * tensor.element_size())


def _tensors(held: Any) -> Iterator[torch.Tensor]:
    """Yield the plain tensors in what a backend holds for a layer, packed codes included."""
    if isinstance(held, torch.Tensor):
        inner = [getattr(held, k) for k in ("_data", "_scale", "_shift") if hasattr(held, k)]
        if inner:
            for part in inner:
                yield from _tensors(part)
        else:
            yield held
    elif isinstance(held, dict):
        for part in held.values():
            yield from _tensors(part)
    elif isinstance(held, list | tuple):
        for part in held:
            yield from _tensors(part)
