"""The predicted codec: the calibrated one, of what cannot be predicted from earlier layers.

A block's segments, strata, classes and prices are those of ``calibrated.py``, and so is the form
of keys, ``pre``. But planes and bias hold what is left of a vector after its prediction
(``prediction.py``), with transforms of their own; an escape is the vector itself. Layers are coded
and decoded in order: no layer of a block can be read without those before it, and attention cannot
read it in place. In return it needs about two thirds of the bits.

A token that is left out in one head is, for what follows, what was predicted for it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.component_basis import ComponentBasis, encode_tokens, expand
from kvstrata.kernels.escape_rows import pack_escape_rows
from kvstrata.kernels.mid_rows import pack_mid_rows
from kvstrata.kernels.token_masks import to_flags, to_mask, token_classes
from kvstrata.kernels.value_bias import ValueBias, decode_value_bias
from kvstrata.methods.bit_allocation import VALUE_WEIGHT
from kvstrata.methods.calibrated import CalibratedCodec, Side, TokenChoice
from kvstrata.methods.calibrated_segments import StoredSide
from kvstrata.methods.codec import KVBlocks
from kvstrata.methods.prediction import Recursion
from kvstrata.methods.profile import PROFILES, Prediction, Profile, ProfileError

K, V = 0, 1


@dataclass(frozen=True, eq=False)
class PredictedCodec(CalibratedCodec):
    """The calibrated codec with prediction from layer to layer; see there for attributes.

    Raises:
        ValueError: The profile has no tables for predicting, or the form is not ``"pre"``.
    """

    name = "predicted"
    version = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.profile.prediction is None:
            raise ValueError("the profile has no tables for predicting; run `kvstrata calibrate`")
        if self.form != "pre":
            raise ValueError(f"codec {self.name!r} has no form {self.form!r}; use 'pre'")

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes without the tables: the other side has the profile, too."""
        return _restore, (self.profile.profile_id, self.threshold)

    def settings(self) -> str:
        """Return the profile and the threshold."""
        return f"profile={self.profile.profile_id},threshold={self.threshold!r}"

    @cached_property
    def _tables(self) -> Prediction:
        assert self.profile.prediction is not None
        return self.profile.prediction

    @cached_property
    def sides(self) -> tuple[Side, Side]:
        """Return the transforms and prices of what is left of K and of V."""
        return (
            Side.of(self._tables.keys, self.threshold, weight=1.0),
            Side.of(self._tables.values, self.threshold, weight=VALUE_WEIGHT),
        )

    @cached_property
    def _heads(self) -> tuple[list[Side], list[Side]]:
        keys, values = self.sides
        return [*_heads_of(keys)], [*_heads_of(values)]

    def _steps(self, num_tokens: int) -> Iterator[tuple[Recursion, int, int, int]]:
        """Yield the recursion, the part, the side and the head of L * H of each step in order."""
        layers, heads, dim = self.profile.shape
        recursion = Recursion(self._tables.across, self._tables.within, num_tokens, dim)
        for layer in range(layers):
            recursion.enter_next_layer()
            for part in range(2 * heads):
                yield recursion, part, V if part < heads else K, layer * heads + part % heads

    def _encode_sides(self, blocks: KVBlocks, choice: TokenChoice) -> tuple[StoredSide, StoredSide]:
        put = [part.flatten(0, 1).float() for part in (blocks.keys, blocks.values)]
        size = put[K].shape[1:]
        parts: tuple[list[_Part], list[_Part]] = ([], [])
        for recursion, part, side, head in self._steps(size[:2].numel()):
            x = put[side][head : head + 1]
            ahead = recursion.predict(part).view(1, *size)
            made = _encode_head(
                self._heads[side][head], x, ahead, choice.head(head), with_bias=side == V
            )
            recursion.put(part, made.read.view(-1, size[-1]))
            parts[side].append(made)
        left_out = to_mask(~choice.kept)
        keys, values = (
            _join(side, x, made, left_out)
            for side, x, made in zip(self.sides, put, parts, strict=True)
        )
        return keys, values

    def _decode_sides(
        self, keys: StoredSide, values: StoredSide, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored = (keys, values)
        base = [
            _rest(side, replace(part, mid_rows=None))
            for side, part in zip(self.sides, stored, strict=True)
        ]
        fine = [
            rest if part.mid_rows is None else _rest(side, part)
            for side, part, rest in zip(self.sides, stored, base, strict=True)
        ]
        predicted = [(~to_flags(p.escape & ~p.mid)).float()[..., None] for p in stored]
        out = [torch.empty(rest.shape, dtype=dtype) for rest in base]
        size = base[K].shape[1:]
        for recursion, part, side, head in self._steps(size[:2].numel()):
            ahead = recursion.predict(part).view(size).mul_(predicted[side][head])
            torch.add(fine[side][head], ahead, out=out[side][head])
            recursion.put(part, ahead.add_(base[side][head]).view(-1, size[-1]))
        return out[K], out[V]


@dataclass(frozen=True, slots=True)
class _Part:
    """What is stored of one head, and what a reader of BASE gets."""

    y: torch.Tensor
    words: torch.Tensor
    escape: torch.Tensor
    mid: torch.Tensor
    bias: ValueBias | None
    read: torch.Tensor


def _encode_head(
    side: Side, x: torch.Tensor, ahead: torch.Tensor, choice: TokenChoice, *, with_bias: bool
) -> _Part:
    """Return what is stored of one head's vectors ``x``, predicted as ``ahead``, (1, N, T, D)."""
    y, words, error = encode_tokens(x - ahead, side.basis, side.variance)
    escape, mid = side.classify(error, choice)
    left_out = to_mask(~choice.kept)
    bias = side.bias(y, words, choice, escape | mid | left_out) if with_bias else None
    stored = StoredSide(
        escape=escape | left_out,
        mid=mid | left_out,
        words=words,
        escapes=pack_escape_rows(x, escape),
        mid_rows=None,
        bias=bias,
    )
    read = _rest(side, stored) + ahead * ~to_flags(escape)[..., None]
    return _Part(y, words, escape, mid, bias, read)


def _rest(side: Side, stored: StoredSide) -> torch.Tensor:
    """Return what is left after prediction, float32 (heads, N, T, D); escapes are whole.

    The bias is summed in float64, as predictions are, because BLAS is not asked for its order.
    """
    classes = token_classes(stored.mid, stored.escape)
    rest = expand(
        stored.words,
        side.basis,
        classes,
        mid=stored.mid_rows,
        escapes=stored.escapes,
        dtype=torch.float32,
    )
    if stored.bias is not None:
        rows = decode_value_bias(stored.bias).transpose(0, 1).double()
        shift = (rows / side.basis.deviation.double()[:, None]) @ side.basis.inverse.double()
        rest += to_flags(classes.base)[..., None] * shift.float()[:, :, None]
    return rest


def _join(side: Side, x: torch.Tensor, parts: list[_Part], left_out: torch.Tensor) -> StoredSide:
    """Return what is stored of all heads, whose vectors are ``x``."""
    escape = torch.cat([part.escape for part in parts])
    mid = torch.cat([part.mid for part in parts])
    biases = [part.bias for part in parts if part.bias is not None]
    return StoredSide(
        escape=escape | left_out,
        mid=mid | left_out,
        words=torch.cat([part.words for part in parts], 1),
        escapes=pack_escape_rows(x, escape),
        mid_rows=pack_mid_rows(torch.cat([part.y for part in parts]), mid, side.basis.layout),
        bias=ValueBias(*(torch.cat(p, 1) for p in zip(*biases, strict=True))) if biases else None,
    )


def _heads_of(side: Side) -> Iterator[Side]:
    """Yield each head of a side as a side of its own."""
    whole = side.basis
    for head in range(whole.layout.num_heads):
        own = slice(head, head + 1)
        basis = ComponentBasis(
            PlaneLayout(whole.layout.widths[own], whole.layout.mid_counts[own]),
            *(table[own] for table in (whole.mean, whole.forward, whole.inverse, whole.deviation)),
        )
        yield Side(basis, side.variance[own], side.mid_price[own], side.escape_price[own])


@lru_cache(16)
def predicted_codec(profile: Profile, threshold: float) -> PredictedCodec:
    """Return the codec, the same object for the same arguments: its tables take a while to make."""
    return PredictedCodec(profile, threshold)


def _restore(profile_id: str, threshold: float) -> PredictedCodec:
    profile = PROFILES.by_id(profile_id)
    if profile.prediction is None:
        raise ProfileError(f"profile {profile_id} has no tables for predicting")
    return predicted_codec(profile, threshold)
