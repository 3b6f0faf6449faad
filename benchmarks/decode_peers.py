"""Decoding with transformers' ``generate``: a cache in the model's dtype, or a quantised one."""

import copy
import importlib.util
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

CHUNK = 512  # the prompt's rows at once: a whole prompt's scores take gigabytes


class Clock(transformers.StoppingCriteria):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        """Never stop."""
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@torch.inference_mode()
def prefill(model: Any, prompt: Sequence[int]) -> transformers.DynamicCache:
    """Return the cache of all tokens but the last."""
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.tensor([prompt[:-1]])
    for chunk in ids.split(CHUNK, 1):
        model(chunk, past_key_values=cache, logits_to_keep=1)
    return cache


def repeated(dense: transformers.DynamicCache, batch: int) -> transformers.DynamicCache:
    """Return a prompt's cache, once for each sequence of a batch."""
    own = copy.deepcopy(dense)
    own.batch_repeat_interleave(batch)
    return own


@torch.inference_mode()
def decode(
    model: Any, cache: Any, prompt: Sequence[int], batch: int, num_tokens: int
) -> tuple[list[float], int]:
    """Return when each step's tokens came, and the bytes at the end of a cache for the batch."""
    clock = Clock()
    ids = torch.tensor([list(prompt)] * batch)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        stopping_criteria=transformers.StoppingCriteriaList([clock]),
    )
    return clock.times, sum(_bytes(layer) for layer in cache.layers)


def has_quanto() -> bool:
    """Tell whether the library behind transformers' quantised cache is installed."""
    try:
        return importlib.util.find_spec("optimum.quanto") is not None
    except ModuleNotFoundError:
        return False


def quantised(model: Any, dense: transformers.DynamicCache, nbits: int) -> Any:
    """Return a copy of a cache as transformers' quantised cache of quanto."""
    cache = transformers.QuantizedCache(
        "quanto", model.config, nbits=nbits, residual_length=128, axis_key=0, axis_value=0
    )
    for index, layer in enumerate(dense.layers):
        cache.update(layer.keys, layer.values, index)
    return cache


def _bytes(layer: Any) -> int:
    parts = [layer.keys, layer.values]
    for name in ("_quantized_keys", "_quantized_values"):
        held = getattr(layer, name, None)
        if held is not None:
            parts += [held._data._data, held._scale, held._shift]
    return sum(part.numel() * part.element_size() for part in parts)
