"""Between segments and frames: who a block is goes into its headers, and is checked on return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvstrata.methods.codec import BlockCodec, Segments, readable
from kvstrata.protos.frame import Frame, encode_frame, encoding_id
from kvstrata.protos.frame_pb2 import FrameHeader, RopeForm, Stratum
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest


class UnusableBlockError(ValueError):
    """A block that came, but must not be used; ``reason`` is a counter's label."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class BlockIdentity:
    """Everything that a block's frames must agree with before they are decoded."""

    scope: ScopeDigest
    block_hash: BlockHash
    parent_hash: bytes
    token_ids: tuple[int, ...]
    first_position: int

    @property
    def key(self) -> BlockKey:
        """The name under which the store keeps the block."""
        return BlockKey(self.scope, self.block_hash)


@dataclass(frozen=True, slots=True)
class SealedBlock:
    """A block ready to be stored: one frame per stratum."""

    identity: BlockIdentity
    frames: dict[Stratum, bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes of all frames: headers, tables, checksums and padding included."""
        return sum(len(frame) for frame in self.frames.values())


def seal(
    codec: BlockCodec,
    segments: Segments,
    identity: BlockIdentity,
    *,
    rope: RopeForm,
    kv_dtype: str,
    num_kv_heads: int,
    head_dim: int,
    attachments: Mapping[str, bytes] | None = None,
) -> SealedBlock:
    """Return the frames of one encoded block; all strata carry one encoding id.

    ``attachments`` go into the frame that every reader needs, BASE or EXACT.
    """
    written = encoding_id(
        f"{codec.name}/{codec.version}/{codec.settings()}",
        {stratum: [layers[i] for i in sorted(layers)] for stratum, layers in segments.items()},
    )
    frames = {}
    for stratum, layers in segments.items():
        header = draft(
            codec,
            identity,
            rope=rope,
            kv_dtype=kv_dtype,
            num_layers=len(layers),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        header.stratum, header.encoding_id = stratum, written
        frames[stratum] = encode_frame(
            header,
            {codec.first_layer + i: data for i, data in layers.items()},
            attachments if stratum == codec.strata[0] else None,
        )
    return SealedBlock(identity, frames)


def draft(
    codec: BlockCodec,
    identity: BlockIdentity,
    *,
    rope: RopeForm,
    kv_dtype: str,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
) -> FrameHeader:
    """Return what the headers of a block's frames will say before its bytes exist."""
    return FrameHeader(
        scope=identity.scope,
        block_hash=identity.block_hash,
        parent_hash=identity.parent_hash,
        codec=codec.name,
        codec_version=codec.version,
        rope=rope,
        kv_dtype=kv_dtype,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        first_position=identity.first_position,
        token_ids=identity.token_ids,
    )


def usable(
    frames: Mapping[Stratum, Frame],
    identity: BlockIdentity,
    codec: BlockCodec,
    *,
    num_layers: int,
    finest: Stratum | None = None,
) -> dict[Stratum, Frame]:
    """Return the best valid subset of ``frames`` to decode this block from.

    Args:
        frames: What came, by stratum; any subset.
        identity: What was asked for. Token ids are compared: a hash alone is never trusted.
        codec: The codec that will decode.
        num_layers: Layers that a complete stratum holds.
        finest: Ignore strata finer than this one.

    Raises:
        UnusableBlockError: ``absent``, ``foreign`` (another block's bytes), ``token_mismatch``,
            ``other_codec`` or ``incomplete``.
    """
    anchor = frames.get(Stratum.STRATUM_EXACT) or frames.get(Stratum.STRATUM_BASE)
    if anchor is None:
        raise UnusableBlockError("absent")
    header = anchor.header
    if (header.scope, header.block_hash) != (identity.scope, identity.block_hash):
        raise UnusableBlockError("foreign")
    if tuple(header.token_ids) != identity.token_ids:
        raise UnusableBlockError("token_mismatch")
    if (header.codec, header.codec_version) != (codec.name, codec.version):
        raise UnusableBlockError("other_codec")
    layers = list(range(codec.first_layer, codec.first_layer + num_layers))
    if header.num_layers != num_layers or [s.layer for s in header.segments] != layers:
        raise UnusableBlockError("incomplete")
    if header.first_position != identity.first_position:
        raise UnusableBlockError("foreign")
    together = {
        stratum
        for stratum, frame in frames.items()
        if frame.header.encoding_id == header.encoding_id
        and frame.header.block_hash == header.block_hash
        and frame.header.stratum == stratum
        and (finest is None or stratum <= finest)
    }
    chosen = readable(together)
    if not chosen:
        raise UnusableBlockError("absent")
    return {stratum: frames[stratum] for stratum in chosen}


def precision_name(strata: Sequence[Stratum]) -> str:
    """Return how users name what was read: "exact", "base+mid", "base"."""
    return "+".join(Stratum.Name(s).removeprefix("STRATUM_").lower() for s in sorted(strata))
