"""Everything that the running sequences of a node hold of KV, within a fixed number of bytes."""

from collections.abc import Sequence
from functools import cached_property

import torch

from kvstrata.engine.compressed_blocks import CompressedBlocks
from kvstrata.engine.first_layer import FirstLayer
from kvstrata.engine.gpu_monitor import GPUMonitor
from kvstrata.engine.kv_arena import ArenaFullError, KVArena
from kvstrata.engine.model import Model
from kvstrata.engine.row_buffer import RowBuffer
from kvstrata.engine.staging import Staging
from kvstrata.kernels.block_pages import Turns
from kvstrata.kernels.row_pages import PAGE_TOKENS, RowPages
from kvstrata.kernels.row_tails import RowTails
from kvstrata.kernels.token_rows import TokenTable
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.calibrated_pages import PageLayout, is_readable_in_place
from kvstrata.methods.codec import BlockCodec
from kvstrata.protos.identity import BLOCK_TOKENS, has_images

MAX_SEQUENCES = 64
_FIRST_COLUMNS = 8  # of the tables: pages for the rows of two blocks


class KVPool:
    """One arena, the tables that lead into it, and what sequences share.

    What attention reads is on the model's device; what says where it lies is in host memory, where
    it is written, and goes to the device with each pass that needs it.

    Attributes:
        model: Whose KV this is.
        arena: The memory; its capacity is the bound.
        rows: Uncompressed rows in pages, by slot of a sequence. Of now: ``widen`` replaces it.
        tails: The newest of them, which fill no page.
        saliency: float32 (slots, layers, kv_heads, 64): sums of the block that fills.
        staging: Copies to the device and back; None where they are plain.
        gpu: Tells what is left of the model's GPU beside the pool, if there is one.
    """

    def __init__(
        self,
        model: Model,
        capacity_bytes: int,
        *,
        max_sequences: int = MAX_SEQUENCES,
        gpu: GPUMonitor | None = None,
        staging: Staging | None = None,
    ) -> None:
        """Reserve ``capacity_bytes`` for the KV of at most ``max_sequences`` at once.

        Raises:
            ValueError: The bytes do not even hold one page of every head.
        """
        spec = model.spec
        page_bytes = 2 * PAGE_TOKENS * spec.head_dim * spec.dtype.itemsize
        least = page_bytes * spec.num_layers * spec.num_kv_heads
        if capacity_bytes < least:
            raise ValueError(
                f"a pool of {capacity_bytes} bytes holds no {PAGE_TOKENS} tokens of {model.name}, "
                f"which take {least}"
            )
        self.model = model
        self.gpu = gpu
        self.staging = staging
        self.arena = KVArena(capacity_bytes, page_bytes, model.device, staging)
        heads = (max_sequences, spec.num_layers, spec.num_kv_heads)
        self._max_columns = spec.max_positions // PAGE_TOKENS + 1  # a step looks one row ahead
        with torch.inference_mode(False):
            self.rows = RowPages(
                self.arena.memory.view(spec.dtype).view(-1, 2, PAGE_TOKENS * spec.head_dim),
                torch.zeros((*heads, min(_FIRST_COLUMNS, self._max_columns)), dtype=torch.int32),
                torch.zeros(heads, dtype=torch.int32),
            )
            self.tails = RowTails.empty(max_sequences, self.pages_per_step)
            self.saliency = torch.zeros((*heads, BLOCK_TOKENS), device=model.device)
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._blocks: dict[tuple[str, str], CompressedBlocks] = {}

    @cached_property
    def first_layer(self) -> FirstLayer:
        """Layer 0 by token id; made for a model whose keys can be turned back."""
        return FirstLayer(self.model)

    def first_layer_kv(
        self, token_ids: Sequence[int], first_position: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return layer 0's K and V of tokens, of text from ``first_layer``; see ``Model``."""
        if self.model.spec.rope != "pre" or has_images(token_ids):
            return self.model.first_layer_kv(token_ids, first_position)
        self.first_layer.learn(token_ids)
        return self.first_layer.read(torch.tensor(token_ids), first_position)

    @cached_property
    def turns(self) -> Turns:
        """Rotation to the first token of block i, for every i."""
        cos, sin = self.model.cos_sin(0, self.model.spec.max_positions)
        return Turns(cos[::BLOCK_TOKENS].contiguous(), sin[::BLOCK_TOKENS].contiguous())

    @cached_property
    def tokens(self) -> TokenTable:
        """Layer 0 by token id, for attention."""
        cos, sin = self.model.cos_sin(0, self.model.spec.max_positions)
        return TokenTable(self.first_layer.keys, self.first_layer.values, cos, sin)

    def turns_of(self, num_blocks: int) -> Turns:
        """Return the first rows of ``turns``."""
        return Turns(self.turns.cos[:num_blocks], self.turns.sin[:num_blocks])

    def free_beyond(self, expected_bytes: int, *, is_alone: bool = False) -> int:
        """Return the bytes that may be promised beyond those that sequences have yet to take.

        Args:
            expected_bytes: What these have yet to take.
            is_alone: Whether they are for a sequence that takes its memory beside the pool, from
                what is left of a GPU.
        """
        free = self.arena.free_bytes - expected_bytes
        on_gpu = self.gpu.free_bytes() if is_alone and self.gpu is not None else None
        return free if on_gpu is None else min(free, on_gpu)

    @property
    def num_free_slots(self) -> int:
        """Sequences that may still be opened."""
        return len(self._free_slots)

    @property
    def pages_per_step(self) -> int:
        """Pages that a sequence needs for its next ``PAGE_TOKENS`` rows."""
        return self.model.spec.num_layers * self.model.spec.num_kv_heads

    def widen(self, num_columns: int) -> RowPages:
        """Return ``rows`` with room in the tables for so many pages of every head."""
        tables = self.rows.tables
        more = min(max(num_columns, 2 * tables.shape[3]), self._max_columns) - tables.shape[3]
        if num_columns > tables.shape[3]:
            with torch.inference_mode(False):
                wider = torch.nn.functional.pad(tables, (0, more))
                self.rows = RowPages(self.rows.memory, wider, self.rows.lengths)
        return self.rows

    @property
    def num_bytes(self) -> int:
        """Bytes in use: KV, the tables that lead to it, and layer 0's shared rows."""
        held = (self.rows.tables, self.rows.lengths, self.tails.firsts, self.tails.pages)
        slot = sum(table[0].nbytes for table in held)
        slots = len(self.saliency) - self.num_free_slots
        tables = sum(blocks.table_bytes for blocks in self._blocks.values())
        shared = self.first_layer.num_bytes if "first_layer" in self.__dict__ else 0
        return self.arena.used_bytes + tables + shared + slots * slot

    def bytes_for(self, codec: BlockCodec | None, num_tokens: int, num_cached: int = 0) -> int:
        """Return about how many bytes of the arena a sequence needs, at its most.

        Args:
            codec: Of its method; None for one whose KV is never held in blocks.
            num_tokens: Its known tokens.
            num_cached: How many of them come as stored blocks.
        """
        spec = self.model.spec
        row = RowBuffer.bytes_for(spec, 1)
        blocks = None if codec is None else self.blocks_of(codec)
        if blocks is None:
            return (num_tokens + BLOCK_TOKENS) * row
        compressed = num_tokens // BLOCK_TOKENS * blocks.bytes_per_block(row * BLOCK_TOKENS // 6)
        return compressed + (num_tokens - num_cached + BLOCK_TOKENS) * row

    @property
    def growth_bytes(self) -> int:
        """Bytes that a sequence that generates needs at once when its pages are full."""
        return self.pages_per_step * self.arena.page_bytes

    def take_slot(self) -> int:
        """Return the place of a new sequence in the tables.

        Raises:
            ArenaFullError: All are taken.
        """
        if not self._free_slots:
            raise ArenaFullError(f"all {len(self.saliency)} places for sequences are taken")
        return self._free_slots.pop()

    def free_slot(self, slot: int) -> None:
        """Take a sequence's place back."""
        assert slot not in self._free_slots
        self.rows.lengths[slot] = 0
        self.saliency[slot] = 0.0
        self._free_slots.append(slot)

    def blocks_of(self, codec: BlockCodec) -> CompressedBlocks | None:
        """Return where a codec's blocks are held as they are stored; None if they cannot be."""
        if not isinstance(codec, CalibratedCodec) or self.model.spec.rope != "pre":
            return None
        if not is_readable_in_place(codec) or codec.first_layer > 1:
            return None
        key = (codec.profile.profile_id, codec.settings())
        if key not in self._blocks:
            self._blocks[key] = CompressedBlocks(PageLayout(codec, self.model.device), self.arena)
        return self._blocks[key]

    def check_integrity(self) -> None:
        """Raise AssertionError unless every byte, slot and row is held once or free."""
        self.arena.check_integrity()
        assert len(set(self._free_slots)) == len(self._free_slots), "a slot is free twice"
        for blocks in self._blocks.values():
            blocks.check_integrity()
