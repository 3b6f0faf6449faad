"""The cache of one running sequence in the pool: compressed blocks, then uncompressed rows.

Tokens 0 to ``base`` lie in blocks as they came from the store, which attention reads in place; the
newest lie uncompressed behind them, in one of two forms. While a prompt is computed they are one
piece (``RowBuffer``), which dense attention reads; when tokens are generated one by one they are
pages, which cost no more than what they hold. A codec whose blocks cannot be read in place has no
blocks here: what it decodes is written to the rows, and ``base`` stays 0.

Example: a prompt of 200 tokens under ``balanced``: 192 of them become 3 blocks, 8 stay rows. After
56 more the fourth block is full; once sealed, ``hold`` takes it in and its rows are freed.
"""

from collections.abc import Mapping, Sequence
from typing import Self

import torch

from kvstrata.engine.attention import AttentionState, LayerRows
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.paged_rows import PagedRows
from kvstrata.engine.paged_states import ChunkState, StepState
from kvstrata.engine.probes import Probes
from kvstrata.engine.row_buffer import RowBuffer
from kvstrata.kernels.page_runs import PageRun
from kvstrata.kernels.rope import rotate
from kvstrata.kernels.row_pages import PAGE_TOKENS
from kvstrata.kernels.saliency import normalised_saliency
from kvstrata.methods.codec import BlockCodec
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BLOCK_TOKENS, has_images


