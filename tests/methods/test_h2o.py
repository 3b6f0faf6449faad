"""H2O's choice of tokens: the checks H2 to H5 and H7 of its specification, and its options."""

import math

import pytest
import torch

from kvstrata.methods.h2o import H2O, Seats
from kvstrata.methods.token_scores import TokenScores
from kvstrata.protos.errors import LimitError


def toy() -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys of the specification's toy, each (8, 2)."""
    i = torch.arange(8.0)
    queries = 1.5 * torch.stack([(0.7 * i).cos(), (0.7 * i).sin()], -1)
    keys = 1.5 * torch.stack([(1.3 * i + 0.4).cos(), (1.3 * i + 0.4).sin()], -1)
    return queries, keys


def run_toy(stage: H2O, num_prompt: int) -> tuple[list[list[int]], dict[int, float]]:
    """Return what is held after the prompt and after each further token, and the last scores."""
    queries, keys = toy()
    seats = stage.seats(8)
    held = torch.arange(num_prompt)
    rows = (queries[:num_prompt] @ keys[:num_prompt].T / math.sqrt(2)).masked_fill(
        torch.ones(num_prompt, num_prompt).triu(1).bool(), -torch.inf
    )
    scores = rows.softmax(-1).sum(0)
    history = []
    for token in range(num_prompt - 1, 8):
        if token >= num_prompt:
            held = torch.cat([held, torch.tensor([token])])
            weights = (queries[token] @ keys[held].T / math.sqrt(2)).softmax(-1)
            assert weights.sum().item() == pytest.approx(1.0)  # H8
            padded = torch.cat([scores, torch.zeros(1)])
            scores = stage.add(padded[None], weights[None, None, None])[0]
        kept = stage.keep(scores, held, seats, decoding=token >= num_prompt)
        assert int(kept.sum()) <= seats.total  # H4
        assert kept[held > token - seats.recent].all()
        held, scores = held[kept], scores[kept]
        assert (held.diff() > 0).all()
        history.append(held.tolist())
    return history, dict(zip(held.tolist(), scores.tolist(), strict=True))


EXPECTED = [[0, 1, 2, 3], [0, 1, 3, 4], [0, 1, 4, 5], [0, 1, 5, 6], [0, 1, 6, 7]]


@pytest.mark.parametrize("num_prompt", [1, 4])
def test_h3_the_toy_keeps_and_scores_what_the_specification_says(num_prompt):
    history, scores = run_toy(H2O(heavy=2, recent=2), num_prompt)
    assert history[-5:] == EXPECTED
    assert scores == pytest.approx({0: 2.54244, 1: 2.03717, 6: 0.22722, 7: 0.3374}, abs=1e-5)


def test_h5_without_heavy_seats_it_is_a_sliding_window():
    history, _ = run_toy(H2O(heavy=0, recent=3), 4)
    assert history == [[i - 2, i - 1, i] for i in range(3, 8)]


def test_without_recent_seats_even_the_newest_may_leave():
    history, _ = run_toy(H2O(heavy=2, recent=0), 1)
    assert history[-1] == [0, 1]


def test_h2_a_heads_scores_add_up_to_the_rows_of_the_prompt():
    queries, keys = torch.randn(2, 6, 40, 16), torch.randn(2, 3, 40, 16)
    scores = TokenScores.of(queries, torch.arange(40), keys, 0.25).accumulated()
    torch.testing.assert_close(scores.sum(-1), torch.full((2, 3), 40.0))


def test_h7_a_group_of_one_query_head_is_plain_multi_head():
    queries, keys = torch.randn(1, 4, 30, 16), torch.randn(1, 4, 30, 16)
    ours = TokenScores.of(queries, torch.arange(30), keys, 0.25).accumulated()
    logits = queries @ keys.transpose(-1, -2) * 0.25
    rows = logits.masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(ours, rows.sum(2))
    repeated = TokenScores.of(
        queries.repeat_interleave(2, 1), torch.arange(30), keys, 0.25
    ).accumulated()
    torch.testing.assert_close(repeated, ours)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 100])
