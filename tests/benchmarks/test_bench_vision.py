"""The small vision-language model: its scenes, its making, and what is measured of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bench_vision
import numpy as np
import pytest
import torch
import vision_model
from methods_plot import draw_vision
from vision_scenes import ACROSS, CELL, COLOURS, MAX_FRAMES, Scene, picture, video

from kvstrata.engine.model import Model


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices: threads would wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shows(scene: Scene, colour: str) -> list[bool]:
    """Return which frames have a pixel of a colour."""
    return [bool((frame == np.array(COLOURS[colour])).all(-1).any()) for frame in scene.frames]


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_what_the_pixels_show(seed: int) -> None:
    scene = picture(np.random.default_rng(seed))
    answers = dict(scene.questions)
    for colour in COLOURS:
        assert shows(scene, colour) == [answers[f"how many are {colour}?"] != "0"]
    scene = video(np.random.default_rng(seed))
    answers = dict(scene.questions)
    assert answers["how many frames?"] == str(len(scene.frames))
    assert 2 <= len(scene.frames) <= MAX_FRAMES
    assert shows(scene, answers["what came first?"].split()[0])[0]
    assert shows(scene, answers["what came last?"].split()[0])[-1]


@pytest.mark.parametrize("make", [picture, video])
def test_words_name_what_cells_show(make: Any) -> None:
    scene = make(np.random.default_rng(3))
    tokenizer = vision_model.build_tokenizer()
    words = vision_model.batch_of([scene], tokenizer)["words"].unflatten(0, (len(scene.frames), -1))
    for frame, held, found in zip(scene.frames, scene.shown, words, strict=True):
        cells = frame.reshape(ACROSS, CELL, ACROSS, CELL, 3).transpose(0, 2, 1, 3, 4)
        cells = cells.reshape(ACROSS**2, -1)
        assert {i for i, cell in enumerate(cells) if len(set(cell)) > 1} == set(held)
        for cell, (first, last) in enumerate(found.tolist()):
            said = dict.fromkeys(tokenizer.decode([token]).strip() for token in (first, last))
            assert " ".join(said) == held.get(cell, vision_model.PAD)


def test_scenes_depend_on_their_seed_alone() -> None:
    one, same, other = (picture(np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert one.questions == same.questions
    assert np.array_equal(one.frames[0], same.frames[0])
    assert not np.array_equal(one.frames[0], other.frames[0])


def train(folder: Path, steps: int = 4) -> Any:
    return vision_model.train(folder, steps=steps, batch=3, rate=1e-3, seed=0, save_s=0)


def test_training_resumes_where_it_was_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = vision_model.batch_of
    calls = iter(range(4))

    def cut(*given: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return made(*given)

    whole = train(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(vision_model, "batch_of", cut)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut")
    saved = torch.load(tmp_path / "cut" / "training.pt", weights_only=True)
    assert saved["step"] == 3
    for one, two in zip(whole.parameters(), train(tmp_path / "cut").parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_model_is_served_and_measured(tmp_path: Path) -> None:
    vision_model.write(train(tmp_path, steps=1), tmp_path)
    model = Model.load(str(tmp_path), dtype="float32", device="cpu")
    assert model.vision is not None
    assert model.vision.num_tokens == vision_model.IMAGE_TOKENS
    rows = bench_vision.measure(model, bench_vision.questions(1, 1, 0))
    assert {row["shown"] for row in rows} == {"pictures", "videos"}
    assert len(rows) == 2 * len(bench_vision.methods())
    by_name = {(row["method"], row["budget"], row["shown"]): row for row in rows}
    assert by_name["fallback", 1.0, "videos"]["ratio"] > 3
    assert by_name["h2o", 0.2, "videos"]["kept"] < 0.3
    assert (
        by_name["random", 0.2, "videos"]["kept"] <= by_name["random", 0.5, "videos"]["kept"] < 0.6
    )
    assert by_name["uncompressed", 1.0, "videos"]["kl"] == 0
    for row in rows:
        assert row["kl"] >= 0
        assert row["peer"] == (row["method"] in ("random", "streaming"))
    draw_vision(rows, tmp_path)
    assert (tmp_path / "vision.png").stat().st_size > 10_000
    for name in ("zipvl, rest evicted", "zipvl, rest in low bits"):
        shares = [by_name[name, tau, "videos"]["r"] for tau in bench_vision.TAUS]
        assert shares == sorted(shares, reverse=True)
        assert 0 < shares[-1] <= shares[0] <= 1
