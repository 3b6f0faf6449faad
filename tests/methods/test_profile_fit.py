"""From moments to a transform: what the components are, and what dropping one costs."""

import numpy as np
import pytest
import torch

from kvstrata.methods.bit_allocation import allocate
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.profile import Profile
from kvstrata.methods.profile_fit import METRIC_FLOOR, SideMoments, fit_side, frame_metric
from tests.methods.profiles import MODEL_ID, make_rates

LAYERS, HEADS, DIM, COUNT = 2, 2, 12, 4000


def _draw(seed: int = 0, dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor]:
    """Return correlated vectors and gradients, each in a frame and of sizes of its own."""
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, HEADS, COUNT, dim)
    drawn = []
    for spread in (1.0, 0.7):
        mix = torch.randn(LAYERS, HEADS, dim, dim, generator=generator, dtype=torch.float64)
        mix = mix * torch.logspace(0, -spread, dim, dtype=torch.float64)
        drawn.append(torch.randn(shape, generator=generator, dtype=torch.float64) @ mix.mT)
    offset = 3 * torch.randn(LAYERS, HEADS, 1, dim, generator=generator, dtype=torch.float64)
    return drawn[0] + offset, drawn[1] * 0.01


def _moments(vectors: torch.Tensor, gradients: torch.Tensor) -> SideMoments:
    moments = SideMoments(vectors.shape[0], vectors.shape[1], vectors.shape[-1])
    for part in vectors.split(1500, 2):
        moments.add_vectors(part)
    moments.add_gradients(gradients)
    return moments


@pytest.fixture(scope="module")
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    return _draw()


def _components(vectors: torch.Tensor, tables: object) -> torch.Tensor:
    forward = torch.linalg.inv(tables.basis.double())  # type: ignore[attr-defined]
    return (vectors - tables.mean.double()[:, :, None]) @ forward  # type: ignore[attr-defined]


