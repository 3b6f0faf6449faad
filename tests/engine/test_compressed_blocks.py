"""Blocks in the arena read as the codec decodes them, wherever they lie and whoever shares them."""

from dataclasses import replace

import pytest
import torch

from kvstrata.engine.compressed_blocks import CompressedBlocks
from kvstrata.engine.kv_arena import ArenaFullError, KVArena
from kvstrata.kernels.attend_blocks import attend_batch, attend_window
from kvstrata.kernels.block_pages import PageTable, Turns
from kvstrata.kernels.rope import rotate
from kvstrata.methods import KVBlocks
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.calibrated_pages import PageLayout, is_readable_in_place
from kvstrata.methods.profile import Profile
from kvstrata.protos import Frame
from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import encode_frame
from kvstrata.protos.identity import BLOCK_TOKENS
from tests.methods.blocks import BASE, MID, open_all, seal_all, shape_of
from tests.methods.profiles import blocks_of, make_profile

COUNT = 5
BOTH = (BASE, MID)
LAYERS, HEADS, DIM = 2, 3, 64


@pytest.fixture(scope="module")
def profile() -> Profile:
    return make_profile(LAYERS, HEADS, DIM)


@pytest.fixture(scope="module")
def codec(profile: Profile) -> CalibratedCodec:
    return CalibratedCodec(profile, 0.05, "frame")


@pytest.fixture(scope="module")
def written(profile: Profile, codec: CalibratedCodec) -> KVBlocks:
    return blocks_of(profile, COUNT, form="frame", first_position=128)


@pytest.fixture
def blocks(codec: CalibratedCodec) -> CompressedBlocks:
    return CompressedBlocks(PageLayout(codec), KVArena(1 << 20, 4096))


