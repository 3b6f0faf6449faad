# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
"""Column sums to saliency on a CPU: one pass over a head's sums, a tile at a time.

Roofline: reads 4 G bytes and writes 4 per key and KV head, G + 3 operations; a copy's speed.
"""

import numpy as np
import torch

from kvstrata.kernels.compiled import kernel
from kvstrata.kernels.threads import for_ranges

_GRAIN_KEYS = 1 << 14
_TILE = 1024
_INFINITE = np.float32(np.inf)


def normalise_sums_numba(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return what ``normalise_sums_reference`` returns, up to the order of a sum."""
    num_layers, heads, group, num_keys = sums.shape
    scores = torch.empty((num_layers, heads, num_keys), dtype=torch.float32)
    source, seeing = sums.contiguous().view(-1).numpy(), counts.contiguous().numpy()
    target = scores.view(-1).numpy()

    def work(first: int, last: int) -> None:
        _normalise(source, seeing, group, num_keys, target, first, last)

    for_ranges(work, num_layers * heads, max(1, _GRAIN_KEYS // (group * num_keys + 1)))
    return scores


@kernel(error_model="numpy")
def _normalise(sums, counts, group, num_keys, out, first, last):
    """Write the scores of heads ``first`` to ``last``."""
    for head in range(first, last):
        to = head * num_keys
        least = _INFINITE
        for start in range(0, num_keys, _TILE):
            stop = min(start + _TILE, num_keys)
            at = head * group * num_keys
            for j in range(start, stop):
                out[to + j] = sums[at + j]
            for _ in range(1, group):
                at += num_keys
                for j in range(start, stop):
                    out[to + j] += sums[at + j]
            for j in range(start, stop):
                seen = np.float32(max(counts[j], 1))
                out[to + j] = out[to + j] / np.float32(group) / seen
            for j in range(start, stop):
                if counts[j] > 0 and out[to + j] < least:
                    least = out[to + j]
        for j in range(num_keys):
            if counts[j] == 0:
                out[to + j] = least
