"""Rows in tails are attended to as those in pages of their heads, bit for bit."""

import pytest
import torch

from kvstrata.kernels.row_pages import (
    PAGE_TOKENS,
    RowPages,
    RowStep,
    attend_rows,
    step_rows,
    write_rows,
)
from kvstrata.kernels.row_tails import (
    RowTails,
    rows_of,
    stage_rows,
    stage_rows_reference,
    tail_rows,
)
from kvstrata.kernels.row_tails_triton import stage_rows_triton

interpreted = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = [0, 3, 15, 16, 32, 46]  # those at multiples of 16 begin a tail
LAYERS, HEADS = 2, 3
ROWS = LAYERS * HEADS
STAGES = {"fast": stage_rows, "reference": stage_rows_reference, "triton": stage_rows_triton}


class Case:
    """Sequences of ``LENGTHS``, all of them in pages and again with tails; memory elsewhere NaN."""

    def __init__(self, dtype: torch.dtype, dim: int) -> None:
        count, width = len(LENGTHS), max(LENGTHS) // PAGE_TOKENS + 1
        num_pages = count * (ROWS * (width + 1) + HEADS)
        shape = (num_pages, 2, PAGE_TOKENS * dim)
        order = torch.randperm(num_pages).to(torch.int32)
        own, rest = order.split([count * ROWS * width, count * (ROWS + HEADS)])
        tail, stages = rest.split([count * ROWS, count * HEADS])
        tables = own.view(count, LAYERS, HEADS, width)
        held = torch.tensor(LENGTHS, dtype=torch.int32)[:, None, None].repeat(1, LAYERS, HEADS)
        self.whole = RowPages(torch.full(shape, torch.nan, dtype=dtype), tables, held)
        self.tails = RowTails(held[:, 0, 0] // PAGE_TOKENS * PAGE_TOKENS, tail.view(count, ROWS))
        staged = tables.clone()
        for i, first in enumerate(self.tails.firsts.tolist()):
            staged[i, :, :, first // PAGE_TOKENS] = stages.view(count, HEADS)[i]
        self.split = RowPages(torch.full(shape, torch.nan, dtype=dtype), staged, held.clone())
        for i, n in enumerate(LENGTHS):
            self._write(i, *torch.randn(2, LAYERS, HEADS, n, dim).to(dtype))
        self.slots = torch.tensor([4, 0, 5, 2, 1, 3])
        self.new = torch.randn(2, count, HEADS, dim).to(dtype)
        self.queries = torch.randn(count, 2 * HEADS, dim).to(dtype)

    def _write(self, i: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        first = int(self.tails.firsts[i])
        for layer in range(LAYERS):
            every, table = (keys[layer], values[layer]), self.whole.tables[i, layer]
            write_rows(self.whole.memory, table, 0, *every)
            paged = [part[:, :first] for part in every]
            write_rows(self.split.memory, self.split.tables[i, layer], 0, *paged)
        numbers = torch.arange(ROWS).view(LAYERS, HEADS)
        at = tail_rows(self.tails.pages[i], ROWS, numbers, 0, keys.shape[2] - first)
        both = torch.stack([keys, values])[:, :, :, first:]
        rows_of(self.split.memory)[at] = both.permute(3, 1, 2, 0, 4)


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@interpreted
@pytest.mark.parametrize("dim", [16, 64, 24], ids=lambda dim: f"dim{dim}")
@pytest.mark.parametrize("stage", STAGES)
def test_attention_over_tails_is_attention_over_pages(
    stage: str, dtype: torch.dtype, dim: int
) -> None:
    """Layer after layer through the same pages, with new rows and then without."""
    case = Case(dtype, dim)
    for layer in range(LAYERS):
        step = RowStep(case.split, case.slots)
        STAGES[stage](case.tails, step, layer, (case.new[0], case.new[1]))
        args = (case.queries, *case.new)
        got = step_rows(*args, step, layer, 0.2)
        wanted = step_rows(*args, RowStep(case.whole, case.slots), layer, 0.2)
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])
    for pages in (case.whole, case.split):
        pages.lengths.add_(1)
    for layer in range(LAYERS):
        step = RowStep(case.split, case.slots)
        STAGES[stage](case.tails, step, layer)
        got = attend_rows(case.queries, step, layer, 0.2)
        wanted = attend_rows(case.queries, RowStep(case.whole, case.slots), layer, 0.2)
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1], wanted[1])


@interpreted
@pytest.mark.parametrize("stage", STAGES)
def test_the_new_rows_are_in_the_tails_and_nothing_else_of_them_changed(
    stage: str, dtype: torch.dtype
) -> None:
    case = Case(dtype, 32)
    before = rows_of(case.split.memory).clone()
    STAGES[stage](case.tails, RowStep(case.split, case.slots), 1, (case.new[0], case.new[1]))
    after = rows_of(case.split.memory)
    numbers = torch.arange(HEADS) + HEADS
    for i, slot in enumerate(case.slots.tolist()):
        count = LENGTHS[slot] - int(case.tails.firsts[slot])
        row = tail_rows(case.tails.pages[slot], ROWS, numbers, count, count + 1)[0]
        assert torch.equal(after[row], case.new[:, i].transpose(0, 1))
        before[row] = after[row]
        used = (case.tails.pages[slot, :, None].long() * PAGE_TOKENS + torch.arange(16)).flatten()
        assert torch.equal(after[used].nan_to_num(9.0), before[used].nan_to_num(9.0))


@interpreted
def test_rows_that_are_all_in_pages_are_left_alone() -> None:
    case = Case(torch.bfloat16, 32)
    case.tails.firsts.add_(PAGE_TOKENS)
    before = case.split.memory.clone()
    for stage in STAGES.values():
        stage(case.tails, RowStep(case.split, case.slots), 0, (case.new[0], case.new[1]))
        assert torch.equal(case.split.memory.nan_to_num(9.0), before.nan_to_num(9.0))


@interpreted
@pytest.mark.parametrize("stage", STAGES)
def test_layers_may_hold_different_numbers_of_rows(stage: str) -> None:
    """As under SkipDecode: a layer whose rows end in its pages has nothing in the tail."""
    case = Case(torch.bfloat16, 32)
    for pages in (case.whole, case.split):
        pages.lengths[5, 0] = 20  # of 46; its tail begins at 32
    for layer in range(LAYERS):
        step = RowStep(case.split, case.slots)
        STAGES[stage](case.tails, step, layer, (case.new[0], case.new[1]))
        args = (case.queries, *case.new)
        got = step_rows(*args, step, layer, 0.2)
        wanted = step_rows(*args, RowStep(case.whole, case.slots), layer, 0.2)
        assert torch.equal(got[0], wanted[0])
