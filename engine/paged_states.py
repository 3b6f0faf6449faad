"""What attends for sequences in the pool: a chunk of one prompt, or the next token of many.

Each part of what a token sees is attended on its own and merged by the logarithm of its softmax
sum: compressed blocks, layer 0's shared rows, uncompressed rows.

Legend: R sequences of a step, n tokens of a chunk, H KV heads, G query heads per KV head, D
head_dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from kvstrata.engine.attention import LayerRows
from kvstrata.engine.compressed_blocks import CompressedBlocks
from kvstrata.kernels.attend_blocks import Attention, attend_batch, merge_attention
from kvstrata.kernels.attend_dense import attend_dense
from kvstrata.kernels.block_pages import PageTable
from kvstrata.kernels.row_pages import RowStep, attend_rows, step_rows
from kvstrata.kernels.row_saliency import add_row_saliency
from kvstrata.kernels.row_tails import stage_rows
from kvstrata.kernels.token_rows import TokenRows, attend_tokens

if TYPE_CHECKING:
    from kvstrata.engine.paged_cache import PagedCache


class ChunkState:
    """Attends for the next tokens of one sequence, whose rows are in one piece."""

    def __init__(self, cache: "PagedCache", num_tokens: int, rows: LayerRows) -> None:
        """Serve one pass."""
        self._cache = cache
        self._num_tokens = num_tokens
        self._layer_rows = rows

    def rows(self, layer: int) -> torch.Tensor | None:
        """Return which of the new tokens run this layer; see ``AttentionState.rows``."""
        return self._layer_rows[layer] if self._layer_rows else None

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Write the new rows, and attend over blocks and rows; see ``AttentionState.attend``."""
        cache, buffer = self._cache, self._cache.buffer
        first, count = cache.num_rows, keys.shape[1]
        buffer.keys[layer, :, first : first + count] = keys
        buffer.values[layer, :, first : first + count] = values
        parts = [attend_dense(queries, keys, values, scaling, is_causal=True)]
        if first:
            old_keys, old_values = buffer.keys[layer, :, :first], buffer.values[layer, :, :first]
            parts.append(attend_dense(queries, old_keys, old_values, scaling))
        if cache.base:
            parts.append(self._attend_blocks(layer, queries, scaling))
        out, lse = merge_attention(parts) if len(parts) > 1 else parts[0]
        cache.probes.keep(layer, cache.length, queries)
        if cache.first_counted_row >= 0:
            self._count(layer, queries, lse, scaling)
        return out.to(queries.dtype)

    def _attend_blocks(self, layer: int, queries: torch.Tensor, scaling: float) -> Attention:
        cache = self._cache
        assert cache.blocks is not None
        stored = layer - cache.first_stored_layer
        if stored < 0 or cache.blocks.are_whole(cache.block_rows):
            return attend_dense(queries, *cache.expanded(layer), scaling)
        # Some tokens are left out, others in each head: row by row, each like a sequence.
        table = PageTable.of([cache.block_rows] * queries.shape[1])
        rows = queries.transpose(0, 1).contiguous()
        turns = cache.pool.turns_of(len(cache.block_rows))
        out, lse = attend_batch(rows, cache.blocks.layers[stored], table, turns, scaling)
        return out.transpose(0, 1), lse.T

    def _count(self, layer: int, queries: torch.Tensor, lse: torch.Tensor, scaling: float) -> None:
        """Add the attention that the new rows pay to the block that fills."""
        cache, count = self._cache, queries.shape[1]
        start, last = cache.first_counted_row, cache.num_rows + count
        keys = cache.buffer.keys[layer, :, start:last].float()
        grouped = queries.float().unflatten(0, (len(keys), -1))
        scores = grouped @ keys[:, None].mT * scaling - lse.unflatten(0, (len(keys), -1))[..., None]
        hidden = torch.ones(count, last - start, dtype=torch.bool, device=keys.device)
        hidden = hidden.triu(last - start - count + 1)
        weights = scores.exp().masked_fill(hidden, 0.0).mean(1).sum(1)
        cache.pool.saliency[cache.slot, layer, :, : last - start] += weights


@dataclass(frozen=True)
class _Group:
    """Sequences of a step whose blocks are of one codec."""

    blocks: CompressedBlocks
    first_stored_layer: int
    members: list[int]
    index: torch.Tensor
    table: PageTable
    tokens: TokenRows


def _token_rows(sequences: Sequence[torch.Tensor]) -> TokenRows:
    lengths = torch.tensor([0, *map(len, sequences)])
    return TokenRows(torch.cat(list(sequences)), lengths.cumsum(0))


