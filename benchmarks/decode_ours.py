"""Decoding with KVStrata's own engine, as a decode worker does it: the step loop over the pool."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.model import Model
from kvstrata.engine.sequence import FrameSet, RunningSequence
from kvstrata.engine.step_loop import StepLoop
from kvstrata.methods.calibrated import CalibratedCodec
from kvstrata.methods.presets import Method, from_preset
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BLOCK_TOKENS

POOL_BYTES = 6 << 30


@dataclass(frozen=True)
class Run:
    """What one run showed.

    Attributes:
        steps_s: When each token of each sequence came, (batch, tokens), seconds.
        kv_bytes: Everything that the sequences held at the end.
        layer_executions: Layers that ran for generated tokens, of all sequences, if some skip any.
    """

    steps_s: list[list[float]]
    kv_bytes: int
    layer_executions: int = 0


def methods(model: Model) -> dict[str, Method]:
    """Return what is measured, by name. Blocks of the form "frame" are attended as they are."""
    balanced, exact = (from_preset(name, profile=model.profile) for name in ("balanced", "exact"))
    assert isinstance(balanced.codec, CalibratedCodec), "the model has no profile"
    in_place = replace(balanced, codec=replace(balanced.codec, form="frame"))
    return {"balanced": balanced, "balanced, frame": in_place, "exact": exact}


async def decode(
    model: Model,
    method: Method,
    prompt: Sequence[int],
    batch: int,
    num_tokens: int,
    arriving: Sequence[int] = (),
) -> Run:
    """Generate from ``batch`` sequences whose prompt but its last token comes as blocks.

    Args:
        model: What runs.
        method: Of all sequences.
        prompt: Of those that generate.
        batch: How many they are.
        num_tokens: Of each.
        arriving: A prompt that comes meanwhile, again and again: computed, sealed, gone.
    """
    steps = StepLoop(model, KVPool(model, POOL_BYTES))
    try:
        blocks = await _blocks(steps, method, prompt)
        sequences = [await steps.open(method, prompt) for _ in range(batch)]
        for sequence in sequences:
            loaded = await steps.load(sequence, blocks)
            assert loaded.num_blocks == len(blocks), loaded.reason
        times: list[list[float]] = [[] for _ in sequences]
        others = asyncio.create_task(_arrive(steps, method, arriving))
        await asyncio.gather(
            *(_generate(steps, s, own, num_tokens) for s, own in zip(sequences, times, strict=True))
        )
        assert not arriving or not others.done(), "prompts stopped arriving"
        others.cancel()
        await asyncio.wait({others})
        kv_bytes = await steps.call(lambda: steps.pool.num_bytes)
        ran = sum(sequence.layer_executions for sequence in sequences)
        for sequence in sequences:
            await steps.close(sequence)
        return Run(times, kv_bytes, ran)
    finally:
        await asyncio.to_thread(steps.stop)


async def _arrive(steps: StepLoop, method: Method, prompt: Sequence[int]) -> None:
    """Compute and seal a prompt, as a prefill does, until cancelled; nothing without one."""
    count = len(prompt) // BLOCK_TOKENS
    while prompt:
        sequence = await steps.open(method, prompt)
        try:
            async for _ in steps.compute(sequence, count * BLOCK_TOKENS):
                pass
            await steps.seal(sequence, 0, count)
        finally:
            await steps.close(sequence)


async def _blocks(steps: StepLoop, method: Method, prompt: Sequence[int]) -> list[FrameSet]:
    sequence = await steps.open(method, prompt)
    count = (len(prompt) - 1) // BLOCK_TOKENS
    async for _ in steps.compute(sequence, count * BLOCK_TOKENS):
        pass
    sealed = await steps.seal(sequence, 0, count)
    await steps.close(sequence)
    wanted = method.wanted
    return [{s: Frame.open(f) for s, f in b.frames.items() if s in wanted} for b in sealed]


async def _generate(
    steps: StepLoop, sequence: RunningSequence, times: list[float], num_tokens: int
) -> None:
    def choose(logits: torch.Tensor) -> int | None:
        times.append(time.perf_counter())
        return int(logits.argmax()) if len(times) < num_tokens else None

    await steps.generate(sequence, choose, lambda _: None)
