"""The predicted codec: the calibrated one, of what cannot be predicted from earlier layers.

A block's segments, strata, classes and prices are those of ``calibrated.py``, and so is the form
of keys, ``pre``. But planes and bias hold what is left of a vector after its prediction
(``kernels.layer_prediction``), with transforms of their own; an escape is the vector itself. Layers
are coded and decoded in order: no layer of a block can be read without those before it, and
attention cannot read it in place. In return it needs about two thirds of the bits.

A token that is left out in one head is, for what follows, what was predicted for it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch

from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.component_basis import ComponentBasis, encode_tokens
from kvstrata.kernels.escape_rows import pack_escape_rows
from kvstrata.kernels.huge_memory import empty_huge
from kvstrata.kernels.layer_prediction import LayerWeights, Rest, add_predictions, steps
from kvstrata.kernels.mid_rows import pack_mid_rows
from kvstrata.kernels.page_runs import PageRun
from kvstrata.kernels.row_pages import write_rows
from kvstrata.kernels.token_masks import to_flags, to_mask
from kvstrata.kernels.value_bias import ValueBias
from kvstrata.methods.bit_allocation import VALUE_WEIGHT
from kvstrata.methods.calibrated import CalibratedCodec, Side, TokenChoice
from kvstrata.methods.calibrated_segments import StoredSide
from kvstrata.methods.codec import BlockShape, KVBlocks
from kvstrata.methods.profile import PROFILES, Prediction, Profile, ProfileError
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum

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

    @cached_property
    def _weights(self) -> LayerWeights:
        return LayerWeights(self._tables.across, self._tables.within, self.profile.shape[2])

    def _encode_sides(self, blocks: KVBlocks, choice: TokenChoice) -> tuple[StoredSide, StoredSide]:
        put = [part.flatten(0, 1).float() for part in (blocks.keys, blocks.values)]
        components = [empty_huge(tuple(part.shape), torch.float32) for part in put]
        parts: tuple[list[_Part], list[_Part]] = ([], [])
        for recursion, (part, is_value, head) in steps(self._weights, put[K].shape[1]):
            own = slice(head, head + 1)
            made = _encode_head(
                self._heads[is_value][head],
                put[is_value][own],
                recursion.predict(part)[None],
                components[is_value][own],
                choice.head(head),
                with_bias=is_value,
            )
            recursion.put(part, made.read[0])
            parts[is_value].append(made)
        left_out = to_mask(~choice.kept)
        keys, values = (
            _join(side, x, y, made, left_out)
            for side, x, y, made in zip(self.sides, put, components, parts, strict=True)
        )
        return keys, values

    def decode_to_pages(
        self,
        frames: Sequence[Mapping[Stratum, Frame]],
        shape: BlockShape,
        pages: Callable[[], PageRun],
    ) -> None:
        """Write what ``decode`` returns to pages. See ``PagingCodec``."""
        keys, values = (part.flatten(0, 1).flatten(1, 2) for part in self.decode(frames, shape))
        run = pages()
        write_rows(run.memory, run.tables, run.first, keys, values, run.rotation)

    def _decode_sides(
        self, keys: StoredSide, values: StoredSide, shape: BlockShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # On the CPU: heads follow from heads, and no kernel does that on a GPU.
        rests = []
        for side, stored in zip(self.sides, (keys, values), strict=True):
            base = side.decode(replace(stored, mid_rows=None), torch.float32)
            fine = base if stored.mid_rows is None else side.decode(stored, torch.float32)
            rests.append(Rest(base, fine, stored.escape & ~stored.mid))
        read = add_predictions(rests[K], rests[V], self._weights, shape.dtype)
        return read[0].to(shape.device), read[1].to(shape.device)


@dataclass(frozen=True, slots=True)
class _Part:
    """What is stored of one head, and what a reader of BASE gets."""

    words: torch.Tensor
    escape: torch.Tensor
    mid: torch.Tensor
    bias: ValueBias | None
    read: torch.Tensor


def _encode_head(
    side: Side,
    x: torch.Tensor,
    ahead: torch.Tensor,
    y: torch.Tensor,
    choice: TokenChoice,
    *,
    with_bias: bool,
) -> _Part:
    """Return what is stored of one head's vectors ``x``, predicted as ``ahead``, (1, N, T, D).

    Writes the components of what is left to ``y``.
    """
    _, words, error = encode_tokens(x - ahead, side.basis, side.variance, y)
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
    read = side.decode(stored, torch.float32) + ahead * ~to_flags(escape)[..., None]
    return _Part(words, escape, mid, bias, read)


def _join(
    side: Side, x: torch.Tensor, y: torch.Tensor, parts: list[_Part], left_out: torch.Tensor
) -> StoredSide:
    """Return what is stored of all heads, whose vectors are ``x``, what is left of them ``y``."""
    escape = torch.cat([part.escape for part in parts])
    mid = torch.cat([part.mid for part in parts])
    biases = [part.bias for part in parts if part.bias is not None]
    return StoredSide(
        escape=escape | left_out,
        mid=mid | left_out,
        words=torch.cat([part.words for part in parts], 1),
        escapes=pack_escape_rows(x, escape),
        mid_rows=pack_mid_rows(y, mid, side.basis.layout),
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
