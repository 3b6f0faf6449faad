"""The codes of a unit Gaussian component: additive sign codes, each cell split in four again.

A code of w bits is a string of w sign bits, most significant first, and stands for the sum of
+-COEFFICIENTS[w]: every bit plane is a matrix of +-1, so a dot product against codes is a sum over
planes. Coefficients fall fast enough for codes to sort as their values do. The fine code is
4 * code + r, where r says which quarter of the code's cell; its levels are centroids.

Codes are looked up by a grid of 1/128 (``grid_index``), so that every machine and every version of
a kernel takes the same code: a comparison with a constant on a coarse grid cannot round otherwise.

Worked example, w = 1: code 1 stands for .797885; fine codes 4..7 split y > 0 at .343, .806, 1.402.
"""

import itertools
import math
from functools import cache

import torch

MAX_WIDTH = 6
GRID_SIZE = 2048
GRID_PER_UNIT = 128

# ``fit_coefficients`` and ``split_cell`` give these numbers, to six places.
COEFFICIENTS: tuple[tuple[float, ...], ...] = (
    (),
    (0.797885,),
    (0.981599, 0.528819),
    (1.157846, 0.606946, 0.30104),
    (1.33061, 0.685682, 0.338857, 0.169555),
    (1.498866, 0.763952, 0.377577, 0.188833, 0.094429),
    (1.661571, 0.840912, 0.416382, 0.208197, 0.104103, 0.052053),
)  # fmt: skip
_FINE_HALVES: tuple[tuple[float, ...], ...] = (
    (0.45278, 1.510418),
    (0.245094, 0.756005, 1.343909, 2.151946),
    (0.116212, 0.350754, 0.591928, 0.845194, 1.145328, 1.520001, 1.983916, 2.662279),
    (
        0.067682, 0.20346, 0.340501, 0.479709, 0.621226, 0.766103, 0.916554, 1.074263,
        1.224106, 1.364212, 1.513867, 1.67577, 1.890856, 2.191007, 2.576739, 3.161927,
    ),
    (
        0.038054, 0.114237, 0.190641, 0.267418, 0.347433, 0.430958, 0.515498, 0.601284,
        0.685513, 0.768219, 0.852715, 0.93929, 1.024484, 1.108209, 1.194608, 1.284088,
        1.370517, 1.453351, 1.539651, 1.629953, 1.715764, 1.79594, 1.88016, 1.969076,
        2.053916, 2.133252, 2.217336, 2.306996, 2.461552, 2.719732, 3.058015, 3.582076,
    ),
    (
        0.021029, 0.063099, 0.105206, 0.147375, 0.191936, 0.23894, 0.28612, 0.333514,
        0.38063, 0.427493, 0.474672, 0.522205, 0.569315, 0.616015, 0.663168, 0.710817,
        0.757923, 0.804482, 0.85163, 0.899417, 0.946542, 0.992981, 1.040145, 1.088093,
        1.135241, 1.181537, 1.228694, 1.276779, 1.324935, 1.373162, 1.422478, 1.472975,
        1.522326, 1.570389, 1.619693, 1.670346, 1.718748, 1.764603, 1.811729, 1.860235,
        1.907451, 1.953162, 2.000275, 2.048917, 2.096145, 2.141691, 2.188769, 2.237522,
        2.28476, 2.330163, 2.377226, 2.426112, 2.473387, 2.518666, 2.565734, 2.614778,
        2.662093, 2.707227, 2.754279, 2.803455, 2.923398, 3.154405, 3.460654, 3.941458,
    ),
    (
        0.011492, 0.034477, 0.057468, 0.080469, 0.104961, 0.130953, 0.156974, 0.183031,
        0.209041, 0.235009, 0.26103, 0.28711, 0.313119, 0.339062, 0.36508, 0.391182,
        0.41719, 0.443109, 0.469127, 0.495252, 0.521262, 0.547159, 0.57318, 0.59933,
        0.625342, 0.651215, 0.677235, 0.703409, 0.729419, 0.755264, 0.781278, 0.80747,
        0.833478, 0.859299, 0.885313, 0.911528, 0.937539, 0.963342, 0.989361, 1.015605,
        1.041619, 1.067399, 1.093416, 1.119683, 1.145698, 1.171452, 1.197467, 1.223755,
        1.249769, 1.275499, 1.301513, 1.327824, 1.353842, 1.37955, 1.405565, 1.431902,
        1.457922, 1.483606, 1.509621, 1.535981, 1.562961, 1.590592, 1.618635, 1.647108,
        1.675162, 1.702764, 1.730805, 1.759308, 1.786413, 1.812022, 1.838034, 1.864467,
        1.890494, 1.916079, 1.942089, 1.968545, 1.994573, 2.020132, 2.046139, 2.072616,
        2.098645, 2.12418, 2.150186, 2.176685, 2.202717, 2.228231, 2.254238, 2.280763,
        2.306798, 2.332288, 2.358293, 2.384841, 2.410876, 2.436337, 2.462336, 2.488901,
        2.514936, 2.540373, 2.56637, 2.592958, 2.618998, 2.644416, 2.670417, 2.697033,
        2.723079, 2.748473, 2.774472, 2.801111, 2.827159, 2.852527, 2.878522, 2.905182,
        2.931231, 2.956575, 2.982568, 3.009251, 3.035304, 3.060626, 3.086619, 3.113327,
        3.139385, 3.164683, 3.190674, 3.217405, 3.316788, 3.528338, 3.811022, 4.25899,
    ),
)  # fmt: skip
# The signs of the w bits of a code, by coefficients: the constants above are symmetric about 0.
FINE_LEVELS = tuple(tuple(-level for level in reversed(half)) + half for half in _FINE_HALVES)


