"""Attention to the newest rows, added up as rows pass, equals the column sums of all of them."""

from collections.abc import Callable

import pytest
import torch

from kvstrata.kernels.row_pages import RowStep, step_rows
from kvstrata.kernels.row_saliency import add_row_saliency, add_row_saliency_reference
from kvstrata.kernels.row_saliency_triton import add_row_saliency_triton
from tests.kernels.test_row_pages import Case, interpreted


@interpreted
@pytest.mark.parametrize(
    ("add", "dim", "group"),
    [
        *((add_row_saliency, dim, group) for dim in (8, 64, 80) for group in (1, 3, 5)),
        *((add_row_saliency_triton, dim, 3) for dim in (8, 32, 64, 80, 96)),
        (add_row_saliency_triton, 128, 1),
        (add_row_saliency_triton, 256, 5),
    ],
)
def test_it_adds_the_weights_of_the_new_row(add: Callable[..., None], dim: int, group: int) -> None:
    case = Case([0, 20, 40, 3], dim=dim, group=group)
    _, lse = step_rows(case.queries, *case.new, case.step, 1, case.scaling)
    firsts = torch.tensor([0, 5, 39, -1], dtype=torch.int32)
    got, wanted = torch.zeros(2, 4, 2, 2, 20)
    arguments = (case.queries, lse, case.step, 1, case.scaling, firsts)
    add(*arguments, got)
    add_row_saliency_reference(*arguments, wanted)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert not got[:, 0].any()
    assert not got[3].any()
    for i, first in ((1, 5), (2, 39)):
        keys = case.rows[i][0, i].double()
        grouped = case.queries[i].double().view(2, group, dim)
        weights = (grouped @ keys.mT * case.scaling).softmax(-1).mean(1)[:, first:]
        held = got[i, 1, :, : weights.shape[1]]
        torch.testing.assert_close(held.double(), weights, rtol=1e-5, atol=1e-5)


def test_it_adds_to_what_is_there() -> None:
    case = Case([5, 9])
    _, lse = step_rows(case.queries, *case.new, case.step, 1, case.scaling)
    firsts = torch.zeros(2, dtype=torch.int32)
    sums = torch.zeros(2, 2, 2, 16)
    add_row_saliency(case.queries, lse, case.step, 1, case.scaling, firsts, sums)
    once = sums.clone()
    alone = RowStep(case.pages, torch.tensor([1]))
    add_row_saliency(case.queries[1:], lse[1:], alone, 1, case.scaling, firsts[1:], sums)
    assert torch.equal(sums[0], once[0])
    torch.testing.assert_close(sums[1], 2 * once[1])


def test_h8_the_weights_of_a_row_add_up_to_one() -> None:
    case = Case([20, 40], dim=8, group=3)
    _, lse = step_rows(case.queries, *case.new, case.step, 1, case.scaling)
    sums = torch.zeros(2, 2, 2, 48)
    add_row_saliency(
        case.queries, lse, case.step, 1, case.scaling, torch.zeros(2, dtype=torch.int32), sums
    )
    torch.testing.assert_close(sums[:, 1].sum(-1), torch.ones(2, 2), rtol=1e-5, atol=1e-5)
