"""ZipVL's count of important tokens and its sparse attention: the checks V1 to V8."""

import pytest
import torch

from kvstrata.kernels.colsum import column_sums
from kvstrata.methods.zipvl import ZipVL
from kvstrata.protos.errors import LimitError


def uniform_sums(num_tokens: int) -> torch.Tensor:
    rows = 1 / torch.arange(1, num_tokens + 1, dtype=torch.float64)
    return rows.flip(0).cumsum(0).flip(0)


@pytest.mark.parametrize(("tau", "count"), [(0.975, 7), (0.9, 6), (0.8, 4)])
def test_v1_uniform_attention_over_eight_tokens(tau: float, count: int):
    assert ZipVL(tau=tau).num_important(uniform_sums(8)) == count


@pytest.mark.parametrize(("tau", "count"), [(0.96, 732), (0.975, 786), (0.99, 863)])
def test_v2_uniform_attention_needs_most_tokens(tau: float, count: int):
    assert ZipVL(tau=tau).num_important(uniform_sums(1000)) == count


def test_v2_a_sink_with_half_of_the_mass_does_not_make_it_sparse():
    sums = torch.full((1000,), 0.5 / 999, dtype=torch.float64)
    sums[0] = 0.5
    assert ZipVL().num_important(sums) == 951


def qkv(num_tokens: int, heads: int = 4, kv_heads: int = 2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(heads, num_tokens, 16, generator=generator, dtype=dtype) * 2,
        torch.randn(kv_heads, num_tokens, 16, generator=generator, dtype=dtype) * 2,
        torch.randn(kv_heads, num_tokens, 16, generator=generator, dtype=dtype),
    )


def dense(queries, keys, values, scaling, visible):
    wide = [x.repeat_interleave(len(queries) // len(keys), 0) for x in (keys, values)]
    logits = queries @ wide[0].transpose(1, 2) * scaling
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ wide[1]


def test_v3_with_tau_one_every_token_matters_and_attention_is_dense():
    queries, keys, values = qkv(50, dtype=torch.float32)
    found = ZipVL.neutral().attend(queries, keys, values, 0.25)
    assert found.important.all()
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    torch.testing.assert_close(found.output, dense(queries, keys, values, 0.25, causal))


def test_v4_and_v8_rows_that_matter_attend_to_keys_that_matter_and_the_last_does():
    queries, keys, values = qkv(120, dtype=torch.float32)
    found = ZipVL(tau=0.7).attend(queries, keys, values, 0.25)
    chosen = found.important
    assert 10 < chosen.sum() < 110
    assert chosen[-1]
    visible = torch.ones(120, 120, dtype=torch.bool).tril() & chosen
    expected = dense(queries, keys, values, 0.25, visible)
    torch.testing.assert_close(found.output[:, chosen], expected[:, chosen])
    assert (found.output[:, ~chosen] == 0).all()


def test_v4_in_double_precision_compact_causal_attention_is_masked_attention():
    queries, keys, values = qkv(40)
    chosen = torch.rand(40) < 0.5
    chosen[-1] = True
    compact = [x[:, chosen] for x in (queries, keys, values)]
    num_chosen = int(chosen.sum())
    causal = torch.ones(num_chosen, num_chosen, dtype=torch.bool).tril()
    visible = torch.ones(40, 40, dtype=torch.bool).tril() & chosen
    masked = dense(queries, keys, values, 0.25, visible)[:, chosen]
    assert (dense(*compact, 0.25, causal) - masked).abs().max() < 1e-14


def test_v5_the_count_never_falls_as_tau_rises():
    sums = torch.rand(300)
    counts = [ZipVL(tau=tau / 100).num_important(sums) for tau in range(1, 101)]
    assert counts == sorted(counts)
    assert counts[-1] == 300
    assert counts[0] >= 1


def test_v6_the_sums_add_up_to_the_rows_used():
    queries, keys, _ = qkv(200, dtype=torch.float32)
    rows = ZipVL().probes(200)
    assert len(rows) == 128
    sums = column_sums(queries[:, rows].contiguous(), keys, rows, 0.25)
    torch.testing.assert_close(sums.sum(-1), torch.full((4,), 128.0))


def test_v7_the_count_is_that_of_any_multiple():
    sums = torch.rand(300) ** 6
    assert ZipVL().num_important(sums) == ZipVL().num_important(sums * 12.5)


def test_important_tokens_are_chosen_by_score_not_by_sum():
    # Equal sums: the token that fewer rows see has the higher score.
    rows = torch.tensor([4, 5, 9])
    received = torch.ones(10)
    chosen = ZipVL(tau=0.5).important(received, rows)
    assert chosen.nonzero().flatten().tolist() == [5, 6, 7, 8, 9]


def test_r11_only_tokens_that_some_head_keeps_are_candidates():
    queries, keys, values = qkv(100, dtype=torch.float32)
    kept = torch.rand(2, 100) < 0.5
    kept[:, 7] = False
    found = ZipVL(tau=0.9).attend(queries, keys, values, 0.25, kept)
    assert not (found.important & ~kept.any(0))[:-1].any()
    own = torch.eye(100, dtype=torch.bool)
    causal = torch.ones(100, 100, dtype=torch.bool).tril() & found.important
    visible = ((causal & kept[:, None]) | own).repeat_interleave(2, 0)
    expected = dense(queries, keys, values, 0.25, visible)
    torch.testing.assert_close(found.output[:, found.important], expected[:, found.important])


@pytest.mark.parametrize(
    "settings",
    [
        {"tau": 0.0},
        {"tau": 1.01},
        {"tau": float("nan")},
        {"recent_probes": -1},
        {"rest": "drop"},
        {"min_tokens": -1},
        {"forced": 0},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(LimitError, match="zipvl") as refusal:
        ZipVL(**settings)
    assert refusal.value.remedy
