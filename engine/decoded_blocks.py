"""Stored blocks to uncompressed rows of a cache: straight into its pages, where there are some."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import cast

import torch

from kvstrata.engine.cache import SequenceCache
from kvstrata.engine.paged_cache import PagedCache
from kvstrata.methods.codec import BlockCodec, BlockShape, PagingCodec
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS


def write_decoded(
    cache: SequenceCache | PagedCache,
    codec: BlockCodec,
    blocks: Sequence[Mapping[Stratum, Frame]],
    shape: BlockShape,
    first: int,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Write the stored layers of blocks from position ``first`` on; keys turned by ``rotation``.

    Raises:
        ArenaFullError: There is no room.
        CorruptFrameError: A block is damaged; nothing counts as held that was not.
    """
    layers, last = slice(codec.first_layer, None), first + len(blocks) * BLOCK_TOKENS
    groups = [list(group) for _, group in groupby(blocks, key=sorted)]
    is_paged = isinstance(cache, PagedCache) and cache.takes_pages(first, last)
    if len(groups) == 1 and is_paged and isinstance(codec, PagingCodec):
        paged = cast(PagedCache, cache)
        codec.decode_to_pages(
            groups[0], shape, lambda: paged.page_run(first, last, layers, rotation)
        )
        paged.count_rows(last)
        return
    decoded = [codec.decode(group, shape) for group in groups]
    keys, values = (
        (torch.cat(parts, 2) if parts[1:] else parts[0]).flatten(2, 3)
        for parts in zip(*decoded, strict=True)
    )
    cache.write(first, keys, values, layers, rotation)