class PagedCache:
    """Keys and values of one sequence. A ``SteppingCache``; not thread-safe.

    Attributes:
        pool: Where everything lies.
        token_ids: The sequence's tokens, shared with whoever runs it; the first ``length`` of them
            are those of the cache.
        length: Tokens held; the position of the next one.
        blocks: Where blocks of the codec are held; None if it has none here.
        block_rows: The held blocks, in order.
        block_tokens: int32 (base,), their tokens.
        slot: This sequence's place in the pool's tables.
        probes: Queries that saliency is computed from, while a prompt is computed.
        counts_saliency: Whether a block fills, whose saliency is counted as its rows pass.
        first_stored_layer: Layers before it are in no block; their K and V come from the tokens.
    """

    def __init__(
        self, pool: KVPool, codec: BlockCodec, token_ids: list[int], probe_tokens: int = 64
    ) -> None:
        """Start empty.

        Raises:
            ArenaFullError: The pool has no place for another sequence.
        """
        self.pool = pool
        self.token_ids = token_ids
        self.length = 0
        # Layer 0's shared table knows the tokens of text alone.
        self.blocks = None if has_images(token_ids) else pool.blocks_of(codec)
        self.block_rows: list[int] = []
        self.block_tokens = torch.zeros(0, dtype=torch.int32)
        self.probes = Probes(pool.model.spec, probe_tokens, pool.model.device)
        self.slot = pool.take_slot()
        self.counts_saliency = True
        self.first_stored_layer = codec.first_layer
        self._block_end = 0
        self._first_seen = 0
        self._last_expected = 0
        self._buffer: RowBuffer | None = None
        self._pages = PagedRows(pool, self.slot, shares_tail=self.blocks is not None)
        self._rows: LayerRows = ()
        self._is_closed = False

    @property
    def base(self) -> int:
        """Tokens in compressed blocks."""
        return len(self.block_rows) * BLOCK_TOKENS

    @property
    def num_rows(self) -> int:
        """Tokens in uncompressed rows."""
        return self.length - self.base

    @property
    def buffer(self) -> RowBuffer:
        """The rows in one piece; there while a prompt's chunk is computed."""
        assert self._buffer is not None
        return self._buffer

    @property
    def has_tail(self) -> bool:
        """Whether its newest rows must be brought to pages for attention; see ``PagedRows``."""
        return self._pages.has_tail

    @property
    def num_bytes(self) -> int:
        """Bytes of this sequence's KV in the arena; shared blocks count in full."""
        blocks = self.blocks.bytes_of(self.block_rows) if self.blocks else 0
        buffer = self._buffer.extent.num_bytes if self._buffer else 0
        return self._pages.num_bytes + blocks + buffer

    @property
    def first_counted_row(self) -> int:
        """The row at which the filling block begins, if its saliency is counted; else -1."""
        if self.probes.rows is not None or not self.counts_saliency:
            return -1
        return self.length // BLOCK_TOKENS * BLOCK_TOKENS - self.base

    def reserve(self, num_tokens: int) -> None:
        """Make room for the next tokens, so that a pass over them cannot fail for want of it.

        Raises:
            ArenaFullError: There is none; what was held is as before.
        """
        if num_tokens > 1:
            self._to_buffer(num_tokens)
        else:
            self.settle_rows()
            self._pages.reserve(self.num_rows + 1)

    def settle_rows(self) -> None:
        """Bring rows into pages, the form for generating token by token.

        Raises:
            ArenaFullError: There is no room for the pages; nothing has changed.
        """
        if self._buffer is not None:
            self._pages.take_over(self._buffer, self.num_rows)
            self.pool.rows.lengths[self.slot] = self.num_rows
            self._buffer = None

    def begin(self, num_tokens: int, rows: LayerRows = ()) -> AttentionState:
        """Make room for the next tokens and return what attends for them; see ``KVCache``."""
        self._check(num_tokens)
        self._to_buffer(num_tokens)
        self._rows = rows
        return ChunkState(self, num_tokens, rows)

    @classmethod
    def begin_step(cls, caches: Sequence[Self], rows: Sequence[LayerRows]) -> AttentionState:
        """Begin the next token of each; see ``SteppingCache``."""
        for cache, own in zip(caches, rows, strict=True):
            cache._check(1)
            cache.reserve(1)
            cache._rows = own
        return StepState(caches, rows)

    def advance(self, num_tokens: int) -> None:
        """Count the tokens of a pass as held."""
        self.probes.count(self.length, self.length + num_tokens)
        if self._buffer is None:
            lengths = self.pool.rows.lengths[self.slot]
            if self._rows:
                ran = [1 if rows is None else len(rows) for rows in self._rows]
                lengths += torch.tensor(ran, dtype=torch.int32)[:, None]
            else:
                lengths += 1
        self.length += num_tokens

    def takes_block(self, index: int) -> bool:
        """Tell whether ``hold`` takes block ``index``."""
        return self.blocks is not None and index <= len(self.block_rows)

    def hold(self, blocks: Sequence[Mapping[Stratum, Frame]], first: int) -> None:
        """Take in blocks as they are stored, from ``first`` on, in the place of rows or blocks.

        Raises:
            ArenaFullError: There is no room; nothing has changed.
            CorruptFrameError: A block is damaged; nothing has changed.
        """
        assert self.blocks is not None
        if first < len(self.block_rows):
            held = slice(first, first + len(blocks))
            self.block_rows[held] = self.blocks.exchange(self.block_rows[held], blocks)
            return
        num_tokens = len(blocks) * BLOCK_TOKENS
        assert self.num_rows >= num_tokens or not self.num_rows, "blocks overlap rows in part"
        tokens = self.token_ids[self.base : self.base + num_tokens]
        self.pool.first_layer.learn(tokens)
        rows = self.blocks.put(blocks)
        if self.num_rows:
            self._drop_rows(num_tokens)
        else:
            self.length += num_tokens
        self.block_rows += rows
        self.block_tokens = torch.cat([self.block_tokens, torch.tensor(tokens, dtype=torch.int32)])

    def write(
        self,
        first: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        layers: slice = slice(None),
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Write rows of some layers at position ``first``; see ``SequenceCache.write``.

        Raises:
            ArenaFullError: There is no room.
        """
        assert self.base <= first <= self.length, "rows behind blocks only, without a gap"
        last = first + keys.shape[2]
        if self._takes_rows(last):
            self._pages.reserve(last - self.base)
            self._pages.write(first - self.base, keys, values, layers, rotation)
            self.count_rows(last)
            return
        self._to_buffer(max(0, last - self.length))
        own = slice(first - self.base, last - self.base)
        if rotation is not None:
            keys = rotate(keys, *rotation)
        self.buffer.keys[layers, :, own] = keys.to(self.buffer.keys.dtype)
        self.buffer.values[layers, :, own] = values.to(self.buffer.values.dtype)
        self.length = max(self.length, last)

    def takes_pages(self, first: int, last: int) -> bool:
        """Tell whether rows ``first`` to ``last`` - 1 would be whole pages: then ``page_run``."""
        is_whole = not (first - self.base) % PAGE_TOKENS and not (last - self.base) % PAGE_TOKENS
        return is_whole and self._takes_rows(last) and self.base <= first <= self.length

    def page_run(
        self,
        first: int,
        last: int,
        layers: slice,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> PageRun:
        """Return where rows of some layers are to be written; ``count_rows`` holds them then.

        Raises:
            ArenaFullError: There is no room.
        """
        self._pages.reserve(last - self.base)
        tables = self._pages.table[layers].flatten(0, 1)
        return PageRun(self.pool.rows.memory, tables, first - self.base, rotation)

    def count_rows(self, last: int) -> None:
        """Count rows in pages as held, up to position ``last`` - 1."""
        if last > self.length:
            self.length = last
            self.pool.rows.lengths[self.slot] = self.num_rows

    def _takes_rows(self, last: int) -> bool:
        """Tell whether rows up to ``last`` go to pages, and not into one piece."""
        return self._buffer is None and (last <= self.length or self._is_of_blocks)

    def read(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of uncompressed rows; see ``SequenceCache.read``.

        Raises:
            ValueError: The range is not within the rows held.
        """
        if not self.base <= first <= last <= self.length:
            raise ValueError(f"positions {first}..{last} are not within {self.base}..{self.length}")
        own = slice(first - self.base, last - self.base)
        if self._buffer is not None:
            return self._buffer.keys[:, :, own], self._buffer.values[:, :, own]
        return self._pages.read(own.start, own.stop)

    @property
    def _is_of_blocks(self) -> bool:
        """Whether full blocks are all that is known but for a token: then no chunk is computed."""
        return len(self.token_ids) % BLOCK_TOKENS <= 1

    def rows_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return one layer's K and V of all uncompressed rows, (num_kv_heads, num_rows, D) each."""
        count = self.num_rows
        if self._buffer is not None:
            return self._buffer.keys[layer, :, :count], self._buffer.values[layer, :, :count]
        keys, values = self._pages.read(0, count, slice(layer, layer + 1))
        return keys[0], values[0]

    def truncate(self, length: int) -> None:
        """Forget all tokens from position ``length`` on.

        Raises:
            ValueError: ``length`` is negative, more than is held, or inside a block.
        """
        if not 0 <= length <= self.length or (length < self.base and length % BLOCK_TOKENS):
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        if length < self.base:
            assert self.blocks is not None
            self._drop_rows(self.num_rows)
            kept = length // BLOCK_TOKENS
            self.blocks.release(self.block_rows[kept:])
            del self.block_rows[kept:]
            self.block_tokens = self.block_tokens[:length].clone()
        self.length = length
        self.probes.truncate(length)
        if self._buffer is None:
            self.pool.rows.lengths[self.slot] = self.num_rows

    def expect_probes(self, first_position: int, last_position: int) -> None:
        """Keep the queries of a prompt's rows as they pass; see ``Probes.expect``."""
        self._last_expected = last_position + BLOCK_TOKENS  # what is behind its blocks as well
        self.probes.expect(first_position, last_position)

    def expect_block(self, last_position: int) -> None:
        """Count the saliency of the block that ends at ``last_position``, as its rows pass."""
        self.probes.forget()
        self._last_expected = last_position
        if self._block_end != last_position:
            self._block_end = last_position
            self._first_seen = self.length
            self.pool.saliency[self.slot] = 0.0

    def saliency(self, first: int, last: int, scaling: float) -> torch.Tensor:
        """Return how much later rows attend to tokens; see ``SequenceCache.saliency``."""
        spec = self.pool.model.spec
        if self.probes.rows is None:
            assert self._block_end - BLOCK_TOKENS == first
            seen = (last - torch.arange(first, last).clamp_min(self._first_seen)).clamp_min(1)
            return self.pool.saliency[self.slot, :, :, : last - first].cpu() / seen
        size = (spec.num_layers, spec.num_kv_heads, last - first)
        found = torch.zeros(size, device=self.pool.model.device)
        queries, positions = self.probes.read()
        for layer in range(spec.num_layers if len(positions) else 0):
            keys = self.keys_of(layer, int(positions[-1]) + 1)[None]
            seen = normalised_saliency(queries[layer : layer + 1], positions, keys, scaling)
            own = seen[0, :, first:last]
            found[layer, :, : own.shape[-1]] = own
        return found.cpu()

    def keys_of(self, layer: int, last: int) -> torch.Tensor:
        """Return one layer's keys from position 0 to ``last`` - 1, (num_kv_heads, last, D)."""
        rows = self.buffer.keys[layer, :, : last - self.base]
        if not self.base:
            return rows
        return torch.cat([self.expanded(layer)[0].to(rows.dtype), rows], 1)

    def expanded(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of all held blocks, in one layer, (num_kv_heads, base, D) each."""
        assert self.blocks is not None
        if layer < self.first_stored_layer:
            return self.pool.first_layer.read(self.block_tokens.long(), 0)
        turns = self.pool.turns_of(len(self.block_rows))
        dtype = self.pool.model.spec.dtype
        return self.blocks.expand(layer - self.first_stored_layer, self.block_rows, turns, dtype)

    def close(self) -> None:
        """Give everything back. Idempotent; the cache must not be used afterwards."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.blocks is not None:
            self.blocks.release(self.block_rows)
        if self._buffer is not None:
            self._buffer.release()
        self._pages.release()
        self.pool.free_slot(self.slot)

    @property
    def _expected(self) -> int:
        """The known tokens, as far as no block is held before they are computed."""
        known = min(len(self.token_ids), self.pool.model.spec.max_positions)
        return known if self.blocks is None else min(known, self._last_expected)

    def _check(self, num_tokens: int) -> None:
        limit = self.pool.model.spec.max_positions
        if self.length + num_tokens > limit:
            raise ValueError(
                f"{self.length + num_tokens} tokens do not fit: the model's limit is {limit} "
                "positions"
            )

    def _to_buffer(self, num_tokens: int) -> None:
        """Bring rows into one piece, with room for ``num_tokens`` more."""
        count = self.num_rows
        needed = count + num_tokens
        buffer = self._buffer
        if buffer is None:
            spec, arena = self.pool.model.spec, self.pool.arena
            pages = -(-(self._expected - self.base) // PAGE_TOKENS)
            buffer = RowBuffer(spec, arena, max(needed, pages * PAGE_TOKENS))
            if count:
                keys, values = self.read(self.base, self.length)
                buffer.keys[:, :, :count], buffer.values[:, :, :count] = keys, values
            self._pages.release()
            self.pool.rows.lengths[self.slot] = 0
            self._buffer = buffer
        elif buffer.capacity < needed:
            buffer.grow(needed, count)

    def _drop_rows(self, num_rows: int) -> None:
        """Free the first rows: all of them, or those of whole blocks; the later ones move up."""
        left = self.num_rows - num_rows
        if self._buffer is None:
            self._pages.drop(num_rows) if left else self._pages.release()
            self.pool.rows.lengths[self.slot] = left
        elif left:
            for part in (self._buffer.keys, self._buffer.values):
                part[:, :, :left] = part[:, :, num_rows : num_rows + left].clone()
        else:
            self._buffer.release()
            self._buffer = None