def base_values(width: int) -> list[float]:
    """Return the 2 ** width values of the codes, ascending, in double precision."""
    coefficients = COEFFICIENTS[width]
    return [
        math.fsum(sign * c for sign, c in zip(signs, coefficients, strict=True))
        for signs in itertools.product((-1, 1), repeat=width)
    ]


@cache
def base_levels(width: int) -> torch.Tensor:
    """Return float32 (2 ** width,): the value of each code, planes added up in order."""
    levels = torch.zeros(1, dtype=torch.float32)
    for coefficient in COEFFICIENTS[width]:
        step = torch.tensor([-coefficient, coefficient], dtype=torch.float32)
        levels = (levels[:, None] + step).flatten()
    return levels


@cache
def fine_levels(width: int) -> torch.Tensor:
    """Return float32 (4 * 2 ** width,): the value of each fine code."""
    return torch.tensor(FINE_LEVELS[width], dtype=torch.float32)


def thresholds(width: int) -> list[float]:
    """Return the borders between fine codes, ascending; every fourth one parts two codes."""
    fine, base = FINE_LEVELS[width], base_values(width)
    borders = [(a + b) / 2 for a, b in itertools.pairwise(fine)]
    borders[3::4] = [(a + b) / 2 for a, b in itertools.pairwise(base)]
    return borders


@cache
def code_table(width: int) -> torch.Tensor:
    """Return uint8 (GRID_SIZE,): the fine code of each cell of the grid, by the cell's middle."""
    borders = thresholds(width)
    middles = [
        (i + 0.5) / GRID_PER_UNIT - GRID_SIZE / (2 * GRID_PER_UNIT) for i in range(GRID_SIZE)
    ]
    return torch.tensor([sum(b <= m for b in borders) for m in middles], dtype=torch.uint8)


def grid_index(y: torch.Tensor) -> torch.Tensor:
    """Return int64 cells of the grid for float32 ``y``; what lies outside takes the last cell."""
    cell = torch.floor(y * GRID_PER_UNIT + GRID_SIZE // 2)
    return cell.clamp_(0, GRID_SIZE - 1).long()


def fit_coefficients(width: int) -> list[float]:
    """Return the coefficients with the least squared error for a unit Gaussian.

    Alternates thresholds (midpoints) and coefficients (weighted least squares) while levels ascend.
    """
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=width)), dtype=torch.float64)
    fitted = torch.tensor([1.6 * 0.5 ** (p + 1) * (1 + 0.15 * width) for p in range(width)])
    fitted = fitted.double()
    for _ in range(5000):
        levels = signs @ fitted
        if (levels.diff() <= 0).any():
            raise ArithmeticError(f"the levels of width {width} do not ascend")
        mass, moment = _cells([-math.inf, *((levels[1:] + levels[:-1]) / 2).tolist(), math.inf])
        fitted = torch.linalg.solve(signs.T @ (mass[:, None] * signs), signs.T @ moment)
    return [round(float(c), 6) for c in fitted]


def split_cell(low: float, high: float) -> list[float]:
    """Return the four centroids of Lloyd-Max between two borders, for a unit Gaussian.

    Source:
        S. Lloyd, Least squares quantization in PCM, IEEE Trans. Inf. Theory 28(2), 1982.
    """
    ends = max(low, -4.5), min(high, 4.5)
    borders = [ends[0] + (ends[1] - ends[0]) * i / 4 for i in (1, 2, 3)]
    for _ in range(5000):
        mass, moment = _cells([low, *borders, high])
        levels = (moment / mass).tolist()
        moved = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
        if max(abs(a - b) for a, b in zip(moved, borders, strict=True)) < 1e-13:
            break
        borders = moved
    return [round(level, 6) for level in levels]


def _cells(borders: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mass and first moment of a unit Gaussian between neighbouring borders."""
    edges = torch.tensor(borders, dtype=torch.float64)
    mass = torch.special.ndtr(edges).diff()
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    return mass, -density.diff()
