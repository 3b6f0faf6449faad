"""From statistics of a model's cache to the tables of its profile.

Per layer, KV head and side (K or V): with the mean mu and covariance S of the vectors, and the
metric M = mean of g g^T, where g is the gradient of the log-probability of a sampled continuation
with respect to the vector (the Fisher metric), take R = (M + eps tr(M)/D I)^(1/2) and
R S R = U diag(v) U^T. Then y = (x - mu) R U / sqrt(v) has uncorrelated components of unit
variance, and v is proportional to what leaving a component out costs, to second order, on one
scale for all layers, heads and sides. Bits are then given by water-filling over the whole model.

Source:
    The Karhunen-Loeve transform under the Fisher metric; reverse water-filling as in Cover and
    Thomas, Elements of Information Theory, section 10.3.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from kvstrata.methods.profile import SideTables

METRIC_FLOOR = 0.3  # eps: .05 to 1 differ by less than a tenth
_LEAST_VARIANCE = 1e-14
_LEAST_SPREAD = 1e-5  # of a component, in units of x: less would vanish in the fp16 basis


@dataclass
class SideMoments:
    """Running sums over vectors x, (L, H, n, D), and over gradients; float64.

    Attributes:
        count: Vectors seen per layer and head.
        total: Sum of x, (L, H, D).
        outer: Sum of x x^T, (L, H, D, D).
        metric: Sum of g g^T, (L, H, D, D).
        num_gradients: Gradient vectors seen per layer and head.
    """

    layers: int
    heads: int
    dim: int
    count: int = 0
    num_gradients: int = 0
    total: torch.Tensor = field(init=False)
    outer: torch.Tensor = field(init=False)
    metric: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.layers, self.heads, self.dim)
        self.total = torch.zeros(shape, dtype=torch.float64)
        self.outer = torch.zeros((*shape, self.dim), dtype=torch.float64)
        self.metric = torch.zeros((*shape, self.dim), dtype=torch.float64)

    def add_vectors(self, vectors: torch.Tensor) -> None:
        """Count vectors (L, H, n, D), any float dtype."""
        exact = vectors.double()
        self.count += vectors.shape[2]
        self.total += exact.sum(2)
        self.outer += exact.mT @ exact

    def add_gradients(self, gradients: torch.Tensor) -> None:
        """Count gradients (L, H, n, D), any float dtype."""
        exact = gradients.double()
        self.num_gradients += gradients.shape[2]
        self.metric += exact.mT @ exact

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything, to be saved and given to ``restore``."""
        return {
            "counts": np.array([self.count, self.num_gradients]),
            "total": self.total.numpy(),
            "outer": self.outer.numpy(),
            "metric": self.metric.numpy(),
        }

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Continue from what ``arrays`` returned.

        Raises:
            ValueError: The arrays are of another model.
        """
        for name in ("total", "outer", "metric"):
            if arrays[name].shape != getattr(self, name).shape:
                raise ValueError(
                    f"{name} has shape {arrays[name].shape}: another model's statistics"
                )
            setattr(self, name, torch.from_numpy(arrays[name].copy()))
        self.count, self.num_gradients = (int(n) for n in arrays["counts"])


def fit_side(moments: SideMoments, metric: torch.Tensor | None = None) -> SideTables:
    """Return the transform of one side.

    Args:
        moments: At least D vectors and one gradient.
        metric: Mean of g g^T to use instead of the moments' own, float64 (L, H, D, D).

    Raises:
        ValueError: Too few vectors, or statistics that are not finite.
    """
    dim = moments.dim
    if moments.count < dim or moments.num_gradients < 1:
        raise ValueError(f"{moments.count} vectors are too few to fit {dim} dimensions")
    mean = moments.total / moments.count
    covariance = moments.outer / moments.count - mean[..., :, None] * mean[..., None, :]
    if metric is None:
        metric = moments.metric / moments.num_gradients
    if not (torch.isfinite(covariance).all() and torch.isfinite(metric).all()):
        raise ValueError("the statistics are not finite: does the model overflow its dtype?")
    floor = METRIC_FLOOR * metric.diagonal(dim1=-2, dim2=-1).mean(-1)
    metric = metric + floor[..., None, None].clamp_min(1e-30) * torch.eye(dim, dtype=torch.float64)
    strengths, axes = torch.linalg.eigh(metric)
    root = (axes * strengths.clamp_min(1e-30).sqrt()[..., None, :]) @ axes.mT
    inverse_root = (axes * strengths.clamp_min(1e-30).rsqrt()[..., None, :]) @ axes.mT
    return decorrelated(mean, covariance, root, inverse_root)


def decorrelated(
    mean: torch.Tensor, covariance: torch.Tensor, root: torch.Tensor, inverse_root: torch.Tensor
) -> SideTables:
    """Return the transform whose components are uncorrelated and sorted by what they cost.

    Args:
        mean: Of the vectors, float64 (L, H, D).
        covariance: Of the vectors, float64 (L, H, D, D).
        root: float64 (L, H, D, D); a vector x costs the square of x @ root.
        inverse_root: Its inverse.
    """
    variance, turn = torch.linalg.eigh(root.mT @ covariance @ root)
    variance, turn = variance.flip(-1), turn.flip(-1)
    strength = root.square().sum((-2, -1)) / root.shape[-1]
    spread = variance.clamp_min(0).maximum(strength[..., None] * _LEAST_SPREAD**2)
    basis = (turn * spread.sqrt()[..., None, :]).mT @ inverse_root
    return SideTables(
        mean=mean.float(),
        basis=_normalised(basis).half(),
        variance=variance.clamp_min(_LEAST_VARIANCE).float(),
    )


def frame_metric(metric: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Return the metric of keys turned by a rotation that is uniform over ``turns``.

    Args:
        metric: float64 (L, H, D, D), of keys before rotation.
        turns: float64 (n, D, D), the rotations of a block's offsets: x_turned = turn @ x.
    """
    total = torch.zeros_like(metric)
    for turn in turns:
        total += turn @ metric @ turn.T
    return total / len(turns)


def _normalised(basis: torch.Tensor) -> torch.Tensor:
    """Return the basis with the sign of each row fixed: eigenvectors have none of their own."""
    largest = basis.abs().argmax(-1, keepdim=True)
    signs = basis.gather(-1, largest).sign()
    return basis * torch.where(signs == 0, 1.0, signs)
