import itertools
import math

import numpy as np
import pytest
import torch

from kvstrata.kernels import attend_blocks as module
from kvstrata.kernels.attend_blocks import (
    Attention,
    attend_batch,
    attend_batch_reference,
    attend_blocks,
    attend_blocks_reference,
    attend_window,
    merge_attention,
)
from kvstrata.kernels.attend_blocks_numba import attend_blocks_numba
from kvstrata.kernels.attend_blocks_triton import attend_batch_triton, attend_blocks_triton
from kvstrata.kernels.block_pages import (
    ABSENT,
    BIAS_CODES,
    BIAS_STEPS,
    CODES,
    MASKS,
    MID,
    NUM_FIELDS,
    SCALES,
    SIDE_FIELDS,
    WORDS,
    BlockPages,
    BlockRows,
    PageTable,
    SideTables,
    Turns,
)
from kvstrata.kernels.block_planes import PlaneLayout
from kvstrata.kernels.sign_codes import COEFFICIENTS, FINE_LEVELS

VERSIONS = {
    "reference": attend_blocks_reference,
    "numba": attend_blocks_numba,
    "triton": attend_blocks_triton,
}
BACKENDS = tuple(VERSIONS)
SMALL = (2, 3, 32, 2, 40, (0.1, 0.3, 0.1), True)
# heads, group, dim, blocks, tokens of the last block, shares (escape, mid, dropped), has MID
CASES = {
    "one_head_one_token": (1, 1, 32, 1, 1, (0.0, 0.0, 0.0), True),
    "group3_dim64": (3, 3, 64, 5, 64, (0.02, 0.2, 0.0), True),
    "group4_dim128_tail": (2, 4, 128, 3, 37, (0.05, 0.3, 0.1), True),
    "group8_dim80": (2, 8, 80, 2, 63, (0.1, 0.3, 0.1), True),
    "group5_dim96_base_read": (1, 5, 96, 3, 64, (0.1, 0.3, 0.2), False),
    "group1_dim256": (1, 1, 256, 2, 17, (0.1, 0.5, 0.1), True),
    "all_escapes": (2, 2, 32, 2, 64, (1.0, 0.0, 0.0), True),
    "all_mid": (2, 1, 64, 2, 64, (0.0, 1.0, 0.0), True),
    "planes_only": (2, 1, 64, 2, 64, (0.0, 0.0, 0.0), True),
    "small": SMALL,
}
INTERPRETED = ("one_head_one_token", "small")