def turns_of(count: int) -> Turns:
    angles = torch.arange(count)[:, None] * 0.7 ** torch.arange(DIM // 2)
    return Turns(angles.cos().repeat(1, 2), angles.sin().repeat(1, 2))


def decoded(
    codec: CalibratedCodec, written: KVBlocks, turns: Turns, strata: tuple[int, ...] = BOTH
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the codec reads, keys turned to where the blocks stand: (L, H, N * 64, D)."""
    frames = open_all(seal_all(codec, written), strata)  # type: ignore[arg-type]
    keys, values = codec.decode(frames, shape_of(written))
    cos, sin = (table.repeat_interleave(BLOCK_TOKENS, 0) for table in turns)
    return rotate(keys.flatten(2, 3), cos, sin), values.flatten(2, 3)


@pytest.mark.parametrize("strata", [BOTH, (BASE,)], ids=["base+mid", "base"])
def test_expanded_blocks_equal_decoded_ones(
    codec: CalibratedCodec,
    written: KVBlocks,
    blocks: CompressedBlocks,
    strata: tuple[int, ...],
) -> None:
    rows = blocks.put(open_all(seal_all(codec, written), strata))  # type: ignore[arg-type]
    turns = turns_of(COUNT)
    keys, values = decoded(codec, written, turns, strata)
    for layer in range(LAYERS):
        got = blocks.expand(layer, rows, turns, torch.float32)
        torch.testing.assert_close(got[0], keys[layer], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(got[1], values[layer], rtol=1e-4, atol=1e-4)
    some = blocks.expand(1, [rows[3], rows[1]], turns_of(2), torch.float32)
    assert some[0].shape == (HEADS, 2 * BLOCK_TOKENS, DIM)


def test_attention_reads_them_in_place(
    codec: CalibratedCodec, written: KVBlocks, blocks: CompressedBlocks
) -> None:
    rows = blocks.put(open_all(seal_all(codec, written)))
    turns = turns_of(COUNT)
    keys, values = decoded(codec, written, turns)
    queries = torch.randn(2, 2 * HEADS, DIM) / 4
    table = PageTable.of([rows, rows[:2]])
    for layer in range(LAYERS):
        out, lse = attend_batch(queries, blocks.layers[layer], table, turns, 0.2)
        for i, n in enumerate((COUNT, 2)):
            own = (part[layer, :, : n * BLOCK_TOKENS] for part in (keys, values))
            wanted = attend_window(queries[i], *own, 0.2)
            torch.testing.assert_close(out[i], wanted[0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(lse[i], wanted[1], rtol=1e-3, atol=1e-3)


def test_tokens_that_are_left_out_are_not_attended(
    codec: CalibratedCodec, written: KVBlocks, blocks: CompressedBlocks
) -> None:
    kept = torch.rand(written.saliency.shape) < 0.6
    some = replace(written, kept=kept)
    rows, turns = blocks.put(open_all(seal_all(codec, some))), turns_of(COUNT)
    keys, values = decoded(codec, some, turns)
    queries = torch.randn(1, HEADS, DIM) / 4
    for layer in range(LAYERS):
        out, lse = attend_batch(queries, blocks.layers[layer], PageTable.of([rows]), turns, 0.2)
        for head in range(HEADS):
            own = kept[layer, head].flatten()
            wanted = attend_window(
                queries[0, head : head + 1],
                keys[layer, head : head + 1, own],
                values[layer, head : head + 1, own],
                0.2,
            )
            torch.testing.assert_close(out[0, head], wanted[0][0], rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(lse[0, head], wanted[1][0], rtol=1e-3, atol=1e-3)


def test_blocks_that_move_are_read_as_before(codec: CalibratedCodec, profile: Profile) -> None:
    """Every second block is released, and a large extent needs their bytes in one piece."""
    arena = KVArena(1 << 20, 4096)
    blocks = CompressedBlocks(PageLayout(codec), arena)
    written = blocks_of(profile, 24, form="frame", first_position=64)
    sealed = open_all(seal_all(codec, written))
    rows = []
    while arena.free_bytes > 64 * 1024:
        rows += blocks.put([sealed[len(rows) % 24]])
    turns = turns_of(len(rows))
    before = blocks.expand(1, rows[1::2], Turns(*(t[1::2] for t in turns)), torch.float32)
    blocks.release(rows[::2])
    at = [int(blocks.layers[0].blocks.starts[row]) for row in rows[1::2]]
    arena.allocate(arena.free_bytes - 64)
    moved = [int(blocks.layers[0].blocks.starts[row]) for row in rows[1::2]]
    assert moved != at
    after = blocks.expand(1, rows[1::2], Turns(*(t[1::2] for t in turns)), torch.float32)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    arena.check_integrity()
    blocks.check_integrity()


def test_the_last_holder_frees_a_block(
    codec: CalibratedCodec, written: KVBlocks, blocks: CompressedBlocks
) -> None:
    arena = blocks._arena
    rows = blocks.put(open_all(seal_all(codec, written)))
    held = arena.used_bytes
    assert held == blocks.num_bytes
    blocks.share(rows[:2])
    blocks.release(rows)
    assert blocks.num_blocks == 2
    assert 0 < arena.used_bytes < held
    blocks.check_integrity()
    blocks.release(rows[:2])
    assert (arena.used_bytes, blocks.num_blocks, blocks.num_bytes) == (0, 0, 0)
    again = blocks.put(open_all(seal_all(codec, written)))
    assert sorted(again) == sorted(rows)
    blocks.check_integrity()


def test_blocks_take_no_more_memory_than_their_segments(
    codec: CalibratedCodec, written: KVBlocks, blocks: CompressedBlocks
) -> None:
    sealed = open_all(seal_all(codec, written))
    blocks.put(sealed)
    segments = sum(len(s) for b in sealed for f in b.values() for s in f.segments().values())
    assert blocks.num_bytes < segments + COUNT * (64 + 8 * LAYERS)


def test_what_does_not_fit_leaves_nothing_behind(codec: CalibratedCodec, written: KVBlocks) -> None:
    arena = KVArena(32 * 1024, 4096)
    blocks = CompressedBlocks(PageLayout(codec), arena)
    with pytest.raises(ArenaFullError):
        blocks.put(open_all(seal_all(codec, written)))
    assert (arena.used_bytes, blocks.num_blocks) == (0, 0)
    blocks.check_integrity()


def test_damage_is_told_and_leaves_nothing_behind(
    codec: CalibratedCodec, written: KVBlocks, blocks: CompressedBlocks
) -> None:
    sealed = open_all(seal_all(codec, written))
    for change in (lambda s: s[:-2], lambda s: s + b"\0\0", lambda s: s[:90], lambda s: b""):
        frame = sealed[1][BASE]
        segments = {layer: bytes(s) for layer, s in frame.segments().items()}
        segments[2] = change(segments[2])
        damaged = sealed[1] | {BASE: Frame.open(encode_frame(frame.header, segments))}
        with pytest.raises(CorruptFrameError):
            blocks.put([sealed[0], damaged])
    blocks.check_integrity()
    assert blocks._arena.used_bytes == 0


def test_scales_that_are_no_numbers_are_told(
    codec: CalibratedCodec, written: KVBlocks, blocks: CompressedBlocks
) -> None:
    sealed = open_all(seal_all(codec, written))
    frame = sealed[0][BASE]
    segments = {layer: bytearray(s) for layer, s in frame.segments().items()}
    fixed = sum(blocks.layout._segments.fixed_sizes(0))
    segments[1][fixed : fixed + 2] = b"\xff\x7f"
    damaged = sealed[0] | {BASE: Frame.open(encode_frame(frame.header, segments))}
    with pytest.raises(CorruptFrameError, match="finite"):
        blocks.put([damaged])
    assert blocks._arena.used_bytes == 0


def test_other_forms_cannot_be_read_in_place(profile: Profile) -> None:
    pre = CalibratedCodec(profile, 0.05, "pre")
    odd = CalibratedCodec(make_profile(1, 2, 12), 0.05, "frame")
    assert not is_readable_in_place(pre)
    assert not is_readable_in_place(odd)
    with pytest.raises(ValueError, match="in place"):
        PageLayout(pre)
