"""Attention over rows in pages: what dense attention gives, wherever the pages lie."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from kvstrata.kernels.attend_blocks import Attention
from kvstrata.kernels.row_pages import (
    PAGE_TOKENS,
    RowPages,
    RowStep,
    attend_rows,
    read_rows,
    step_rows,
    step_rows_reference,
    write_rows,
    write_rows_reference,
)
from kvstrata.kernels.row_pages_numba import SPLIT_ROWS, step_rows_numba
from kvstrata.kernels.row_pages_triton import SPLIT_ROWS as GPU_SPLIT_ROWS
from kvstrata.kernels.row_pages_triton import attend_rows_triton, step_rows_triton

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
LONG = SPLIT_ROWS + 17
interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter


def assert_near(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


class Case:
    """Sequences of the given lengths, their pages scattered over memory that is NaN elsewhere."""

    def __init__(
        self,
        lengths: list[int],
        *,
        heads: int = 2,
        group: int = 3,
        dim: int = 64,
        dtype: torch.dtype = torch.float32,
        layers: int = 2,
    ) -> None:
        count = len(lengths)
        width = max(lengths) // PAGE_TOKENS + 1
        num_pages = count * layers * heads * width + 5
        memory = torch.full((num_pages, 2, PAGE_TOKENS * dim), float("nan"), dtype=dtype)
        order = torch.randperm(num_pages)[: count * layers * heads * width].to(torch.int32)
        tables = order.view(count, layers, heads, width)
        held = torch.tensor(lengths, dtype=torch.int32)[:, None, None].repeat(1, layers, heads)
        self.pages = RowPages(memory, tables, held)
        self.rows = [torch.randn(2, count, heads, n + 1, dim).to(dtype) for n in lengths]
        for i, n in enumerate(lengths):
            for layer in range(layers):
                keys, values = self.rows[i][:, i, :, :n]
                write_rows(memory, tables[i, layer], 0, keys, values)
        self.queries = torch.randn(count, heads * group, dim).to(dtype)
        self.new = [
            torch.stack([rows[side, i, :, -1] for i, rows in enumerate(self.rows)])
            for side in (0, 1)
        ]
        self.step = RowStep(self.pages, torch.arange(count))
        self.scaling = dim**-0.5

    def expected(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.rows[i][:, i].double()
        grouped = self.queries[i].double().view(keys.shape[0], -1, keys.shape[2])
        scores = grouped @ keys.mT * self.scaling
        return (scores.softmax(-1) @ values).flatten(0, 1), scores.logsumexp(-1).flatten()

    def check(self, tolerance: float, attend: Callable[..., Attention] = step_rows) -> None:
        out, lse = attend(self.queries, *self.new, self.step, 1, self.scaling)
        assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
        for i in range(len(self.rows)):
            wanted = self.expected(i)
            assert_near(out[i], wanted[0], tolerance)
            assert_near(lse[i], wanted[1], tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_attention_over_pages_equals_dense_attention(
    dtype: torch.dtype, group: int, dim: int
) -> None:
    Case([0, 1, 15, 16, 33], group=group, dim=dim, dtype=dtype).check(DTYPES[dtype])


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dim", [32, 80])
def test_a_processor_without_products_of_pairs_gets_the_same(group: int, dim: int) -> None:
    case = Case([0, 1, 15, 16, 33, LONG], group=group, dim=dim, dtype=torch.bfloat16)
    case.check(1e-5, partial(step_rows_numba, is_generic=True))
    out, lse = step_rows(case.queries, *case.new, case.step, 1, case.scaling)
    for i in range(len(case.rows)):
        wanted = case.expected(i)
        assert_near(lse[i], wanted[1])
        # Weights are rounded to 8 bits, half to even: each is off by one part in 512 at most.
        largest = case.rows[i][1, i].abs().max().item()
        assert (out[i] - wanted[0]).abs().max() <= largest / 512 + 1e-5


@interpreted
@pytest.mark.parametrize(
    ("lengths", "heads", "group", "dim", "dtype"),
    [
        ([0], 1, 1, 32, torch.float32),
        ([0, 1, 15, 16, 33], 2, 3, 64, torch.float16),  # the interpreter multiplies no bf16
        ([5, 47], 1, 4, 80, torch.float16),
        ([31], 2, 5, 96, torch.float32),
        ([70, 2], 1, 8, 128, torch.float16),
        ([17], 1, 17, 256, torch.float32),
        ([GPU_SPLIT_ROWS - 1, GPU_SPLIT_ROWS, 3], 1, 1, 16, torch.float32),
        ([2 * GPU_SPLIT_ROWS + 9, 0], 1, 2, 8, torch.float32),
    ],
    ids=str,
)
def test_triton_s_attention_equals_dense_attention(
    lengths: list[int], heads: int, group: int, dim: int, dtype: torch.dtype
) -> None:
    case = Case(lengths, heads=heads, group=group, dim=dim, dtype=dtype)
    case.check(DTYPES[dtype], step_rows_triton)
    for i, n in enumerate(lengths):
        keys, values = read_rows(case.pages.memory, case.pages.tables[i, 1], 0, n + 1)
        assert torch.equal(keys[:, :n], case.rows[i][0, i, :, :n])
        assert torch.equal(values[:, :n], case.rows[i][1, i, :, :n])
        assert torch.equal(keys[:, n], case.new[0][i])
        assert torch.equal(values[:, n], case.new[1][i])


@interpreted
def test_on_a_gpu_a_sequence_is_not_moved_by_the_others() -> None:
    case = Case([GPU_SPLIT_ROWS + 40, 3, 40], layers=1, dim=32)
    case.pages.lengths[2, 0, 1] = 7
    step = RowStep(case.pages, torch.tensor([2, 0, 1]))
    case.queries[1, 2] = float("nan")
    rows = [rows[[2, 0, 1]] for rows in (case.queries, *case.new)]
    out, lse = step_rows_triton(*rows, step, 0, case.scaling)
    assert out[2, 2].isnan().all()
    assert out[:2].isfinite().all()
    for i in range(3):
        alone = RowStep(case.pages, step.slots[i : i + 1])
        one = step_rows_triton(*(rows[i : i + 1] for rows in rows), alone, 0, case.scaling)
        assert torch.equal(one[0][0].nan_to_num(), out[i].nan_to_num())
        assert torch.equal(one[1][0].nan_to_num(), lse[i].nan_to_num())
    wanted = step_rows_reference(*rows, step, 0, case.scaling)
    torch.testing.assert_close((out, lse), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dim", [8, 24])
def test_other_head_sizes_run_the_reference(dim: int) -> None:
    Case([0, 19], dim=dim).check(1e-5)


@pytest.mark.parametrize("lengths", [[LONG], [SPLIT_ROWS - 1, 3, SPLIT_ROWS], [2 * LONG, 0]])
def test_long_sequences_are_split_and_merged(lengths: list[int]) -> None:
    Case(lengths).check(1e-5)


def test_the_reference_equals_dense_attention() -> None:
    case = Case([0, 20])
    out, lse = step_rows_reference(case.queries, *case.new, case.step, 1, case.scaling)
    wanted = [case.expected(i) for i in range(2)]
    assert_near(out, torch.stack([w[0] for w in wanted]))
    assert_near(lse, torch.stack([w[1] for w in wanted]))


def test_heads_and_layers_may_hold_different_numbers_of_rows() -> None:
    case = Case([40, 25])
    case.pages.lengths[0, 1, 1] = 3
    case.pages.lengths[1, 1, 0] = 17
    step = RowStep(case.pages, torch.arange(2))
    out, lse = step_rows(case.queries, *case.new, step, 1, case.scaling)
    for i, head, held in ((0, 0, 40), (0, 1, 3), (1, 0, 17), (1, 1, 25)):
        case.rows[i][:, i, head, held] = case.rows[i][:, i, head, -1]
        keys, values = case.rows[i][:, i, head, : held + 1].double()
        own = slice(3 * head, 3 * head + 3)
        scores = case.queries[i, own].double() @ keys.mT * case.scaling
        assert_near(out[i, own], scores.softmax(-1) @ values)
        assert_near(lse[i, own], scores.logsumexp(-1))


def test_the_new_row_is_in_its_page_and_nothing_else_changed() -> None:
    case = Case([15, 16])
    before = case.pages.memory.clone()
    step_rows(case.queries, *case.new, case.step, 1, case.scaling)
    for i, n in enumerate([15, 16]):
        keys, values = read_rows(case.pages.memory, case.pages.tables[i, 1], n, n + 1)
        assert torch.equal(keys[:, 0], case.new[0][i])
        assert torch.equal(values[:, 0], case.new[1][i])
    changed = ~((before == case.pages.memory) | (before.isnan() & case.pages.memory.isnan()))
    assert int(changed.sum()) == 2 * 2 * 2 * 64
    assert case.pages.lengths[:, 1, 0].tolist() == [15, 16]


@pytest.mark.parametrize(("first", "last"), [(0, 40), (5, 5), (16, 32), (7, 39), (39, 40)])
def test_rows_come_back_as_they_were_written(first: int, last: int) -> None:
    case = Case([40])
    keys, values = read_rows(case.pages.memory, case.pages.tables[0, 0], first, last)
    assert torch.equal(keys, case.rows[0][0, 0, :, first:last])
    assert torch.equal(values, case.rows[0][1, 0, :, first:last])


def test_scores_that_are_no_numbers_are_not_hidden() -> None:
    case = Case([20, 20])
    case.queries[1] = float("nan")
    out, lse = step_rows(case.queries, *case.new, case.step, 0, case.scaling)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()


def test_a_sequence_is_not_moved_by_the_others() -> None:
    case = Case([700, 3, 40])
    out, lse = step_rows(case.queries, *case.new, case.step, 1, case.scaling)
    for i in range(3):
        alone = RowStep(case.pages, torch.tensor([i]))
        one = [rows[i : i + 1] for rows in (case.queries, *case.new)]
        out_alone, lse_alone = step_rows(*one, alone, 1, case.scaling)
        assert torch.equal(out_alone[0], out[i])
        assert torch.equal(lse_alone[0], lse[i])


def test_what_does_not_belong_together_is_refused() -> None:
    case = Case([15, 31])
    keys, values = case.new
    for wrong, message in (
        ((case.queries[:1], keys, values), "queries must be"),
        ((case.queries, keys[:, :1], values), "keys and values"),
        ((case.queries.bfloat16(), keys, values), "as the pages are"),
    ):
        with pytest.raises(ValueError, match=message):
            step_rows(*wrong, case.step, 0, 1.0)
    with pytest.raises(ValueError, match="layer must be"):
        step_rows(case.queries, keys, values, case.step, 2, 1.0)
    for slots, message in (
        (torch.tensor([2]), "slots must be in"),
        (torch.tensor([0.0]), "slots must be int64"),
        (torch.zeros(0, dtype=torch.int64), "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            RowStep(case.pages, slots)
    case.pages.lengths[0, 0, 0] = 2 * PAGE_TOKENS
    with pytest.raises(ValueError, match="no room"):
        RowStep(case.pages, torch.tensor([0]))
    pages = case.pages
    for memory, tables, lengths, message in (
        (pages.memory.double(), pages.tables, pages.lengths, "memory must be"),
        (pages.memory[:, :, :-1], pages.tables, pages.lengths, "16 tokens"),
        (pages.memory, pages.tables.long(), pages.lengths, "must be int32"),
        (pages.memory, pages.tables[:1], pages.lengths, "tables must be"),
        (pages.memory, pages.tables.mT.contiguous().mT, pages.lengths, "contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            RowPages(memory, tables, lengths)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 8], ids=lambda dim: f"dim{dim}")
def test_attending_without_a_new_row_gives_what_the_step_that_wrote_it_gave(
    dtype: torch.dtype, dim: int
) -> None:
    case = Case([0, 15, 16, LONG], dim=dim, dtype=dtype)
    wanted = step_rows(case.queries, *case.new, case.step, 1, case.scaling)
    memory = case.pages.memory.clone()
    case.pages.lengths.add_(1)
    got = attend_rows(case.queries, RowStep(case.pages, case.step.slots), 1, case.scaling)
    for one, other in zip(got, wanted, strict=True):
        assert_near(one, other.double(), 1e-6)
    assert torch.equal(memory.view(torch.uint8), case.pages.memory.view(torch.uint8))


@interpreted
def test_so_it_does_on_a_gpu() -> None:
    case = Case([0, 15, 16, GPU_SPLIT_ROWS], dim=16, dtype=torch.float32)
    wanted = step_rows_triton(case.queries, *case.new, case.step, 1, case.scaling)
    memory = case.pages.memory.clone()
    case.pages.lengths.add_(1)
    got = attend_rows_triton(case.queries, RowStep(case.pages, case.step.slots), 1, case.scaling)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(memory.view(torch.uint8), case.pages.memory.view(torch.uint8))


def test_a_head_without_rows_has_nothing_to_attend_to() -> None:
    case = Case([0, 3])
    with pytest.raises(ValueError, match="no row"):
        attend_rows(case.queries, case.step, 0, case.scaling)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [32, 64, 16, 24], ids=lambda dim: f"dim{dim}")
@pytest.mark.parametrize(("first", "count"), [(0, 48), (5, 40), (16, 1), (31, 2)], ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "turned"])
def test_rows_are_written_as_by_the_reference(
    dtype: torch.dtype, dim: int, first: int, count: int, turned: bool
) -> None:
    width, spread = 4, 3
    tables = torch.randperm(2 * width).to(torch.int32).view(2, width)
    # Rows that lie apart, as those of a buffer with room for more.
    rows = torch.randn(2, 2, count + spread, dim).to(dtype)[:, :, :count]
    angles = torch.rand(count, dim // 2).repeat(1, 2)
    rotation = (angles.cos(), angles.sin()) if turned else None
    memories = [torch.zeros(2 * width, 2, PAGE_TOKENS * dim, dtype=dtype) for _ in "ab"]
    for memory, write in zip(memories, (write_rows, write_rows_reference), strict=True):
        write(memory, tables, first, *rows, rotation)
    assert torch.equal(*memories)
    keys, values = read_rows(memories[0], tables, first, first + count)
    assert torch.equal(values, rows[1])
    assert turned or torch.equal(keys, rows[0])
