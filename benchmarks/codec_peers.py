"""The codecs that ``bench_codec.py`` compares with, written from their papers, in eager torch.

Each function takes a prompt's K and V, post-RoPE, (L, H, n, D), and returns what it would store:
its size to the bit, parameters included, and how to read it back. Codes are kept one per byte in
memory, and counted at their real width. transformers' own quantised caches are in
``codec_caches.py``.

Legend: L layers, H KV heads, n tokens, D head_dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from kvstrata.kernels.saliency import normalised_saliency

PARAMETER_BITS = 16
KIVI_GROUP = 32
KIVI_WINDOW = 128
ZIPCACHE_SALIENT = 0.6
ZIPCACHE_BITS = (4, 2)
PROBE_SHARE = 0.05  # of the last rows, and as much again of the earlier ones at random
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Prompt:
    """The uncompressed KV of a prompt, and the queries of some of its rows.

    Attributes:
        keys: float, (L, H, n, D), post-RoPE.
        values: As ``keys``.
        queries: (L, query heads, r, D), post-RoPE, of the rows ``positions``.
        positions: int64, (r,), ascending.
        scaling: Factor on the dot products before the softmax.
    """

    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor
    positions: torch.Tensor
    scaling: float


Decoded = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What a peer stores for a prompt."""

    num_bits: int
    decode: Callable[[], Decoded]


Encode = Callable[[Prompt], Encoded]


def probe_positions(num_tokens: int, seed: int) -> torch.Tensor:
    """Return ZipCache's probe rows: the last 5 %, and 5 % drawn from those before; ascending."""
    count = max(1, int(num_tokens * PROBE_SHARE))
    draw = torch.Generator().manual_seed(seed)
    early = torch.randperm(num_tokens - count, generator=draw)[:count]
    return torch.cat([early.sort().values, torch.arange(num_tokens - count, num_tokens)])


def encode_fp8(prompt: Prompt) -> Encoded:
    """Cast to float8 e4m3 without a scale, as serving engines do by default."""
    stored = [
        x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn) for x in (prompt.keys, prompt.values)
    ]

    def decode() -> Decoded:
        keys, values = (x.to(prompt.keys.dtype) for x in stored)
        return keys, values

    return Encoded(8 * sum(x.numel() for x in stored), decode)


@dataclass(frozen=True, slots=True)
class Uniform:
    """Codes between a group's minimum and maximum, both parameters in fp16."""

    codes: torch.Tensor
    minimum: torch.Tensor
    step: torch.Tensor
    bits: int

    @classmethod
    def of(cls, x: torch.Tensor, bits: int, dim: int) -> "Uniform":
        """Quantise groups that run along ``dim``."""
        low, high = x.aminmax(dim=dim, keepdim=True)
        minimum = low.half()
        step = ((high - low) / (2**bits - 1)).half().clamp_min(2**-24)
        codes = ((x - minimum) / step).round().clamp(0, 2**bits - 1)
        return cls(codes.to(torch.uint8), minimum, step, bits)

    @property
    def num_bits(self) -> int:
        """Codes and parameters."""
        return self.bits * self.codes.numel() + PARAMETER_BITS * 2 * self.minimum.numel()

    def read(self) -> torch.Tensor:
        """Return float32 values."""
        return self.codes * self.step.float() + self.minimum.float()


