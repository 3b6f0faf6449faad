import math

import codec_peers
import pytest
import torch
from codec_peers import (
    Encoded,
    Prompt,
    encode_fp8,
    encode_kivi,
    encode_turboquant,
    encode_zipcache,
    gaussian_levels,
    paper_peers,
    probe_positions,
)


def prompt(
    num_tokens: int = 256, *, layers: int = 2, heads: int = 2, groups: int = 3, dim: int = 64
) -> Prompt:
    shape = (layers, heads, num_tokens, dim)
    positions = probe_positions(num_tokens, 0)
    return Prompt(
        keys=torch.randn(shape),
        values=torch.randn(shape),
        queries=torch.randn(layers, heads * groups, len(positions), dim),
        positions=positions,
        scaling=dim**-0.5,
    )


def bits_per_element(encoded: Encoded, given: Prompt) -> float:
    return encoded.num_bits / (2 * given.keys.numel())


@pytest.mark.parametrize("name", list(paper_peers(0)))
def test_every_peer_returns_the_shape_it_was_given_and_an_error_that_its_bits_explain(
    name: str,
) -> None:
    given = prompt()
    encoded = paper_peers(0)[name](given)
    for before, after in zip((given.keys, given.values), encoded.decode(), strict=True):
        assert after.shape == before.shape
        assert after.isfinite().all()
        assert (after - before).pow(2).mean() < 0.2  # of unit variance
    assert bits_per_element(encoded, given) < 11  # a window of 128 of 256 at 16 bits


def test_fp8_is_within_half_a_step_of_three_mantissa_bits() -> None:
    given = prompt()
    keys, _ = encode_fp8(given).decode()
    assert ((keys - given.keys).abs() <= given.keys.abs() / 16 + 2**-10).all()


def test_kivi_keeps_the_window_and_the_error_within_half_a_step() -> None:
    given = prompt(288)
    encoded = encode_kivi(given, 4)
    keys, values = encoded.decode()
    torch.testing.assert_close(keys[:, :, 160:], given.keys[:, :, 160:].half().float())
    old = given.keys[:, :, :160].unflatten(2, (5, 32))
    step = (old.amax(3) - old.amin(3)) / 15
    error = (keys - given.keys)[:, :, :160].unflatten(2, (5, 32)).abs().amax(3)
    assert (error <= step * 0.51 + 0.01).all()  # fp16 parameters
    assert (values - given.values).abs().max() < 0.5
    assert encoded.num_bits == 2 * 2 * 2 * 64 * (160 * 5 + 128 * 16)


def test_two_bit_kivi_costs_three_bits_outside_its_window() -> None:
    given = prompt(1536)
    assert bits_per_element(encode_kivi(given, 2, window=0), given) == 3


@pytest.mark.parametrize("num_tokens", [1, 31, 33, 127])
def test_kivi_keeps_prompts_that_are_shorter_than_its_window(num_tokens: int) -> None:
    given = prompt(num_tokens=max(2, num_tokens))
    keys, _ = encode_kivi(given, 2).decode()
    torch.testing.assert_close(keys, given.keys.half().float())


def test_zipcache_has_the_ratio_of_its_paper_but_for_the_class_bits() -> None:
    # papers.md, 1.9: r = .6, 4 and 2 bits, n = D_total = 4096, two parameter classes: 4.979.
    given = prompt(4096, layers=1, heads=1, groups=1, dim=4096)
    encoded = encode_zipcache(given)
    class_bits = 4096
    assert 16 * 2 * given.keys.numel() / (encoded.num_bits - class_bits) == pytest.approx(
        4.979, abs=0.002
    )


def test_zipcache_keeps_the_salient_class_more_precisely() -> None:
    given = prompt(500)
    salient = torch.zeros(500, dtype=torch.bool)
    salient[::2] = True
    given.keys[:, :, salient] *= 3
    keys, _ = encode_zipcache(given).decode()
    scores = codec_peers.normalised_saliency(
        given.queries, given.positions, given.keys, given.scaling
    )
    order = scores.argsort(-1)
    error = (keys - given.keys).pow(2).mean(-1) / given.keys.pow(2).mean(-1)
    regular, rest = error.gather(2, order[..., :200]), error.gather(2, order[..., 200:])
    assert rest.mean() < 0.5 * regular.mean()


@pytest.mark.parametrize(("bits", "distortion"), [(1, 0.3634), (2, 0.1175), (3, 0.03454)])
def test_the_gaussian_tables_have_the_distortion_of_lloyd_and_max(
    bits: int, distortion: float
) -> None:
    thresholds, centroids = gaussian_levels(bits)
    assert len(thresholds) + 1 == len(centroids) == 2**bits
    x = torch.randn(400_000)
    error = (x - centroids[torch.bucketize(x, thresholds)]).pow(2).mean().item()
    assert error == pytest.approx(distortion, rel=0.02)


def test_the_rotation_peer_is_seeded_and_needs_only_a_norm_per_token() -> None:
    given = prompt()
    first, again = (encode_turboquant(given, 3, 5) for _ in range(2))
    assert all(map(torch.equal, first.decode(), again.decode()))
    assert bits_per_element(first, given) == 3 + 16 / 64
    zero = Prompt(given.keys * 0, given.values, given.queries, given.positions, given.scaling)
    assert encode_turboquant(zero, 3, 5).decode()[0].abs().max() < 1e-6


def test_probe_rows_are_a_tenth_and_end_with_the_last() -> None:
    positions = probe_positions(1536, 3)
    assert len(positions) == 2 * int(1536 * 0.05) == len(positions.unique())
    assert positions.tolist() == sorted(positions.tolist())
    assert positions[-1] == 1535
    assert not math.isclose(positions[0].item(), 1536 - 76)
