"""Attention-Gate's flags, its differentiable attention and its losses: the checks G2 to G7."""

import pytest
import torch

from kvstrata.methods.attention_gate import (
    AttentionGate,
    eviction_loss,
    gated_attention,
    num_gate_parameters,
    straight_through,
)
from kvstrata.protos.errors import LimitError

NUM_TOKENS = 14


def tensors(requires_grad: bool = False):
    queries, keys = torch.randn(4, NUM_TOKENS, 8), torch.randn(2, NUM_TOKENS, 8)
    values = torch.randn(2, NUM_TOKENS, 8)
    gate = torch.rand(2, NUM_TOKENS).requires_grad_(requires_grad)
    return queries, keys, values, gate


def masked(queries, keys, values, kept):
    """Return attention under a mask of minus infinity; a row sees itself."""
    own = torch.eye(NUM_TOKENS, dtype=torch.bool)
    visible = (torch.ones_like(own).tril() & kept[:, None]) | own
    wide = [x.repeat_interleave(2, 0) for x in (keys, values)]
    logits = queries @ wide[0].transpose(1, 2) * 0.3
    logits = logits.masked_fill(~visible.repeat_interleave(2, 0), -torch.inf)
    return logits.softmax(-1) @ wide[1]


def test_g3_forward_equals_a_mask_of_minus_infinity():
    queries, keys, values, gate = tensors()
    kept = gate > 0.5
    flags = straight_through(gate, kept)
    found = gated_attention(queries, keys, values, flags, 0.3)
    torch.testing.assert_close(found, masked(queries, keys, values, kept), atol=1e-6, rtol=1e-5)
    ones = gated_attention(queries, keys, torch.ones_like(values), flags, 0.3)
    torch.testing.assert_close(ones, torch.ones_like(ones))  # rows sum to 1


def test_g3_holds_where_an_evicted_key_outweighs_everything():
    queries, keys, values, gate = tensors()
    queries, keys = queries * 20, keys * 20
    kept = gate > 0.5
    found = gated_attention(queries, keys, values, straight_through(gate, kept), 0.3)
    assert found.isfinite().all()
    torch.testing.assert_close(found, masked(queries, keys, values, kept), atol=1e-5, rtol=1e-4)


def test_g4_evicted_gates_get_a_gradient_but_not_the_last_one():
    queries, keys, values, gate = tensors(requires_grad=True)
    kept = torch.zeros_like(gate, dtype=torch.bool)
    kept[:, ::3] = True
    flags = straight_through(gate, kept)
    gated_attention(queries, keys, values, flags, 0.3).square().sum().backward()
    assert gate.grad is not None
    evicted = ~kept
    evicted[:, -1] = False
    assert (gate.grad[evicted].abs() > 0).all()
    assert (gate.grad[:, -1] == 0).all()  # only the last token itself sees it


def test_g2_nothing_but_protected_tokens_at_the_highest_threshold():
    stage = AttentionGate(tau=1.0)
    kept = stage.flags(torch.rand(NUM_TOKENS, 2), num_prompt=NUM_TOKENS)
    assert kept.shape == (2, NUM_TOKENS)
    assert kept.sum() == 4
    assert kept[:, 0].all()
    assert kept[:, -1].all()
    queries, keys, values, gate = tensors()
    alone = gated_attention(queries, keys, values, straight_through(gate, gate > 2.0), 0.3)
    torch.testing.assert_close(alone, values.repeat_interleave(2, 0))  # each row sees itself


def test_g1_a_negative_threshold_keeps_all():
    gate = torch.zeros(NUM_TOKENS, 2)
    assert AttentionGate.neutral().flags(gate).all()


def test_flags_depend_on_the_true_position():
    stage = AttentionGate(tau=1.0, keep_first=3, keep_last=2)
    gate = torch.zeros(10, 1)
    assert stage.flags(gate, 64).sum() == 0
    assert stage.flags(gate, 64, 74)[0].nonzero().flatten().tolist() == [8, 9]
    assert stage.flags(gate)[0].nonzero().flatten().tolist() == [0, 1, 2]


def grad_of(mean: float, keep_rate: float, form) -> float:
    gate = torch.full((6, 2), mean, requires_grad=True)
    eviction_loss([gate, gate * 1.0], keep_rate, form).backward()
    assert gate.grad is not None
    return gate.grad.sum().item()


def test_g5_the_three_losses_differ_in_what_the_keep_rate_does():
    assert grad_of(0.9, 0.4, "linear") == grad_of(0.9, 0.8, "linear") == grad_of(0.1, 0.4, "linear")
    assert grad_of(0.9, 0.4, "hinge") == pytest.approx(1.0)
    assert grad_of(0.3, 0.4, "hinge") == 0.0
    assert grad_of(0.9, 0.4, "absolute") == -grad_of(0.3, 0.4, "absolute") == pytest.approx(1.0)


def test_g7_sizes_of_the_gates_of_a_seven_billion_model():
    sizes = {(4, 64): 100.9e6, (1, 128): 50.5e6, (32, 128): 1615e6}
    for (heads, dim), expected in sizes.items():
        found = num_gate_parameters(32, 4096, 32, heads, dim)
        assert found == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    "settings", [{"tau": 1.1}, {"tau": -2.0}, {"keep_first": -1}, {"keep_last": -1}], ids=str
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(LimitError, match="attention_gate") as refusal:
        AttentionGate(**settings)
    assert refusal.value.remedy
