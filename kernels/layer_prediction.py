"""Predicting a layer's keys and values from what a reader has already decoded.

Heads of one layer are decoded in a fixed order, V's and then K's. Each is predicted linearly from
all heads of the layer before and from those that precede it in its own layer:

    p = before @ across[layer] + own @ within[layer]

Encoder and decoder run this recursion over the same vectors, those of the BASE stratum: what MID
adds to a token is never predicted from, so that a reader of BASE alone and one of both have the
same prediction. An escaped token is not predicted: what is stored of it is all of it.

The definition sums in float64 and rounds once. The fast version adds float32 in one order for each
block, whatever the number of threads and of blocks, so both ends get equal numbers on one kind of
machine; on another they differ in the last bits. Nor could more do harm: decoding is linear in p,
no decision hangs on it.

Legend: L stored layers, H KV heads, N blocks of 64 tokens, D head_dim, C = 2 H D channels of a
layer, V's heads and then K's.

Source:
    Differential pulse code modulation with the quantiser in the loop, across layers instead of
    time: Jayant and Noll, Digital Coding of Waveforms (1984), chapter 6.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from kvstrata.kernels.backend import FLOATS, backend_of
from kvstrata.kernels.block_planes import KEPT_MULTIPLE
from kvstrata.kernels.huge_memory import empty_huge
from kvstrata.kernels.token_masks import TOKENS, check_masks, to_flags


@dataclass(frozen=True)
class LayerWeights:
    """What predicts one layer from another.

    Attributes:
        across: float16 (L, C, C): from the layer before, rows, to this one, columns.
        within: float16 (L, C, C): inside the layer; only rows of heads before the column's count.
        dim: D.
    """

    across: torch.Tensor
    within: torch.Tensor
    dim: int
    _made: dict[str, Any] = field(init=False, default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        layers, channels = self.across.shape[0], self.across.shape[-1]
        for name, table in (("across", self.across), ("within", self.within)):
            if table.dtype != torch.float16 or table.shape != (layers, channels, channels):
                raise ValueError(
                    f"{name} must be float16 ({layers}, {channels}, {channels}), "
                    f"not {table.dtype} {tuple(table.shape)}"
                )
        if self.dim < 1 or channels % (2 * self.dim):
            raise ValueError(f"{channels} channels are no two sides of heads of {self.dim}")

    @property
    def num_layers(self) -> int:
        """Return L."""
        return self.across.shape[0]

    @property
    def channels(self) -> int:
        """Return C."""
        return self.across.shape[-1]

    @property
    def heads(self) -> int:
        """Return H."""
        return self.channels // (2 * self.dim)

    def once(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what ``make`` returned at the first call with this key; tables do not change."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


class Step(NamedTuple):
    """One head's turn.

    Attributes:
        part: Number of the head in its layer, 0 to 2 H - 1.
        is_value: Whether it is one of V.
        head: Its number among those of its side in all layers, L * H.
    """

    part: int
    is_value: bool
    head: int


class Recursion(Protocol):
    """One pass over the layers of some blocks, from the first layer to the last."""

    def enter_next_layer(self) -> None:
        """Go on to the next layer, whose heads then follow in order."""
        ...

    def predict(self, part: int) -> torch.Tensor:
        """Return what head ``part`` of 2 H is predicted to be, float32 (N, 64, D)."""
        ...

    def put(self, part: int, vectors: torch.Tensor) -> None:
        """Tell what head ``part`` turned out to be at BASE, float32 (N, 64, D)."""
        ...


class ReferenceRecursion:
    """The definition; see ``Recursion``."""

    def __init__(self, weights: LayerWeights, num_blocks: int) -> None:
        """Start before the first layer."""
        self._weights, self._layer = weights, -1
        size = (num_blocks, TOKENS, weights.channels)
        self._current = torch.zeros(size, dtype=torch.float64)
        self._ahead, self._own = self._current, torch.empty(0)

    def enter_next_layer(self) -> None:
        """See ``Recursion.enter_next_layer``."""
        self._layer += 1
        if self._layer:
            self._ahead = self._current @ self._weights.across[self._layer].double()
        self._own = self._weights.within[self._layer].double()

    def predict(self, part: int) -> torch.Tensor:
        """See ``Recursion.predict``."""
        begin = part * self._weights.dim
        columns = slice(begin, begin + self._weights.dim)
        own = self._current[..., :begin] @ self._own[:begin, columns]
        return (self._ahead[..., columns] + own).float()

    def put(self, part: int, vectors: torch.Tensor) -> None:
        """See ``Recursion.put``."""
        begin = part * self._weights.dim
        self._current[..., begin : begin + self._weights.dim] = vectors


def steps(weights: LayerWeights, num_blocks: int) -> Iterator[tuple[Recursion, Step]]:
    """Yield the recursion and whose turn it is; the caller predicts and puts each head in order."""
    recursion: Recursion = ReferenceRecursion(weights, num_blocks)
    if _is_quick(weights):
        from kvstrata.kernels.layer_prediction_numba import NumbaRecursion

        recursion = NumbaRecursion(weights, num_blocks)
    yield from _turns(weights, recursion)


def _turns(weights: LayerWeights, recursion: Recursion) -> Iterator[tuple[Recursion, Step]]:
    heads = weights.heads
    for layer in range(weights.num_layers):
        recursion.enter_next_layer()
        for part in range(2 * heads):
            yield recursion, Step(part, part < heads, layer * heads + part % heads)


def _is_quick(weights: LayerWeights) -> bool:
    return backend_of(weights.across) == "numba" and weights.dim % KEPT_MULTIPLE == 0


class Rest(NamedTuple):
    """What is left of K or of V without its prediction.

    Attributes:
        base: float32 (L * H, N, 64, D), of the BASE stratum, from which others are predicted.
        fine: The same as precisely as it is read; may be the same tensor.
        escape: int64 masks (L * H, N), the tokens that are not predicted.
    """

    base: torch.Tensor
    fine: torch.Tensor
    escape: torch.Tensor


def add_predictions(
    keys: Rest, values: Rest, weights: LayerWeights, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values, ``dtype`` (L * H, N, 64, D), contiguous.

    Raises:
        ValueError: Shapes or types do not fit.
    """
    heads, num_blocks = weights.num_layers * weights.heads, keys.base.shape[1]
    size = (heads, num_blocks, TOKENS, weights.dim)
    for side in (keys, values):
        for rest in (side.base, side.fine):
            if rest.dtype != torch.float32 or rest.shape != size:
                raise ValueError(
                    f"the rest must be float32 {size}, not {rest.dtype} {tuple(rest.shape)}"
                )
        check_masks("escape masks", side.escape, heads, num_blocks)
    if dtype not in FLOATS:
        raise ValueError(f"tokens are decoded to bf16, fp16 or fp32, not {dtype}")
    out = [empty_huge(size, dtype) for _ in (keys, values)]
    if _is_quick(weights):
        from kvstrata.kernels.layer_prediction_numba import add_predictions_numba as run
    else:
        run = add_predictions_reference
    run(keys, values, weights, out[0], out[1])
    return out[0], out[1]


def add_predictions_reference(
    keys: Rest,
    values: Rest,
    weights: LayerWeights,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """Write what ``add_predictions`` returns; the definition."""
    outputs = ((keys, out_keys), (values, out_values))
    recursion = ReferenceRecursion(weights, keys.base.shape[1])
    for _, (part, is_value, head) in _turns(weights, recursion):
        rest, out = outputs[is_value]
        ahead = recursion.predict(part) * ~to_flags(rest.escape[head])[..., None]
        out[head] = rest.fine[head] + ahead
        recursion.put(part, rest.base[head] + ahead)