def encode_kivi(prompt: Prompt, bits: int, window: int = KIVI_WINDOW) -> Encoded:
    """Keys per channel over 32 tokens, values per token over 32 channels, a recent window in fp16.

    The window always holds the last 128 tokens and what does not fill a group of 32, for K and V.
    The official code leaves n mod 128 keys unquantised, which is none at the lengths measured here;
    this is the kinder choice.

    Source:
        KIVI, arXiv:2402.02750, sections 3.2 and 4.1: g = 32, R = 128.
    """
    layers, heads, num_tokens, dim = prompt.keys.shape
    old = max(0, num_tokens - window) // KIVI_GROUP * KIVI_GROUP
    group = math.gcd(dim, KIVI_GROUP)
    old_keys = prompt.keys[:, :, :old].unflatten(2, (old // KIVI_GROUP, KIVI_GROUP))
    old_values = prompt.values[:, :, :old].unflatten(3, (dim // group, group))
    keys, values = Uniform.of(old_keys, bits, 3), Uniform.of(old_values, bits, 4)
    recent = [x[:, :, old:].half() for x in (prompt.keys, prompt.values)]

    def decode() -> Decoded:
        shape = (layers, heads, old, dim)
        return (
            torch.cat([keys.read().reshape(shape), recent[0].float()], 2),
            torch.cat([values.read().reshape(shape), recent[1].float()], 2),
        )

    window_bits = PARAMETER_BITS * sum(x.numel() for x in recent)
    return Encoded(keys.num_bits + values.num_bits + window_bits, decode)


def encode_zipcache(prompt: Prompt) -> Encoded:
    """Keep the 60 % most salient tokens of each head at 4 bits and the others at 2.

    Keys channelwise within each class; values divided by the square root of each channel's largest
    magnitude, then tokenwise over all heads. As in the official code the r-th token of a class in
    one head shares its parameters with the r-th in the others. One bit per token and head says
    which class it is in; the paper's own ratio leaves that out.

    Source:
        ZipCache, arXiv:2405.14256, sections 4.1 to 4.3. The probe sums are divided by the number of
        probe rows that see a column; the official code divides by all rows, which inflates late
        columns.
    """
    layers, heads, num_tokens, dim = prompt.keys.shape
    scores = normalised_saliency(prompt.queries, prompt.positions, prompt.keys, prompt.scaling)
    num_regular = int(num_tokens * (1 - ZIPCACHE_SALIENT))
    order = scores.argsort(dim=-1, stable=True)
    classes = (order[..., num_regular:], order[..., :num_regular])
    channel = prompt.values.abs().amax(2, keepdim=True).sqrt().half().float().clamp_min(2**-24)
    stored = []
    for members, bits in zip(classes, ZIPCACHE_BITS, strict=True):
        ids = members.sort(-1).values[..., None].expand(-1, -1, -1, dim)
        keys = Uniform.of(prompt.keys.gather(2, ids), bits, 2)
        turned = (prompt.values / channel).gather(2, ids).transpose(1, 2).flatten(2)
        stored.append((ids, keys, Uniform.of(turned, bits, 2)))
    num_bits = sum(keys.num_bits + values.num_bits for _, keys, values in stored)
    num_bits += PARAMETER_BITS * channel.numel() + layers * heads * num_tokens

    def decode() -> Decoded:
        keys, values = torch.empty_like(prompt.keys), torch.empty_like(prompt.values)
        for ids, k, v in stored:
            keys.scatter_(2, ids, k.read().to(keys))
            read = v.read().unflatten(2, (heads, dim)).transpose(1, 2)
            values.scatter_(2, ids, read.to(values))
        return keys, values.mul_(channel)

    return Encoded(num_bits, decode)


@cache
def gaussian_levels(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return Lloyd-Max thresholds and centroids of the unit Gaussian, float32, ascending."""
    normal = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    )
    centroids = torch.linspace(-2, 2, 2**bits, dtype=torch.float64)
    infinite = torch.full((1,), torch.inf, dtype=torch.float64)
    for _ in range(2000):
        thresholds = (centroids[1:] + centroids[:-1]) / 2
        edges = torch.cat([-infinite, thresholds, infinite])
        density = normal.log_prob(edges).exp()
        centroids = (density[:-1] - density[1:]) / normal.cdf(edges).diff()
    return ((centroids[1:] + centroids[:-1]) / 2).float(), centroids.float()


@cache
def random_rotation(dim: int, seed: int) -> torch.Tensor:
    """Return a random orthogonal matrix, float32, (dim, dim)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(dim, dim, generator=draw)).Q


def encode_turboquant(prompt: Prompt, bits: int, seed: int) -> Encoded:
    """Turn each vector by a random rotation, then quantise by the Gaussian's Lloyd-Max levels.

    After the rotation every coordinate of a unit vector is nearly Gaussian with variance 1/D, so
    one table serves all, and the norm in fp16 is the only parameter of a token.

    Source:
        TurboQuant, arXiv:2504.19874, the variant for mean square error, without its residual stage;
        hence "like" in the scheme's name.
    """
    dim = prompt.keys.shape[-1]
    rotation = random_rotation(dim, seed)
    thresholds, centroids = gaussian_levels(bits)
    stored = []
    for x in (prompt.keys, prompt.values):
        norm = x.float().norm(dim=-1, keepdim=True).half().clamp_min(2**-24)
        unit = x.float() @ rotation * (math.sqrt(dim) / norm.float())
        stored.append((torch.bucketize(unit, thresholds).to(torch.uint8), norm))

    def decode() -> Decoded:
        keys, values = (
            centroids[codes.int()] * (norm.float() / math.sqrt(dim)) @ rotation.T
            for codes, norm in stored
        )
        return keys, values

    num_bits = sum(bits * codes.numel() + PARAMETER_BITS * norm.numel() for codes, norm in stored)
    return Encoded(num_bits, decode)


def paper_peers(seed: int) -> dict[str, Encode]:
    """Return all peers that need no package."""
    peers: dict[str, Encode] = {"fp8": encode_fp8}
    for bits in (4, 2):
        peers[f"kivi-{bits}"] = partial(encode_kivi, bits=bits)
    peers["zipcache"] = encode_zipcache
    for bits in (4, 3, 2):
        peers[f"turboquant-like-{bits}"] = partial(encode_turboquant, bits=bits, seed=seed)
    return peers
