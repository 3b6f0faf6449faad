"""The calibrated codec: one static transform per KV head, bits where they matter.

Per layer, head and side: components of the profile's transform, each with its own number of bit
planes (``bit_allocation``); a few tokens get two planes more (mid), a few become int8 escapes; the
base tokens of a block share a bias of V. No scale per token or group is left. It is what
``balanced`` means for a model with a profile; ``near-lossless`` and ``small`` code what is left
after prediction where the profile can predict (``predicted.py``).

Segment of one layer, H heads, D head_dim, E escaped tokens of all heads together:

    BASE  uint64  masks      (escape, mid) x (K, V) x H; both bits: dropped, neither: base
          uint64  planes     of K, then of V: ``kernels.block_planes``, one word per component
          uint8   tags       64
          uint8   bias       H x D/2, then scales H
          bf16    escape scales (E), then int8 escape codes (E x D); K first, heads ascending,
                  tokens ascending
    MID   uint8   rows       of K, then of V: ``kernels.mid_rows``

Planes are dense: an escape's bits are there and mean nothing. But a token that is left out has
none, see ``left_out``.

Source:
    ZipCache, arXiv:2405.14256, for saliency as the measure of who gets bits; KIVI and others
    quantise groups with parameters of their own, of which none is left here.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import torch

from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.component_basis import ComponentBasis, encode_tokens
from kvstrata.kernels.escape_rows import pack_escape_rows
from kvstrata.kernels.mid_rows import pack_mid_rows
from kvstrata.kernels.page_runs import PageRun, StoredTokens, expand_to_pages
from kvstrata.kernels.token_masks import to_flags, to_mask, token_classes
from kvstrata.kernels.value_bias import ValueBias, encode_value_bias
from kvstrata.methods.bit_allocation import VALUE_WEIGHT, allocate
from kvstrata.methods.calibrated_segments import SegmentLayout, StoredSide
from kvstrata.methods.codec import BlockShape, KVBlocks, Segments
from kvstrata.methods.profile import PROFILES, Profile, SideTables
from kvstrata.methods.saliency_tag import encode_tags, read_tags
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Buffer, Frame
from kvstrata.protos.frame_pb2 import RopeForm, Stratum
from kvstrata.protos.identity import BLOCK_TOKENS

BASE, MID = Stratum.STRATUM_BASE, Stratum.STRATUM_MID
STRATA: tuple[Stratum, ...] = (BASE, MID)
SINK_TOKENS = 4
_ROPE = {"pre": RopeForm.ROPE_FORM_PRE, "frame": RopeForm.ROPE_FORM_FRAME}


@dataclass(frozen=True, eq=False)
class CalibratedCodec:
    """Base planes, mid planes, escapes and a bias of V, by a model's profile.

    Attributes:
        profile: Of the model whose blocks these are.
        threshold: Price of a bit; a larger one makes blocks smaller and worse.
        form: ``"pre"``: keys before RoPE. ``"frame"``: keys turned by their offset in the block,
            which ``kernels.attend_blocks`` reads without expanding them.
    """

    profile: Profile = field(repr=False)
    threshold: float
    form: str = "pre"

    name = "calibrated"
    version = 1
    lossless = False
    strata = STRATA

    def __post_init__(self) -> None:
        if self.form not in self.profile.keys:
            known = ", ".join(sorted(self.profile.keys))
            raise ValueError(f"the profile has no form {self.form!r}; use one of {known}")
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes without the tables: the other side has the profile, too."""
        return _restore, (self.profile.profile_id, self.threshold, self.form)

    @property
    def rope(self) -> RopeForm:
        """Return the form in which keys are handed in."""
        return _ROPE[self.form]

    @property
    def first_layer(self) -> int:
        """Return the first layer that is stored."""
        return self.profile.first_layer

    def settings(self) -> str:
        """Return the profile, the threshold and the form."""
        return f"profile={self.profile.transform_id},threshold={self.threshold!r},form={self.form}"

    @cached_property
    def sides(self) -> tuple["Side", "Side"]:
        """Return the transforms and prices of K and of V."""
        return (
            Side.of(self.profile.keys[self.form], self.threshold, weight=1.0),
            Side.of(self.profile.values, self.threshold, weight=VALUE_WEIGHT),
        )

    @cached_property
    def layout(self) -> SegmentLayout:
        """Return where everything lies in a segment."""
        return SegmentLayout(self.profile.shape[0], *(side.basis.layout for side in self.sides))

    def encode(self, blocks: KVBlocks) -> list[Segments]:
        """Return BASE and MID of every block. See ``BlockCodec.encode``."""
        shape = (*blocks.keys.shape[:2], blocks.keys.shape[4])
        if shape != self.profile.shape:
            raise ValueError(
                f"blocks have (layers, heads, dim) {shape}, the profile {self.profile.shape}"
            )
        if not blocks.keys.shape[2]:
            return []
        keys, values = self._encode_sides(blocks, TokenChoice.of(blocks))
        base, mid = self.layout.write(keys, values, encode_tags(blocks.saliency.mean(1)))
        return [
            {BASE: dict(enumerate(base[n])), MID: dict(enumerate(mid[n]))} for n in range(len(base))
        ]

    def _encode_sides(
        self, blocks: KVBlocks, choice: "TokenChoice"
    ) -> tuple[StoredSide, StoredSide]:
        """Return what is stored of K and of V."""
        keys, values = self.sides
        return (
            keys.encode(blocks.keys.flatten(0, 1), choice, with_bias=False),
            values.encode(blocks.values.flatten(0, 1), choice, with_bias=True),
        )

    def decode(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the given strata tell. See ``BlockCodec.decode``."""
        with _as_corrupt():
            keys, values = self._decode_sides(*self._read(frames, shape), shape)
        size = self.profile.shape[:2]
        return keys.unflatten(0, size), values.unflatten(0, size)

    def decode_to_pages(
        self,
        frames: Sequence[Mapping[Stratum, Frame]],
        shape: BlockShape,
        pages: Callable[[], PageRun],
    ) -> None:
        """Write what ``decode`` returns to pages. See ``PagingCodec``."""
        with _as_corrupt():
            sides = zip(self.sides, self._read(frames, shape), strict=True)
            keys, values = (side.tokens(stored.on(shape.device)) for side, stored in sides)
            expand_to_pages(keys, values, pages())

    def _read(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> tuple[StoredSide, StoredSide]:
        """Return what frames hold of K and of V.

        Raises:
            CorruptFrameError: A checksum is off, or the model has another shape.
            ValueError: A segment's size is not the one that its masks tell.
        """
        if (shape.num_kv_heads, shape.head_dim) != self.profile.shape[1:]:
            raise CorruptFrameError("the blocks are of a model of another shape")
        return self.layout.read(
            [self.segments_of(strata[BASE]) for strata in frames],
            [self.segments_of(strata[MID]) for strata in frames] if MID in frames[0] else None,
        )

    def _decode_sides(
        self, keys: StoredSide, values: StoredSide, shape: BlockShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, (L * H, N, T, D)."""
        read, dtype = [stored.on(shape.device) for stored in (keys, values)], shape.dtype
        return self.sides[0].decode(read[0], dtype), self.sides[1].decode(read[1], dtype)

    def tags(self, frames: Sequence[Mapping[Stratum, Frame]]) -> torch.Tensor:
        """Return the saliency tags. See ``BlockCodec.tags``."""
        segments = [self.segments_of(strata[BASE]) for strata in frames]
        return read_tags(segments, self.layout.tag_places(segments))

    def kept(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> torch.Tensor | None:
        """Return which tokens are stored. See ``SelectiveCodec``."""
        try:
            masks = self.layout.read_masks([self.segments_of(strata[BASE]) for strata in frames])
        except ValueError as error:
            raise CorruptFrameError(str(error)) from error
        left_out = (masks[0, 0] & masks[1, 0]).unflatten(0, (-1, shape.num_kv_heads))
        return ~to_flags(left_out) if left_out.any() else None

    @property
    def bases(self) -> tuple[ComponentBasis, ComponentBasis]:
        """Return what keys and values of all stored layers are transformed with."""
        keys, values = self.sides
        return keys.basis, values.basis

    def segments_of(self, frame: Frame) -> list[Buffer]:
        """Return a frame's segments, one per stored layer.

        Raises:
            CorruptFrameError: A checksum is off, or it holds other layers.
        """
        segments = frame.segments()
        last = self.first_layer + self.profile.shape[0]
        if sorted(segments) != list(range(self.first_layer, last)):
            raise CorruptFrameError("a stratum holds other layers than the profile")
        return [segments[layer] for layer in range(self.first_layer, last)]


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """What the choice of escapes and mid tokens depends on.

    Attributes:
        weights: float32 (L * H, N, T), how much each token matters.
        sinks: bool (N, T); always escapes.
        kept: bool (L * H, N, T), or what broadcasts to it.
    """

    weights: torch.Tensor
    sinks: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(cls, blocks: KVBlocks) -> "TokenChoice":
        """Return it for blocks."""
        num_blocks = blocks.keys.shape[2]
        position = blocks.first_position + torch.arange(num_blocks * BLOCK_TOKENS)
        sinks = (position < SINK_TOKENS).view(num_blocks, BLOCK_TOKENS)
        kept = torch.ones((), dtype=torch.bool).expand(blocks.saliency.shape)
        kept = kept if blocks.kept is None else blocks.kept
        weights = _token_weights(blocks.saliency, kept & ~sinks).flatten(0, 1)
        return cls(weights, sinks, kept.flatten(0, 1))

    def head(self, index: int) -> "TokenChoice":
        """Return that of one head of L * H."""
        own = slice(index, index + 1)
        return TokenChoice(self.weights[own], self.sinks, self.kept[own])


@dataclass(frozen=True)
class Side:
    """K or V of some heads of some layers, as one row of heads: transform, bits and prices.

    Attributes:
        basis: The transform.
        variance: float32 (L * H, D), what its components cost.
        mid_price: float32 (L * H, 1, 1); a token with a larger weighted error becomes mid.
        escape_price: And with a still larger one an escape.
    """

    basis: ComponentBasis
    variance: torch.Tensor
    mid_price: torch.Tensor
    escape_price: torch.Tensor

    @classmethod
    def of(cls, tables: SideTables, threshold: float, *, weight: float) -> "Side":
        """Return all heads of tables, with the bits that a threshold buys."""
        bits = allocate(tables, threshold, weight=weight)
        inverse = tables.basis.flatten(0, 1).float()
        variance = tables.variance.flatten(0, 1)
        basis = ComponentBasis(
            layout=PlaneLayout(bits.widths.flatten(0, 1), bits.mid_counts.flatten()),
            mean=tables.mean.flatten(0, 1),
            forward=torch.linalg.inv(inverse.double()).float(),
            inverse=inverse,
            deviation=variance.sqrt(),
        )
        return cls(basis, variance, bits.mid_price.view(-1, 1, 1), bits.escape_price.view(-1, 1, 1))

    def encode(self, x: torch.Tensor, choice: TokenChoice, *, with_bias: bool) -> StoredSide:
        """Return what is stored of ``x``, (L * H, N, T, D)."""
        y, words, error = encode_tokens(x, self.basis, self.variance)
        escape, mid = self.classify(error, choice)
        left_out = to_mask(~choice.kept)
        return StoredSide(
            escape=escape | left_out,
            mid=mid | left_out,
            words=words,
            escapes=pack_escape_rows(x, escape),
            mid_rows=pack_mid_rows(y, mid, self.basis.layout),
            bias=self.bias(y, words, choice, escape | mid | left_out) if with_bias else None,
        )

    def classify(
        self, error: torch.Tensor, choice: TokenChoice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the masks of escapes and of mid tokens, int64 (L * H, N), by what errors cost."""
        score = error * choice.weights
        escaped = ((score > self.escape_price) | choice.sinks) & choice.kept
        return to_mask(escaped), to_mask((score > self.mid_price) & ~escaped & choice.kept)

    def bias(
        self, y: torch.Tensor, words: torch.Tensor, choice: TokenChoice, other: torch.Tensor
    ) -> ValueBias:
        """Return the mean error of the tokens that are not in the mask ``other``."""
        return encode_value_bias(
            y,
            words,
            self.basis.layout,
            weights=choice.weights,
            base=~other,
            deviation=self.basis.deviation,
        )

    def decode(self, stored: StoredSide, dtype: torch.dtype) -> torch.Tensor:
        """Return the vectors, (L * H, N, T, D), where ``stored`` is."""
        return self.tokens(stored).expand(dtype)

    def tokens(self, stored: StoredSide) -> StoredTokens:
        """Return what is stored as kernels read it."""
        return StoredTokens(
            stored.words,
            self.basis.on(stored.words.device),
            token_classes(stored.mid, stored.escape),
            mid=stored.mid_rows,
            bias=stored.bias,
            escapes=stored.escapes,
        )


@contextlib.contextmanager
def _as_corrupt() -> Iterator[None]:
    """Turn what the body finds wrong with sizes into a CorruptFrameError."""
    try:
        yield
    except ValueError as error:
        raise CorruptFrameError(str(error)) from error


@lru_cache(16)
def calibrated_codec(profile: Profile, threshold: float, form: str = "pre") -> CalibratedCodec:
    """Return the codec, the same object for the same arguments: its tables take a while to make."""
    return CalibratedCodec(profile, threshold, form)


def _restore(profile_id: str, threshold: float, form: str) -> CalibratedCodec:
    return calibrated_codec(PROFILES.by_id(profile_id), threshold, form)


def _token_weights(saliency: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return how much each token matters, float32 (L, H, N, T), 1 on average of those counted.

    Args:
        saliency: float32 (L, H, N, T); 0 or no number where unknown, which counts as average.
        counted: bool (L, H, N, T), or what broadcasts to it: neither sinks nor left out.
    """
    known = (saliency > 0) & saliency.isfinite() & counted
    saliency = torch.where(known, saliency, 0.0)
    mean = saliency.sum((-2, -1)) / known.sum((-2, -1)).clamp_min(1)
    weights = saliency / mean.clamp_min(1e-30)[..., None, None]
    return torch.where(known, weights, 1.0)
