"""From samples of a model's cache to the tables that predict one layer from another.

Layers are fitted in order, each from what a reader will have: the layer before as the codec itself
decodes it at one middle threshold, not as it was. Weights are least squares with a small ridge;
what they leave is transformed like any other vector (``profile_fit.py``), under the metric that the
profile's transforms hold.

Legend: n samples, L stored layers, H KV heads, D head_dim, C = 2 H D channels: V's heads, then K's.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from kvstrata.kernels.component_basis import encode_tokens, expand
from kvstrata.kernels.token_masks import token_classes
from kvstrata.methods.bit_allocation import VALUE_WEIGHT
from kvstrata.methods.calibrated import Side
from kvstrata.methods.profile import Prediction, Profile, SideTables
from kvstrata.methods.profile_fit import decorrelated
from kvstrata.protos.identity import BLOCK_TOKENS

RIDGE = 1e-3  # share of each source's own square; 1e-2 gave the same curve
# Significant bits of a weight: files pack to half their size, and the error is far below the rest.
WEIGHT_BITS = 6
_LEAST_SQUARE = 1e-12


def fit_prediction(
    read: Callable[[int], torch.Tensor],
    profile: Profile,
    threshold: float,
    tell: Callable[[int], None],
) -> Prediction:
    """Return the tables; their rates are not measured yet.

    Args:
        read: Returns the samples of a stored layer, float32 (n, C), the same tokens in every layer.
        profile: Of the same model.
        threshold: Price of a bit at which earlier layers are decoded.
        tell: Called with the number of layers done.

    Raises:
        ValueError: Fewer samples than 2 C, or values that are not finite.
    """
    layers, heads, dim = profile.shape
    channels = 2 * heads * dim
    across, within = (torch.zeros(layers, channels, channels, dtype=torch.float16) for _ in "ab")
    before: torch.Tensor | None = None
    tables: list[list[SideTables]] = [[], []]
    for layer in range(layers):
        x = _checked(read(layer), channels)
        sources = torch.empty(len(x), 2 * channels)
        sources[:, :channels] = 0.0 if before is None else before
        gram = torch.zeros(2 * channels, 2 * channels, dtype=torch.float64)
        _extend_gram(gram, sources, 0, channels)
        for part in range(2 * heads):
            columns = slice(part * dim, (part + 1) * dim)
            end = channels + columns.start
            used = slice(0 if before is not None else channels, end)
            weights = _least_squares(gram[used, used], sources[:, used], x[:, columns])
            weights = _rounded(weights).half()
            within[layer, : columns.start, columns] = weights[len(weights) - columns.start :]
            if before is not None:
                across[layer, :, columns] = weights[:channels]
            ahead = sources[:, used] @ weights.float()
            is_value, head = part < heads, part % heads
            rest, fitted = _code(
                x[:, columns] - ahead,
                _of_head(profile.values if is_value else profile.keys["pre"], layer, head),
                threshold,
                weight=VALUE_WEIGHT if is_value else 1.0,
            )
            tables[is_value].append(fitted)
            sources[:, end : end + dim] = ahead + rest
            _extend_gram(gram, sources, end, end + dim)
        before = sources[:, channels:].clone()
        tell(layer + 1)
    keys, values = (_stacked(side, layers, heads) for side in tables)
    return Prediction(across, within, keys, values, np.ones((1, 3)))


def _checked(x: torch.Tensor, channels: int) -> torch.Tensor:
    usable = len(x) // BLOCK_TOKENS * BLOCK_TOKENS
    if usable < 2 * channels:
        raise ValueError(f"{len(x)} samples are too few to predict from {2 * channels} channels")
    if not x.isfinite().all():
        raise ValueError("the samples are not finite: does the cache overflow float16?")
    return x[:usable]


def _extend_gram(gram: torch.Tensor, sources: torch.Tensor, begin: int, end: int) -> None:
    """Fill in the products of columns [begin, end) with those up to ``end``."""
    products = (sources[:, :end].T @ sources[:, begin:end]).double()
    gram[:end, begin:end] = products
    gram[begin:end, :end] = products.T


def _least_squares(
    gram: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the weights that predict ``targets``, float64 (s, D)."""
    ridged = gram.clone()
    ridged.diagonal().mul_(1 + RIDGE).add_(_LEAST_SQUARE)
    solved: torch.Tensor = torch.linalg.solve(ridged, (sources.T @ targets).double())
    return solved


def _rounded(weights: torch.Tensor) -> torch.Tensor:
    mantissas, exponents = torch.frexp(weights)
    scale = 2.0**WEIGHT_BITS
    return torch.ldexp((mantissas * scale).round() / scale, exponents)


def _code(
    rest: torch.Tensor, tables: SideTables, threshold: float, *, weight: float
) -> tuple[torch.Tensor, SideTables]:
    """Return what the codec makes of ``rest``, (n, D), and its transform, fitted to it."""
    mean = rest.mean(0)
    centred = rest - mean
    covariance = (centred.T @ centred).double() / len(rest)
    basis, variance = tables.basis[0, 0].double(), tables.variance[0, 0].double()
    inverse_root = basis / variance.sqrt()[:, None]
    fitted = decorrelated(
        mean.double()[None, None],
        covariance[None, None],
        torch.linalg.inv(inverse_root)[None, None],
        inverse_root[None, None],
    )
    side = Side.of(fitted, threshold, weight=weight)
    blocks = rest.view(1, -1, BLOCK_TOKENS, rest.shape[1])
    _, words, _ = encode_tokens(blocks, side.basis, side.variance)
    none = torch.zeros(1, blocks.shape[1], dtype=torch.int64)
    read = expand(words, side.basis, token_classes(none, none), dtype=torch.float32)
    return read.view(rest.shape), fitted


def _of_head(tables: SideTables, layer: int, head: int) -> SideTables:
    own = (slice(layer, layer + 1), slice(head, head + 1))
    return SideTables(tables.mean[own], tables.basis[own], tables.variance[own])


def _stacked(heads: Sequence[SideTables], layers: int, num_heads: int) -> SideTables:
    mean, basis, variance = (
        torch.cat([getattr(head, name)[0] for head in heads]).unflatten(0, (layers, num_heads))
        for name in ("mean", "basis", "variance")
    )
    return SideTables(mean, basis, variance)