def test_components_are_uncorrelated_and_of_unit_variance(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    vectors, gradients = drawn
    tables = fit_side(_moments(vectors, gradients))
    y = _components(vectors, tables)
    torch.testing.assert_close(y.mean(2), torch.zeros_like(y.mean(2)), rtol=0, atol=1e-3)
    covariance = y.mT @ y / COUNT
    identity = torch.eye(DIM, dtype=torch.float64).expand_as(covariance)
    torch.testing.assert_close(covariance, identity, rtol=0, atol=0.02)  # fp16 basis


def test_tables_have_their_types_and_descend(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    tables = fit_side(_moments(*drawn))
    assert (tables.mean.dtype, tables.variance.dtype) == (torch.float32, torch.float32)
    assert tables.basis.dtype == torch.float16
    assert tables.basis.shape == (LAYERS, HEADS, DIM, DIM)
    assert (tables.variance[..., 1:] <= tables.variance[..., :-1]).all()
    assert (tables.variance > 0).all()
    torch.testing.assert_close(tables.mean.double(), drawn[0].mean(2), rtol=1e-5, atol=1e-5)


def test_variance_is_what_dropping_a_component_costs(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """The mean of (g . dx)^2 over gradients and vectors, the metric's floor included."""
    vectors, gradients = drawn
    tables = fit_side(_moments(vectors, gradients))
    y = _components(vectors, tables)
    floor = METRIC_FLOOR * gradients.square().mean((2, 3))
    for c in range(DIM):
        row = tables.basis[:, :, c].double()
        lost = y[..., c].square().mean(-1)  # of dx = y_c * row
        felt = (gradients * row[:, :, None]).sum(-1).square().mean(-1)
        cost = lost * (felt + floor * row.square().sum(-1))
        torch.testing.assert_close(cost, tables.variance[..., c].double(), rtol=0.02, atol=1e-12)


def test_costs_of_several_components_add_up(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The rows of the basis do not interact under the metric: the transform is the KLT's."""
    vectors, gradients = drawn
    tables = fit_side(_moments(vectors, gradients))
    metric = gradients.mT @ gradients / COUNT
    floor = METRIC_FLOOR * metric.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    metric = metric + floor * torch.eye(DIM, dtype=torch.float64)
    basis = tables.basis.double()
    crossed = basis @ metric @ basis.mT
    scale = tables.variance.double().sqrt()
    normal = crossed / scale[..., :, None] / scale[..., None, :]
    identity = torch.eye(DIM, dtype=torch.float64).expand_as(normal)
    torch.testing.assert_close(normal, identity, rtol=0, atol=0.02)


def test_equal_moments_give_equal_tables_and_signs_are_fixed(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    vectors, gradients = drawn
    first = fit_side(_moments(vectors, gradients))
    mirrored = fit_side(_moments(vectors, -gradients))
    for name in ("mean", "basis", "variance"):
        assert torch.equal(getattr(first, name), getattr(mirrored, name))
    largest = first.basis.gather(-1, first.basis.abs().argmax(-1, keepdim=True))
    assert (largest > 0).all()


def test_variance_has_one_scale_for_all_heads(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    """A head whose gradients are ten times as large costs a hundred times as much."""
    vectors, gradients = drawn
    louder = gradients.clone()
    louder[0, 1] *= 10
    plain, loud = (fit_side(_moments(vectors, g)) for g in (gradients, louder))
    torch.testing.assert_close(loud.variance[0, 1], 100 * plain.variance[0, 1])
    assert torch.equal(loud.variance[1], plain.variance[1])
    assert torch.equal(loud.basis[1], plain.basis[1])


def test_the_metric_of_turned_keys_is_the_mean_over_the_turns() -> None:
    generator = torch.Generator().manual_seed(3)
    gradients = torch.randn(1, 2, 50, 6, generator=generator, dtype=torch.float64)
    turns = torch.linalg.qr(torch.randn(5, 6, 6, generator=generator, dtype=torch.float64))[0]
    metric = gradients.mT @ gradients / 50
    # x_turned = turn @ x for columns, so gradients turn along.
    turned = torch.stack([gradients @ turn.T for turn in turns])
    expected = (turned.mT @ turned / 50).mean(0)
    torch.testing.assert_close(frame_metric(metric, turns), expected)
    assert torch.equal(frame_metric(metric, torch.eye(6, dtype=torch.float64)[None]), metric)


def test_a_given_metric_replaces_the_gradients(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    vectors, gradients = drawn
    moments, other = _moments(vectors, gradients), _moments(vectors, gradients.flip(-1))
    given = fit_side(other, moments.metric / moments.num_gradients)
    assert torch.equal(given.basis, fit_side(moments).basis)
    assert not torch.equal(given.basis, fit_side(other).basis)


@pytest.mark.parametrize(("num_vectors", "num_gradients"), [(0, 1), (DIM - 1, 1), (DIM, 0)])
def test_too_few_vectors_or_no_gradient_are_refused(num_vectors: int, num_gradients: int) -> None:
    vectors, gradients = _draw()
    moments = _moments(vectors[:, :, :num_vectors], gradients[:, :, :num_gradients])
    with pytest.raises(ValueError, match="too few"):
        fit_side(moments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", ["vectors", "gradients"])
def test_statistics_that_are_not_finite_are_refused(bad: float, which: str) -> None:
    vectors, gradients = _draw()
    (vectors if which == "vectors" else gradients)[1, 0, 7, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        fit_side(_moments(vectors, gradients))


@pytest.mark.parametrize("case", ["constant channel", "zero channel", "all constant", "no effect"])
def test_degenerate_statistics_give_tables_that_a_codec_can_use(case: str) -> None:
    vectors, gradients = _draw(dim=16)
    if case == "constant channel":
        vectors[..., 3] = 5.0
    elif case == "zero channel":
        vectors[..., :4] = gradients[..., :4] = 0.0
    elif case == "all constant":
        vectors[:] = vectors[:, :, :1]
    else:
        gradients[:] = 0.0
    tables = fit_side(_moments(vectors, gradients))
    for table in (tables.mean, tables.basis, tables.variance):
        assert table.isfinite().all()
    assert (tables.variance > 0).all()
    profile = Profile(MODEL_ID, {"pre": tables}, tables, 1, make_rates())
    keys, values = CalibratedCodec(profile, 0.1).sides
    assert keys.basis.forward.isfinite().all()
    assert values.basis.forward.isfinite().all()
    assert allocate(tables, 0.1).widths.shape == (LAYERS, HEADS, 16)


def test_moments_are_saved_and_go_on_where_they_were(
    drawn: tuple[torch.Tensor, torch.Tensor],
) -> None:
    vectors, gradients = drawn
    first = _moments(vectors[:, :, :1500], gradients[:, :, :100])
    arrays = {name: array.copy() for name, array in first.arrays().items()}
    second = SideMoments(LAYERS, HEADS, DIM)
    second.restore(arrays)
    for moments in (first, second):
        moments.add_vectors(vectors[:, :, 1500:])
        moments.add_gradients(gradients[:, :, 100:])
    assert (second.count, second.num_gradients) == (COUNT, COUNT)
    for name, array in first.arrays().items():
        assert np.array_equal(array, second.arrays()[name])
    assert arrays["counts"].tolist() == [1500, 100]  # what was given is not written to
    assert np.array_equal(arrays["total"], vectors[:, :, :1500].sum(2).numpy())


def test_the_arrays_of_another_model_are_refused(drawn: tuple[torch.Tensor, torch.Tensor]) -> None:
    arrays = _moments(*drawn).arrays()
    with pytest.raises(ValueError, match="another model"):
        SideMoments(LAYERS, HEADS + 1, DIM).restore(arrays)