class _Plan:
    """What the calls of all layers share that run for the same sequences."""

    def __init__(self, caches: Sequence["PagedCache"]) -> None:
        self.caches = caches
        self.pool = caches[0].pool
        self.step = RowStep(self.pool.rows, torch.tensor([cache.slot for cache in caches]))
        firsts = [cache.first_counted_row for cache in caches]
        self.counts = any(first >= 0 for first in firsts)
        self.has_tails = any(cache.has_tail for cache in caches)
        device = self.pool.model.device
        self.firsts = torch.tensor(firsts, dtype=torch.int32, device=device)

    @cached_property
    def groups(self) -> list[_Group]:
        """The sequences that hold blocks, by codec."""
        members: dict[int, list[int]] = {}
        for i, cache in enumerate(self.caches):
            if cache.base:
                members.setdefault(id(cache.blocks), []).append(i)
        groups = []
        for chosen in members.values():
            first = self.caches[chosen[0]]
            assert first.blocks is not None
            table = PageTable.of([self.caches[i].block_rows for i in chosen])
            index = torch.tensor(chosen, device=self.pool.model.device)
            tokens = _token_rows([self.caches[i].block_tokens for i in chosen])
            stored = first.first_stored_layer
            groups.append(_Group(first.blocks, stored, chosen, index, table, tokens))
        return groups

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Return outputs (R, H * G, D) of queries (R, H * G, D), keys and values (R, H, D)."""
        if self.has_tails:
            stage_rows(self.pool.tails, self.step, layer, (keys, values))
        out, lse = step_rows(queries, keys, values, self.step, layer, scaling)
        for group in self.groups:
            part = self.attend_group(group, layer, queries, scaling)
            if len(group.members) == len(self.caches):
                out, lse = merge_attention([(out, lse), part])
            else:
                at = group.index
                out[at], lse[at] = merge_attention([(out[at], lse[at]), part])
        if self.counts:
            sums = self.pool.saliency
            add_row_saliency(queries, lse, self.step, layer, scaling, self.firsts, sums)
        return out

    def attend_group(
        self, group: _Group, layer: int, queries: torch.Tensor, scaling: float
    ) -> Attention:
        """Return outputs over the blocks of a group; of its members alone."""
        own = queries if len(group.members) == len(self.caches) else queries[group.index]
        if layer >= group.first_stored_layer:
            pages = group.blocks.layers[layer - group.first_stored_layer]
            return attend_batch(own, pages, group.table, self.pool.turns, scaling)
        return attend_tokens(own, self.pool.tokens, group.tokens, scaling)


class StepState:
    """Attends for the next token of each of some sequences, whose rows are in pages."""

    def __init__(self, caches: Sequence["PagedCache"], rows: Sequence[LayerRows]) -> None:
        """Serve one pass; ``rows`` tell per sequence which layers its token runs."""
        self._caches = caches
        self._layer_rows = rows
        self._everyone = None if any(rows) else tuple(range(len(caches)))
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def rows(self, layer: int) -> torch.Tensor | None:
        """Return which of the sequences run this layer; see ``AttentionState.rows``."""
        if self._everyone is not None:
            return None
        running = self._running(layer)
        return None if len(running) == len(self._caches) else torch.tensor(running).long()

    def attend(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Append the new rows, and attend; see ``AttentionState.attend``."""
        running = self._running(layer)
        if running not in self._plans:
            self._plans[running] = _Plan([self._caches[i] for i in running])
        q, k, v = (part.transpose(0, 1) for part in (queries, keys, values))
        out = self._plans[running].attend(layer, q, k, v, scaling)
        return out.to(queries.dtype).transpose(0, 1)

    def _running(self, layer: int) -> tuple[int, ...]:
        if self._everyone is not None:
            return self._everyone
        return tuple(
            i
            for i, rows in enumerate(self._layer_rows)
            if not rows or rows[layer] is None or len(rows[layer])  # type: ignore[arg-type]
        )


class HeldTokens:
    """Attends for one token over what a cache holds, the token itself included."""

    def __init__(self, cache: "PagedCache") -> None:
        """Bring the cache's rows into pages."""
        cache.settle_rows()
        self._plan = _Plan([cache])
        self._has_rows = cache.num_rows > 0

    def attend(self, layer: int, queries: torch.Tensor, scaling: float) -> torch.Tensor:
        """Return outputs of queries, both (H * G, 1, D)."""
        plan, own = self._plan, queries.transpose(0, 1).contiguous()
        parts = []
        if self._has_rows:
            if plan.has_tails:
                stage_rows(plan.pool.tails, plan.step, layer)
            parts.append(attend_rows(own, plan.step, layer, scaling))
        parts += [plan.attend_group(group, layer, own, scaling) for group in plan.groups]
        out = parts[0][0] if len(parts) == 1 else merge_attention(parts)[0]
        return out.to(queries.dtype).transpose(0, 1)
