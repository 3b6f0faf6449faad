"""Blocks that were read coarse and are refined give what blocks read finely give."""

from dataclasses import replace

import pytest
import torch

from kvstrata.engine import Model
from kvstrata.engine.kv_arena import ArenaFullError
from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.sequence import Loaded, RunningSequence
from kvstrata.methods.presets import Method
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from tests.engine.test_paged_cache import POOL_BYTES, assert_near, methods, paged, start, wide
from tests.engine.test_sequence import BASE, greedy, opened, prompt_of, tail

__all__ = ["methods", "wide"]
LAYERED = pytest.mark.parametrize("kind", ["fallback", "pre", "frame"])
POOLED = pytest.mark.parametrize("pooled", [True, False], ids=["pool", "alone"])
PROMPT = prompt_of(200)


def coarse(method: Method) -> Method:
    return replace(method, finest=BASE)


def added(method: Method) -> tuple[Stratum, ...]:
    return tuple(s for s in method.wanted if s != BASE)


def loaded(
    model: Model, method: Method, frames: list[dict[Stratum, Frame]], pool: KVPool | None
) -> RunningSequence:
    """Return a sequence of the prompt that holds blocks as a method reads them."""
    sequence = RunningSequence(model, method, PROMPT, pool=pool)
    assert sequence.load([{s: b[s] for s in method.wanted} for b in frames]).reason is None
    return sequence


@LAYERED
@POOLED
def test_refined_blocks_are_those_that_were_read_finely(
    wide: dict[str, Model], methods: dict[tuple[str, str], Method], kind: str, pooled: bool
) -> None:
    model, method = wide["wide"], methods["wide", kind]
    pool = KVPool(model, POOL_BYTES) if pooled else None
    frames = opened(start(model, method, PROMPT, None)[1], method.wanted)
    fine = loaded(model, method, frames, pool)
    refined = loaded(model, coarse(method), frames, pool)
    for first, last in ((0, 2), (2, 3)):
        found = refined.refine(method, first, frames[first:last], added(method))
        assert found == Loaded(last - first, None)
    assert refined.layer_bits == fine.layer_bits
    assert not refined.committable
    assert fine.committable
    wanted, got = tail(fine), tail(refined)
    assert torch.equal(got, wanted)
    assert greedy(refined, got, 56)[0] == greedy(fine, wanted, 56)[0]  # a block fills
    if pool is not None:
        assert paged(refined).num_bytes == paged(fine).num_bytes
        paged(refined).close()
        paged(fine).close()
        pool.check_integrity()
        assert pool.arena.used_bytes == 0


@LAYERED
def test_blocks_are_refined_while_tokens_come(
    wide: dict[str, Model], methods: dict[tuple[str, str], Method], kind: str
) -> None:
    model, method = wide["wide"], methods["wide", kind]
    frames = opened(start(model, method, PROMPT, None)[1], method.wanted)
    pool = KVPool(model, POOL_BYTES)
    sequence, still = (loaded(model, coarse(method), frames, pool) for _ in range(2))
    logits, others = tail(sequence), tail(still)
    assert torch.equal(logits, others)
    before, logits, _ = greedy(sequence, logits, 4)
    assert greedy(still, others, 4)[0] == before
    sequence.refine(method, 0, frames, added(method))
    plain = loaded(model, coarse(method), frames, None)
    plain.extend([*PROMPT[192:], *before])
    plain.refine(method, 0, frames, added(method))
    got, wanted = sequence.extend([5])[0], plain.extend([5])[0]
    assert_near(got, wanted)
    assert not torch.allclose(still.extend([5])[0], got, rtol=1e-4)
    pool.check_integrity()


@LAYERED
@POOLED
def test_a_damaged_rest_leaves_a_block_coarse_and_the_others_fine(
    wide: dict[str, Model], methods: dict[tuple[str, str], Method], kind: str, pooled: bool
) -> None:
    model, method = wide["wide"], methods["wide", kind]
    pool = KVPool(model, POOL_BYTES) if pooled else None
    sealed = start(model, method, PROMPT, None)[1]
    frames = opened(sealed, method.wanted)
    finest = method.wanted[-1]
    damaged = bytearray(sealed[1].frames[finest])
    damaged[-1] ^= 1
    broken = [*frames]
    broken[1] = {**frames[1], finest: Frame.open(bytes(damaged))}
    partly = loaded(model, coarse(method), frames, pool)
    assert partly.refine(method, 0, broken, added(method)) == Loaded(1, "corrupt")
    assert partly.refine(method, 2, broken[2:], added(method)) == Loaded(1, None)
    wanted = loaded(model, coarse(method), frames, pool)
    for index in (0, 2):
        wanted.refine(method, index, frames[index : index + 1], added(method))
    absent = [{BASE: frames[1][BASE]}]
    assert wanted.refine(method, 1, absent, added(method)) == Loaded(0, "stratum_absent")
    assert torch.equal(tail(partly), tail(wanted))
    if pool is not None:
        pool.check_integrity()


def test_without_room_to_hold_blocks_twice_they_stay_coarse(
    wide: dict[str, Model], methods: dict[tuple[str, str], Method]
) -> None:
    model, method = wide["wide"], methods["wide", "frame"]
    frames = opened(start(model, method, PROMPT, None)[1], method.wanted)
    small, large = KVPool(model, POOL_BYTES), KVPool(model, POOL_BYTES)
    sequence = loaded(model, coarse(method), frames, small)
    small.arena.allocate(small.arena.free_bytes - 64 * small.arena.page_bytes)
    while small.arena.free_bytes > 0:
        small.arena.allocate(64)
    held = paged(sequence).num_bytes
    with pytest.raises(ArenaFullError):
        sequence.refine(method, 0, frames, added(method))
    assert paged(sequence).num_bytes == held
    small.check_integrity()
    other = loaded(model, coarse(method), frames, large)
    assert torch.equal(paged(sequence).expanded(2)[0], paged(other).expanded(2)[0])
