"""What a block codec is: tensors to strata and back, many blocks at once.

Legend: L stored layers, H KV heads, N blocks, T block tokens (64), D head_dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from kvstrata.kernels.page_runs import PageRun
from kvstrata.protos.frame import Buffer, Frame
from kvstrata.protos.frame_pb2 import RopeForm, Stratum

CPU = torch.device("cpu")
Segments = dict[Stratum, dict[int, Buffer]]


@dataclass(frozen=True, slots=True)
class KVBlocks:
    """The KV of N consecutive blocks.

    Attributes:
        keys: (L, H, N, T, D), in the codec's rope form.
        values: (L, H, N, T, D).
        saliency: float32 (L, H, N, T), larger is more attended; 0 where unknown.
        first_position: Position of the first token of the first block, a multiple of T.
        kept: bool (L, H, N, T): tokens to store; None for all, which every codec but a
            ``SelectiveCodec`` needs.
        salient: bool (L, H, N, T): tokens that a stage wants at more bits; None leaves the choice
            to the codec. One that has no such classes ignores it.
    """

    keys: torch.Tensor
    values: torch.Tensor
    saliency: torch.Tensor
    first_position: int
    kept: torch.Tensor | None = None
    salient: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockShape:
    """What a decoder must know of the model: heads, head_dim, and the cache's dtype and device.

    Where the codec's kernels run there, what is stored goes to the device and is decoded on it.
    """

    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device = CPU


class BlockCodec(Protocol):
    """Turns blocks into strata and back.

    Blocks are independent: a block decodes without any other. Encoding is deterministic.
    """

    name: str
    version: int
    strata: tuple[Stratum, ...]  # what a complete writing holds, coarsest first

    @property
    def lossless(self) -> bool:
        """Whether decoding returns the very bytes that were encoded."""
        ...

    @property
    def rope(self) -> RopeForm:
        """The form in which keys are handed in; PRE means NONE for unrotated models."""
        ...

    @property
    def first_layer(self) -> int:
        """Layers before it are not stored, but recomputed from token ids."""
        ...

    def settings(self) -> str:
        """Return the canonical text of all settings that change the bytes; part of the scope."""
        ...

    def encode(self, blocks: KVBlocks) -> list[Segments]:
        """Return each block's segments, keyed by stratum and by layer counted from ``first_layer``.

        Raises:
            ValueError: The tensors hold values that this codec cannot represent.
        """
        ...

    def decode(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values (L, H, N, T, D), as ``shape`` says, of N blocks of equal strata.

        Tokens that were not stored are zeros.

        Raises:
            CorruptFrameError: A segment's checksum or size is off.
        """
        ...

    def tags(self, frames: Sequence[Mapping[Stratum, Frame]]) -> torch.Tensor:
        """Return the saliency tags of N blocks, uint8 (L, N, T); ``saliency_tag`` decodes them.

        Raises:
            CorruptFrameError: A segment's checksum or size is off.
        """
        ...


@runtime_checkable
class SelectiveCodec(BlockCodec, Protocol):
    """A codec whose blocks need not hold all of their tokens: it heeds ``KVBlocks.kept``."""

    def kept(
        self, frames: Sequence[Mapping[Stratum, Frame]], shape: BlockShape
    ) -> torch.Tensor | None:
        """Return which tokens the blocks hold, bool (L, H, N, T), or None if all of them.

        Raises:
            CorruptFrameError: A segment's checksum or size is off.
        """
        ...


@runtime_checkable
class PagingCodec(BlockCodec, Protocol):
    """A codec that decodes straight into the pages that attention reads."""

    def decode_to_pages(
        self,
        frames: Sequence[Mapping[Stratum, Frame]],
        shape: BlockShape,
        pages: Callable[[], PageRun],
    ) -> None:
        """Write what ``decode`` returns to pages: keys turned, bit for bit as by ``write_rows``.

        Args:
            frames: As for ``decode``.
            shape: As for ``decode``.
            pages: Called once the frames were found whole; heads of all stored layers as one row.

        Raises:
            CorruptFrameError: A segment's checksum or size is off; nothing was written.
        """
        ...


def readable(strata: set[Stratum]) -> tuple[Stratum, ...]:
    """Return the best valid subset of ``strata`` to read; empty if there is none.

    EXACT alone wins; else BASE with MID and FINE as far as they are consecutive.
    """
    if Stratum.STRATUM_EXACT in strata:
        return (Stratum.STRATUM_EXACT,)
    chosen: list[Stratum] = []
    for stratum in (Stratum.STRATUM_BASE, Stratum.STRATUM_MID, Stratum.STRATUM_FINE):
        if stratum not in strata:
            break
        chosen.append(stratum)
    return tuple(chosen)
