"""Synthetic pictures and videos with questions whose answers are known: shapes, digits, order.

A picture is a grid of 8 x 8 cells of 16 pixels on a grey ground. Some cells hold a coloured shape,
and some pictures hold a digit. A video is a few frames; each shows one shape somewhere, so that the
order of events is the order of frames. All is drawn with NumPy and depends on the seed alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

SIDE, CELL = 128, 16
ACROSS = SIDE // CELL
COLOURS = {
    "red": (220, 50, 47),
    "green": (60, 170, 60),
    "blue": (50, 90, 220),
    "yellow": (230, 210, 60),
}
SHAPES = ("circle", "square", "triangle", "cross")
MAX_SHAPES, MAX_FRAMES = 6, 4
_GLYPHS = (  # 5 x 7 dots, row by row
    "01110100011001110101110011000101110",
    "00100011000010000100001000010001110",
    "01110100010000100010001000100011111",
    "11111000100010000010000011000101110",
    "00010001100101010010111110001000010",
    "11111100001111000001000011000101110",
    "00110010001000011110100011000101110",
    "11111000010001000100010000100001000",
    "01110100011000101110100011000101110",
    "01110100011000101111000010001001100",
)

Picture = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scene:
    """What is shown, and what can be asked.

    Attributes:
        frames: uint8 (SIDE, SIDE, 3) each; one of them is a picture, several are a video.
        shown: Of each frame, the cells that hold something and what: "red circle", "7".
        questions: Pairs of question and answer.
        kinds: Of each question: "colour", "shape", "count", "digit", "order".
    """

    frames: tuple[Picture, ...]
    shown: tuple[dict[int, str], ...]
    questions: tuple[tuple[str, str], ...]
    kinds: tuple[str, ...]


def picture(draw: np.random.Generator) -> Scene:
    """Return a picture of shapes, every second one with a digit."""
    pixels = _ground(draw)
    num_shapes = int(draw.integers(1, MAX_SHAPES + 1))
    has_digit = bool(draw.integers(2))
    cells = draw.permutation(ACROSS**2)[: num_shapes + has_digit]
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    shown = [pairs[i] for i in draw.permutation(len(pairs))[:num_shapes]]
    held = {}
    for cell, (colour, shape) in zip(cells, shown, strict=False):
        _draw(pixels, int(cell), _shape(shape), COLOURS[colour])
        held[int(cell)] = f"{colour} {shape}"
    asked = [("count", "how many shapes?", str(num_shapes))]
    colours, shapes = [c for c, _ in shown], [s for _, s in shown]
    for colour, shape in shown:
        if shapes.count(shape) == 1:
            asked.append(("colour", f"what colour is the {shape}?", colour))
        if colours.count(colour) == 1:
            asked.append(("shape", f"which shape is {colour}?", shape))
    for colour in COLOURS:
        asked.append(("count", f"how many are {colour}?", str(colours.count(colour))))
    if has_digit:
        digit = int(draw.integers(10))
        _draw(pixels, int(cells[-1]), _digit(digit), (250, 250, 250))
        asked.append(("digit", "which digit?", str(digit)))
        held[int(cells[-1])] = str(digit)
    return _scene(draw, (pixels,), (held,), asked)


def video(draw: np.random.Generator) -> Scene:
    """Return a video of ``MAX_FRAMES`` frames or fewer, a different shape in each."""
    pairs = [(c, s) for c in COLOURS for s in SHAPES]
    count = int(draw.integers(2, MAX_FRAMES + 1))
    shown = [pairs[i] for i in draw.permutation(len(pairs))[:count]]
    names = [f"{colour} {shape}" for colour, shape in shown]
    frames, held = [], []
    for (colour, shape), name in zip(shown, names, strict=True):
        pixels, cell = _ground(draw), int(draw.integers(ACROSS**2))
        _draw(pixels, cell, _shape(shape), COLOURS[colour])
        frames.append(pixels)
        held.append({cell: name})
    asked = [
        ("order", "what came first?", names[0]),
        ("order", "what came last?", names[-1]),
        ("count", "how many frames?", str(count)),
    ]
    for before, after in pairwise(names):
        asked.append(("order", f"what came after the {before}?", after))
        asked.append(("order", f"what came before the {after}?", before))
    return _scene(draw, frames, held, asked)


def _scene(
    draw: np.random.Generator,
    frames: Sequence[Picture],
    shown: Sequence[dict[int, str]],
    asked: Sequence[tuple[str, str, str]],
) -> Scene:
    order = [asked[i] for i in draw.permutation(len(asked))]
    return Scene(
        tuple(frames),
        tuple(shown),
        tuple((q, a) for _, q, a in order),
        tuple(k for k, _, _ in order),
    )


def _ground(draw: np.random.Generator) -> Picture:
    return np.full((SIDE, SIDE, 3), int(draw.integers(20, 70)), np.uint8)


def _draw(
    pixels: Picture, cell: int, mask: NDArray[np.bool_], colour: tuple[int, int, int]
) -> None:
    y, x = cell // ACROSS * CELL, cell % ACROSS * CELL
    pixels[y : y + CELL, x : x + CELL][mask] = colour


def _shape(name: str) -> NDArray[np.bool_]:
    y, x = np.mgrid[:CELL, :CELL] - (CELL - 1) / 2
    if name == "circle":
        return np.asarray(y**2 + x**2 <= 6.2**2)
    if name == "square":
        return np.asarray((abs(y) < 6) & (abs(x) < 6))
    if name == "triangle":
        return np.asarray((y > -6) & (y < 6) & (abs(x) < (y + 6.5) / 2))
    return np.asarray(((abs(x) < 2) | (abs(y) < 2)) & (abs(x) < 7) & (abs(y) < 7))


def _digit(digit: int) -> NDArray[np.bool_]:
    dots = np.array([dot == "1" for dot in _GLYPHS[digit]]).reshape(7, 5)
    return np.pad(dots.repeat(2, 0).repeat(2, 1), ((1, 1), (3, 3)))