def make_tables(heads: int, dim: int, gen: np.random.Generator) -> SideTables:
    widths = np.sort(gen.integers(0, 7, (heads, dim)), 1)[:, ::-1]
    widths[:, dim // 2 :] = np.minimum(widths[:, dim // 2 :], 0)
    if heads > 1:
        widths[0] = 0  # a head without a plane
    counts = torch.from_numpy(gen.integers(0, dim // 8 + 1, heads) * 8)
    layout = PlaneLayout(torch.from_numpy(widths.astype(np.uint8)), counts)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(gen.standard_normal(shape).astype(np.float32))

    inverse = normal(heads, dim, dim) / dim**0.5
    return SideTables(normal(heads, dim), normal(heads, dim).abs() + 0.1, inverse, layout)


def make_pages(case: tuple, seed: int = 0, order: bool = False) -> BlockPages:  # type: ignore[type-arg]
    """Random bits: every string of bits is a block."""
    heads, _, dim, blocks, last, shares, has_mid = case
    gen = np.random.default_rng(seed)
    tables = [make_tables(heads, dim, gen) for _ in "kv"]
    offsets = np.full((blocks, NUM_FIELDS), ABSENT, np.int64)
    arena = bytearray(24)

    def put(data: np.ndarray) -> int:
        arena.extend(bytes(-len(arena) % 8))
        at = len(arena)
        arena.extend(np.ascontiguousarray(data).tobytes())
        return at

    for block in range(blocks):
        for side, table in enumerate(tables):
            kind = gen.choice(4, (heads, 64), p=[1 - sum(shares), *shares])
            masks = np.stack([np.isin(kind, (1, 3)), np.isin(kind, (2, 3))])
            rows = int((kind == 1).sum())
            mid_bytes = int(((kind == 2).sum(1) * table.layout.mid_row_bytes.numpy()).sum())
            at = offsets[block, side * SIDE_FIELDS :]
            at[WORDS] = put(gen.integers(0, 256, 8 * table.layout.num_words, np.uint8))
            at[MASKS] = put(np.packbits(masks, -1, bitorder="little"))
            if has_mid:
                at[MID] = put(gen.integers(0, 256, mid_bytes, np.uint8))
            scales = torch.from_numpy(gen.random(rows) * 0.03 + 0.001).bfloat16()
            at[SCALES] = put(scales.view(torch.int16).numpy())
            at[CODES] = put(gen.integers(-127, 128, (rows, dim), np.int8))
        steps = gen.integers(100, 170, heads, np.uint8) * (gen.random(heads) > 0.3)
        offsets[block, BIAS_STEPS] = put(steps.astype(np.uint8))
        offsets[block, BIAS_CODES] = put(gen.integers(0, 256, heads * dim // 2, np.uint8))
    num_tokens = torch.full((blocks,), 64)
    num_tokens[-1] = last
    held = torch.frombuffer(arena, dtype=torch.uint8).clone()
    # Their starts differ, as those of blocks in a pool do; the reader adds them again.
    starts = torch.from_numpy(gen.integers(0, 9, blocks) * 8)
    wanted = torch.from_numpy(offsets)
    offsets = torch.where(wanted == ABSENT, ABSENT, wanted - starts[:, None]).int()
    return BlockPages(held, BlockRows(starts, num_tokens), offsets, *tables)


def hadamard64(dim: int) -> np.ndarray:
    size = dim & -dim
    signs = [[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]
    return np.kron(np.eye(dim // size), np.array(signs) / math.sqrt(size))


def decode_head(pages: BlockPages, block: int, side: int, head: int) -> tuple[np.ndarray, ...]:
    """Read one head token by token, in float64, from the layout's definition alone."""
    table = (pages.keys, pages.values)[side]
    places = pages.places(torch.tensor([block]))[0].numpy()
    arena, at = pages.arena.numpy(), places[side * SIDE_FIELDS :]
    layout = table.layout
    heads, dim = layout.num_heads, layout.dim
    widths = layout.widths.tolist()

    def bit(start: int, index: int) -> int:
        return int(arena[start + index // 8]) >> (index % 8) & 1

    kinds = [
        [
            bit(int(at[MASKS]), h * 64 + t) + 2 * bit(int(at[MASKS]) + 8 * heads, h * 64 + t)
            for t in range(64)
        ]
        for h in range(heads)
    ]
    mean, scale, inverse = (
        x[head].double().numpy() for x in (table.mean, table.scale, table.inverse)
    )
    escape_row = sum(kind == 1 for row in kinds[:head] for kind in row)
    m = int(layout.mid_counts[head])
    mid_at = int(at[MID]) + sum(
        int(layout.mid_counts[h]) // 4 * kinds[h].count(2) for h in range(head)
    )
    word = sum(sum(row) for row in widths[:head])
    places = {}
    for plane in range(6):
        for c in range(dim):
            if widths[head][c] > plane:
                places[c, plane] = int(at[WORDS]) + 8 * word
                word += 1
    bias_at = pages.places(torch.tensor([block]))[0].numpy()
    step = int(arena[bias_at[BIAS_STEPS] + head])
    packed = arena[bias_at[BIAS_CODES] + head * dim // 2 :][: dim // 2].astype(int)
    bias = (np.concatenate([packed & 15, packed >> 4]) - 8.0) * (
        2.0 ** ((step - 192) / 16) if step else 0
    )
    rows = np.zeros((64, dim))
    for t, kind in enumerate(kinds[head]):
        if kind == 1:
            start = int(at[CODES]) + dim * escape_row
            bits = arena[int(at[SCALES]) + 2 * escape_row :][:2].copy()
            factor = float(torch.from_numpy(bits).view(torch.bfloat16)[0])
            rows[t] = arena[start : start + dim].view(np.int8) * factor @ hadamard64(dim)
            escape_row += 1
            continue
        y = np.zeros(dim)
        for c, width in enumerate(widths[head]):
            signs = [bit(places[c, plane], t) for plane in range(width)]
            y[c] = sum(k * (2 * s - 1) for k, s in zip(COEFFICIENTS[width], signs, strict=True))
            if kind == 2 and at[MID] != ABSENT and c < m:
                quarter = 2 * bit(mid_at, c) + bit(mid_at + m // 8, c)
                code = sum(s << (width - 1 - plane) for plane, s in enumerate(signs))
                y[c] = FINE_LEVELS[width][4 * code + quarter]
        rows[t] = (y * scale + (bias if side == 1 and kind == 0 else 0)) @ inverse + mean
        if kind == 2:
            mid_at += m // 4 if at[MID] != ABSENT else 0
    return rows, np.array(kinds[head])


def rotate64(rows: np.ndarray, position: float, rotary_dim: int) -> np.ndarray:
    half = rotary_dim // 2
    angles = position * 10000.0 ** (-np.arange(half) / half)
    low, high = rows[..., :half], rows[..., half:rotary_dim]
    turned = [
        low * np.cos(angles) - high * np.sin(angles),
        high * np.cos(angles) + low * np.sin(angles),
    ]
    return np.concatenate([*turned, rows[..., rotary_dim:]], -1)


def expected(
    queries: torch.Tensor, pages: BlockPages, starts: list[int], rotary_dim: int, scaling: float
) -> tuple[np.ndarray, np.ndarray]:
    """Expand, turn keys to their positions, softmax in float64."""
    heads = pages.keys.layout.num_heads
    group = queries.shape[0] // heads
    outs, lses = [], []
    for head in range(heads):
        keys, values = [], []
        for block, start in enumerate(starts):
            (k, k_kind), (v, v_kind) = (decode_head(pages, block, side, head) for side in (0, 1))
            num_tokens = int(pages.blocks.num_tokens[block])
            read = (k_kind != 3) & (v_kind != 3) & (np.arange(64) < num_tokens)
            keys.append(rotate64(k, start, rotary_dim)[read])
            values.append(v[read])
        k, v = np.concatenate(keys), np.concatenate(values)
        for query in queries[head * group : head * group + group].double().numpy():
            scores = k @ query * scaling
            lse = np.logaddexp.reduce(scores) if scores.size else -np.inf
            outs.append(np.exp(scores - lse) @ v if scores.size else np.zeros(v.shape[1]))
            lses.append(lse)
    return np.stack(outs), np.array(lses)


def make_turns(starts: list[int], rotary_dim: int) -> Turns:
    half = rotary_dim // 2
    angles = torch.tensor(starts).double()[:, None] * 10000.0 ** (
        -torch.arange(half).double() / half
    )
    angles = torch.cat([angles, angles], 1)
    return Turns(angles.cos().float(), angles.sin().float())


def check(got: Attention, want: tuple[np.ndarray, np.ndarray], terms: int) -> None:
    """Allow float32 rounding of each of ``terms`` terms, relative to the largest output."""
    bound = 2.0**-24 * terms * max(1.0, np.abs(want[0]).max())
    assert got[0].dtype == got[1].dtype == torch.float32
    np.testing.assert_allclose(got[0].numpy(), want[0], rtol=0, atol=bound)
    np.testing.assert_allclose(got[1].numpy(), want[1], rtol=1e-6, atol=bound)


@pytest.mark.parametrize(
    ("backend", "name"),
    [(b, n) for b in BACKENDS[:2] for n in CASES] + [("triton", n) for n in INTERPRETED],
)
def test_equals_softmax_over_expanded_blocks(backend: str, name: str) -> None:
    case = CASES[name]
    heads, group, dim, blocks = case[:4]
    pages = make_pages(case)
    queries = torch.randn(heads * group, dim)
    starts = [64 * (7 * block % 5) for block in range(blocks)]
    got = VERSIONS[backend](queries, pages, make_turns(starts, dim), 0.3)
    check(got, expected(queries, pages, starts, dim, 0.3), 8 * dim)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reads_half_precision_and_strided_queries(backend: str, dtype: torch.dtype) -> None:
    pages = make_pages(SMALL)
    queries = torch.randn(32, 6).to(dtype).mT
    got = VERSIONS[backend](queries, pages, make_turns([0, 64], 16), 0.2)
    check(got, expected(queries.float(), pages, [0, 64], 16, 0.2), 8 * 32)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_moved_blocks_equal_keys_turned_to_the_new_position(backend: str) -> None:
    pages = make_pages(CASES["group3_dim64"])
    queries = torch.randn(9, 64)
    for starts in ([0, 64, 128, 192, 256], [4096, 0, 1, 77, 640]):
        got = VERSIONS[backend](queries, pages, make_turns(starts, 64), 0.2)
        # cos and sin are float32: their error times the largest score is added to the rounding.
        check(got, expected(queries, pages, starts, 64, 0.2), 16 * 64)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("side", [0, SIDE_FIELDS])
@pytest.mark.parametrize("spare", [0, 5, 16])
def test_words_at_the_very_end_of_the_arena_are_read_as_anywhere(
    backend: str, side: int, spare: int
) -> None:
    """``spare`` words behind them: less than a vector reads, or as many."""
    pages, queries, turns = make_pages(SMALL), torch.randn(6, 32), make_turns([0, 64], 32)
    size = 8 * (pages.values if side else pages.keys).layout.num_words
    at = int(pages.places(torch.tensor([1]))[0, side + WORDS])
    arena = torch.cat([pages.arena[: pages.arena.numel() // 8 * 8], pages.arena[at : at + size]])
    offsets = pages.offsets.clone()
    offsets[1, side + WORDS] = arena.numel() - size - int(pages.blocks.starts[1])
    arena = torch.cat([arena, torch.full((8 * spare,), 0xFF, dtype=torch.uint8)])
    moved = BlockPages(arena, pages.blocks, offsets, pages.keys, pages.values)
    for got, want in zip(
        VERSIONS[backend](queries, moved, turns, 0.3),
        VERSIONS[backend](queries, pages, turns, 0.3),
        strict=True,
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_token_output_is_zero_and_lse_minus_infinity(backend: str) -> None:
    pages = make_pages((2, 2, 32, 1, 5, (0.0, 0.0, 1.0), True))
    out, lse = VERSIONS[backend](torch.randn(4, 32), pages, make_turns([0], 32), 1.0)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_no_blocks_give_zero() -> None:
    pages = make_pages(SMALL)
    none = pages.select(torch.zeros(0, dtype=torch.int64))
    out, lse = attend_blocks(torch.randn(6, 32), none, make_turns([], 32), 1.0)
    assert (out == 0).all()
    assert (lse == float("-inf")).all()


def test_parts_merge_to_the_whole_on_any_number_of_threads() -> None:
    pages = make_pages((3, 3, 64, 40, 9, (0.05, 0.2, 0.1), True))
    queries, turns = torch.randn(9, 64) * 4, make_turns(list(range(0, 2560, 64)), 64)
    whole = attend_blocks(queries, pages, turns, 0.3)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(attend_blocks(queries, pages, turns, 0.3), tuple(x.numpy() for x in whole), 512)  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(threads)
    parts = [(torch.zeros(9, 64), torch.full((9,), float("-inf")))]
    for a, b in itertools.pairwise((0, 1, 17, 40)):
        some = pages.select(torch.arange(a, b))
        parts.append(attend_blocks(queries, some, Turns(turns.cos[a:b], turns.sin[a:b]), 0.3))
    check(merge_attention(parts), tuple(x.numpy() for x in whole), 512)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [0, 1, 77])
def test_window_is_softmax_attention(num_tokens: int) -> None:
    queries, keys, values = torch.randn(6, 32), *torch.randn(2, 2, num_tokens, 32)
    out, lse = attend_window(queries, keys, values, 0.3)
    scores = (queries.view(2, 3, 32) @ keys.mT * 0.3).double()
    assert torch.allclose(lse.double(), scores.logsumexp(-1).flatten(), atol=1e-5)
    want = (scores.softmax(-1) @ values.double()).view(6, 32)
    assert torch.allclose(out.double(), want, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_is_no_number_gives_none_and_the_others_do_not_see_it(backend: str) -> None:
    pages, turns = make_pages(SMALL), make_turns([0, 64], 32)
    queries = torch.randn(6, 32)
    told = VERSIONS[backend](queries, pages, turns, 0.3)
    queries[1, 3], queries[5, 0] = torch.nan, torch.inf
    out, lse = VERSIONS[backend](queries, pages, turns, 0.3)
    assert out[[1, 5]].isnan().all()
    assert not lse[[1, 5]].isneginf().any(), "it passes for a head without a token"
    good = [0, 2, 3, 4]
    assert torch.equal(out[good], told[0][good])
    assert torch.equal(lse[good], told[1][good])


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_no_queries_have_no_attention(backend: str) -> None:
    pages, turns = make_pages(SMALL), make_turns([0, 64], 32)
    out, lse = VERSIONS[backend](torch.zeros(0, 32), pages, turns, 0.3)
    assert (out.shape, lse.shape) == ((0, 32), (0,))


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
@pytest.mark.parametrize("side", [0, SIDE_FIELDS])
def test_a_scale_that_is_not_finite_is_refused(side: int, bits: int) -> None:
    pages = make_pages(CASES["group3_dim64"])
    arena, at = pages.arena.clone(), int(pages.places(torch.tensor([4]))[0, side + SCALES])
    arena[at : at + 2] = torch.tensor([bits & 0xFF, bits >> 8], dtype=torch.uint8)
    with pytest.raises(ValueError, match="not finite"):
        BlockPages(arena, pages.blocks, pages.offsets, pages.keys, pages.values)


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no parts"):
        merge_attention([])


@pytest.mark.parametrize(
    "column", [*range(SIDE_FIELDS), SIDE_FIELDS + CODES, BIAS_STEPS, BIAS_CODES]
)
def test_a_part_outside_the_arena_is_refused(column: int) -> None:
    pages = make_pages(CASES["group4_dim128_tail"])
    for at in (-80, pages.arena.numel() // 8 * 8, 2**31 - 8):
        offsets = pages.offsets.clone()
        offsets[1, column] = at
        with pytest.raises(ValueError, match="do not fit the arena"):
            BlockPages(pages.arena, pages.blocks, offsets, pages.keys, pages.values)


BATCHES = {
    "reference": attend_batch_reference,
    "dispatched": attend_batch,
    "triton": attend_batch_triton,
}
PAGES = (3, 3, 64, 40, 9, (0.05, 0.2, 0.1), True)


def rows_of(turns: Turns, rows: list[int]) -> Turns:
    return Turns(turns.cos[rows], turns.sin[rows])


@pytest.mark.parametrize(
    ("version", "threads", "case", "counts"),
    [
        *(("dispatched", n, PAGES, (7, 1, 0, 40, 13, 2, 39)) for n in (1, 2)),
        ("reference", 1, PAGES, (7, 1, 0, 40, 13, 2, 39)),
        ("triton", 1, (2, 3, 32, 6, 9, (0.05, 0.2, 0.1), True), (5, 0, 1, 6)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sequence_of_a_batch_is_attended_as_if_alone(
    version: str,
    threads: int,
    case: tuple,  # type: ignore[type-arg]
    counts: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Ragged lengths, none among them, a page in two sequences, pages out of order."""
    heads, group, dim, blocks = case[:4]
    pages, turns = make_pages(case), make_turns(list(range(0, 64 * blocks, 64)), dim)
    gen = torch.Generator().manual_seed(3)
    sequences = [torch.randperm(blocks, generator=gen)[:count].tolist() for count in counts]
    table = PageTable.of(sequences)
    queries = (torch.randn(len(counts), heads * group, dim, generator=gen) * 3).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse = BATCHES[version](queries, pages, table, turns, 0.2)
    finally:
        torch.set_num_threads(before)
    assert (out.shape, lse.shape) == (queries.shape, queries.shape[:2])
    for i, sequence in enumerate(sequences):
        own = rows_of(turns, list(range(len(sequence))))
        alone = attend_blocks_reference(
            queries[i], pages.select(torch.tensor(sequence, dtype=torch.int64)), own, 0.2
        )
        check((out[i], lse[i]), tuple(x.numpy() for x in alone), 512)  # type: ignore[arg-type]


def test_a_sequence_does_not_see_what_else_is_in_the_batch() -> None:
    pages, turns = make_pages(PAGES), make_turns(list(range(0, 2560, 64)), 64)
    queries = torch.randn(3, 9, 64)
    told = attend_batch(queries[:1], pages, PageTable.of([range(17)]), turns, 0.2)
    table = PageTable.of([range(17), [], range(5, 40)])
    queries[2, 4, 7] = torch.nan
    out, lse = attend_batch(queries, pages, table, turns, 0.2)
    check((out[:1], lse[:1]), tuple(x.numpy() for x in told), 512)  # type: ignore[arg-type]
    assert out[2, 4].isnan().all()
    assert out[2, [0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()
    assert (out[1] == 0).all()
    assert lse[1].isneginf().all()


@pytest.mark.parametrize("version", BATCHES)
def test_rows_are_filled_moved_and_emptied(version: str) -> None:
    case = (2, 1, 32, 4, 9, (0.05, 0.2, 0.1), True)
    pages, turns = make_pages(case), make_turns([0, 64, 128], 32)
    none = pages.select(torch.zeros(0, dtype=torch.int64))
    pool = none.widen(none.blocks.widen(9))
    queries, table = torch.randn(1, 2, 32), PageTable.of([[8, 3, 5]])

    def attended() -> Attention:
        return BATCHES[version](queries, pool, table, turns, 0.2)

    out, lse = attended()
    assert (out == 0).all()
    assert lse.isneginf().all()
    for rows, blocks in (([8, 3], [0, 3]), ([5], [1]), ([3], [2])):
        chosen = pages.select(torch.tensor(blocks))
        pool.put(torch.tensor(rows), chosen.blocks, chosen.offsets)
    want = attend_blocks_reference(
        queries[0], pages.select(torch.tensor([0, 2, 1])), rows_of(turns, [0, 1, 2]), 0.2
    )
    out, lse = attended()
    check((out[0], lse[0]), tuple(x.numpy() for x in want), 512)  # type: ignore[arg-type]
    pool.put(torch.tensor([8]), BlockRows.empty(1), pages.offsets[:1])
    want = attend_blocks_reference(
        queries[0], pages.select(torch.tensor([2, 1])), rows_of(turns, [1, 2]), 0.2
    )
    out, lse = attended()
    check((out[0], lse[0]), tuple(x.numpy() for x in want), 512)  # type: ignore[arg-type]


def test_refused_rows_leave_pages_as_they_were() -> None:
    pages = make_pages(SMALL)
    tables = (pages.offsets, pages.blocks.starts, pages.blocks.num_tokens, pages.counts)
    held, one = [table.clone() for table in tables], pages.blocks.select(torch.tensor([0]))
    bad = pages.offsets[:1].clone()
    bad[0, SIDE_FIELDS + WORDS] = pages.arena.numel()
    with pytest.raises(ValueError, match="do not fit the arena"):
        pages.put(torch.tensor([1]), one, bad)
    for row in (-1, 2):
        with pytest.raises(ValueError, match="below 2"):
            pages.put(torch.tensor([row]), one, pages.offsets[:1])
    for table, before in zip(tables, held, strict=True):
        assert torch.equal(table, before)


def test_bad_tables_are_refused() -> None:
    pages, turns = make_pages(SMALL), make_turns([0, 64], 32)
    table, queries = PageTable.of([[0, 1], [1]]), torch.randn(2, 6, 32)
    attend_batch(queries, pages, table, turns, 1.0)
    for ends in ([0, 2], [0, 2, 4], [1, 2, 3], [0, 3, 2, 3], []):
        with pytest.raises(ValueError, match="ends must rise"):
            PageTable(table.pages, table.places, torch.tensor(ends, dtype=torch.int64))
    with pytest.raises(ValueError, match="but 2 places"):
        PageTable(table.pages, table.places[:2], table.ends)
    with pytest.raises(ValueError, match="not be negative"):
        PageTable(table.pages - 1, table.places, table.ends)
    with pytest.raises(ValueError, match="int64"):
        PageTable(table.pages.int(), table.places, table.ends)
    with pytest.raises(ValueError, match="names page 2 and place 1"):
        attend_batch(queries, pages, PageTable(table.pages + 1, table.places, table.ends), turns, 1)
    with pytest.raises(ValueError, match="names page 1 and place 2"):
        attend_batch(queries, pages, PageTable(table.pages, table.places + 1, table.ends), turns, 1)
    for wrong in (queries[0], queries[:1], queries[:, :5], queries[..., :16]):
        with pytest.raises(ValueError, match="queries must be"):
            attend_batch(wrong, pages, table, turns, 1.0)


def test_bad_input_is_refused() -> None:
    pages, turns = make_pages(SMALL), make_turns([0, 64], 32)
    arena, blocks, offsets, keys, values = (
        getattr(pages, name) for name in ("arena", "blocks", "offsets", "keys", "values")
    )
    with pytest.raises(ValueError, match="multiple of 8"):
        BlockPages(arena, blocks, offsets + 1, keys, values)
    with pytest.raises(ValueError, match="multiple of 8"):
        BlockPages(arena, BlockRows(blocks.starts + 1, blocks.num_tokens), offsets, keys, values)
    for wrong in (65, -1):
        with pytest.raises(ValueError, match="0 to 64"):
            BlockRows(blocks.starts, torch.full_like(blocks.starts, wrong))
    with pytest.raises(ValueError, match="2 starts, but 1 num_tokens"):
        BlockRows(blocks.starts, blocks.num_tokens[:1])
    with pytest.raises(ValueError, match="uint8"):
        BlockPages(arena.float(), blocks, offsets, keys, values)
    for wrong_offsets in (offsets.long(), offsets[:1]):
        with pytest.raises(ValueError, match="offsets must be int32"):
            BlockPages(arena, blocks, wrong_offsets, keys, values)
    with pytest.raises(ValueError, match="queries must be"):
        attend_blocks(torch.randn(5, 32), pages, turns, 1.0)
    with pytest.raises(ValueError, match="bf16"):
        attend_blocks(torch.randn(6, 32).double(), pages, turns, 1.0)
    with pytest.raises(ValueError, match="cos and sin"):
        attend_blocks(torch.randn(6, 32), pages, make_turns([0], 32), 1.0)
    with pytest.raises(ValueError, match="scale must be"):
        SideTables(keys.mean, keys.scale[:, 1:], keys.inverse, keys.layout)
    with pytest.raises(ValueError, match="inverse and the layout must be on one device"):
        SideTables(keys.mean, keys.scale, keys.inverse.to("meta"), keys.layout)
    with pytest.raises(ValueError, match="on the CPU"):
        BlockPages(arena, blocks, offsets.to("meta"), keys, values)
    with pytest.raises(ValueError, match="on the CPU"):
        BlockRows(blocks.starts.to("meta"), blocks.num_tokens)


def test_numba_is_what_runs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "attend_blocks_reference", None)
    attend_blocks(torch.randn(6, 32), make_pages(SMALL), make_turns([0, 64], 32), 1.0)