@pytest.mark.parametrize("stage", [H2O(), H2O(sinks=4), H2O(heavy=5, recent=0.3), H2O(recent=0)])
def test_h4_after_the_prompt_no_head_holds_more_than_its_seats(stage: H2O, num_tokens: int):
    seats = stage.seats(num_tokens)
    scores = torch.rand(3, 2, num_tokens)
    kept = stage.keep(scores, torch.arange(num_tokens), seats)
    assert kept.shape == scores.shape
    expected = min(seats.total, num_tokens)
    assert (kept.sum(-1) == expected).all()
    assert kept[..., num_tokens - min(seats.recent, num_tokens) :].all()
    assert kept[..., : min(stage.sinks, num_tokens)].all()


def test_the_order_of_places_plays_no_part_and_free_places_hold_nothing():
    scores, positions = torch.rand(2, 50), torch.arange(50)
    kept = H2O().keep(scores, positions, Seats(7, 5))
    order = torch.randperm(53)
    wide = torch.cat([positions, torch.full((3,), -1)])[order]
    shuffled = torch.cat([scores, torch.full((2, 3), 9.0)], 1)[:, order]
    again = H2O().keep(shuffled, wide, Seats(7, 5))
    for head in range(2):
        assert sorted(wide[again[head]].tolist()) == positions[kept[head]].tolist()


def test_of_equal_scores_the_earlier_token_stays():
    kept = H2O().keep(torch.ones(1, 10), torch.arange(10), Seats(3, 2))
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 2, 8, 9]


def test_decay_lets_newcomers_win_where_the_paper_freezes():
    frozen, _ = run_toy(H2O(heavy=2, recent=2), 4)
    assert frozen[-1][:2] == [0, 1]
    thawed, _ = run_toy(H2O(heavy=2, recent=2, decay=0.2), 4)
    assert thawed[-1][:2] != [0, 1]


def test_grace_spares_the_newest_when_decoding_as_far_as_there_are_seats():
    scores, positions = torch.arange(20.0).flip(0)[None], torch.arange(20)
    stage = H2O(heavy=6, recent=2, grace=4, sinks=1)
    seats = stage.seats(100)
    calm = stage.keep(scores, positions, seats)[0].nonzero().flatten().tolist()
    assert calm == [0, 1, 2, 3, 4, 5, 18, 19]
    spared = stage.keep(scores, positions, seats, decoding=True)[0].nonzero().flatten().tolist()
    assert spared == [0, 1, 14, 15, 16, 17, 18, 19]
    window = H2O(heavy=0, recent=4, grace=9)
    kept = window.keep(scores, positions, window.seats(100), decoding=True)
    assert kept[0].nonzero().flatten().tolist() == [16, 17, 18, 19]


def test_budgets_are_shares_rounded_down_or_counts():
    assert H2O().seats(1530) == (153, 153)
    assert H2O(heavy=0.29, recent=0.3).seats(100) == (29, 30)
    assert H2O(heavy=48, recent=2000).seats(7) == (48, 2000)
    assert H2O(sinks=4).seats(5) == (4, 0)
    assert H2O().seats(3).total == 1
    assert H2O.neutral().seats(10).total > 1 << 30


@pytest.mark.parametrize(
    "settings",
    [
        {"heavy": 0, "recent": 0},
        {"heavy": 0.0, "recent": 0.0},
        {"heavy": 1.1},
        {"heavy": -0.1},
        {"recent": -1},
        {"heavy": 0.7, "recent": 0.4},
        {"heavy": float("nan")},
        {"decay": 0.0},
        {"decay": 1.5},
        {"grace": -1},
        {"sinks": -1},
        {"positions": "relative"},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(LimitError, match="h2o") as refusal:
        H2O(**settings)
    assert refusal.value.remedy
