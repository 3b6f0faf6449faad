"""From a task and what its node has measured to a read plan."""

import time
from collections.abc import Sequence
from dataclasses import replace

from kvstrata.methods.presets import Method
from kvstrata.prefill_node.prefill import num_prompt_blocks
from kvstrata.prefill_node.read_plan import (
    Precision,
    Reading,
    ReadPlan,
    StoredBlock,
    TierRate,
    fetch_all,
    plan_read,
)
from kvstrata.prefill_node.read_rates import settings_of
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import Worker
from kvstrata.protos.identity import BLOCK_TOKENS


def plan_of(
    worker: Worker,
    task: Task,
    token_ids: Sequence[int],
    stored: Sequence[StoredBlock],
    *,
    must_publish: bool = False,
) -> ReadPlan:
    """Return how to read the stored blocks of a task.

    All are fetched where a rate or a size is not known yet, and under methods with stages, whose
    blocks may depend on each other.

    Args:
        worker: Has measured the rates.
        task: Says what may be given up, and how much time there is.
        token_ids: What is known of the sequence: the prompt, and what was generated.
        stored: What is known of its blocks in the store, from the first on.
        must_publish: Whether what is computed goes to the store: then all is read as finely as
            stored, because nothing else may be stored.
    """
    num_tokens = len(token_ids)
    num_blocks = num_prompt_blocks(num_tokens, task.method)
    if not task.ask_store:
        return fetch_all(0)
    expected = min(task.expected_blocks, num_blocks)
    stored = stored[:num_blocks]
    default, rates = fetch_all(max(expected, len(stored))), worker.rates
    token_s, method = rates.token_s, task.method
    if len(stored) < max(expected, 1) or token_s is None or method.pipeline.stages:
        return default
    tiers: dict[str, TierRate] = {}
    for tier in {block.tier for block in stored}:
        if (rate := rates.tier(tier)) is None:
            return default
        tiers[tier] = rate
    allowed = (method,) if must_publish else (method, *_coarser(task))
    precisions: list[Precision] = []
    for number, allowed_method in enumerate(allowed):
        found = rates.precision(
            settings_of(method.codec), allowed_method.wanted, method.codec.strata
        )
        if found is not None:
            precisions.append(found)
        elif not number:
            return default
    lossless = method.codec.lossless
    cuts = _cuts(task, len(stored), is_free=lossless or len(allowed) > 1)
    answer_s = _answer_s(worker, task, num_tokens - len(task.prompt_ids))
    return plan_read(
        Reading(
            blocks=tuple(stored),
            num_blocks=num_blocks,
            precisions=tuple(precisions),
            cuts=_held(worker, task, token_ids, cuts),
            tiers=tiers,
            block_s=BLOCK_TOKENS * token_s,
            seal_s=rates.seal_s(settings_of(method.codec)),
            seals_all=not lossless,
            queue_s=worker.steps.num_queued * token_s,
            limit_s=_limit_s(task, answer_s) - (num_tokens - num_blocks * BLOCK_TOKENS) * token_s,
            answer_s=answer_s,
        )
    )


def planned(task: Task, plan: ReadPlan) -> Task:
    """Return the task as the plan reads it."""
    if not plan.num_fetched or plan.strata in ((), task.method.wanted):
        return task
    return replace(task, method=replace(task.method, finest=plan.strata[-1]))


def _coarser(task: Task) -> list[Method]:
    """Return the method at what coarser readings the task allows, finest first."""
    method, coarsest = task.method, task.coarsest
    if coarsest is None:
        return []
    below = [s for s in reversed(method.wanted[:-1]) if s >= coarsest]
    return [replace(method, finest=stratum) for stratum in below]


def _cuts(task: Task, num_stored: int, *, is_free: bool) -> tuple[int, ...]:
    """Return after how many stored blocks fetching may end.

    A lossy method's prompt is fetched whole or computed whole: computed on top of what was stored,
    blocks differ a little from those of either. What was generated follows block by block anyway.
    """
    if is_free:
        return tuple(range(num_stored + 1))
    prompt = num_prompt_blocks(len(task.prompt_ids), task.method)
    return tuple(sorted({0, num_stored, *range(prompt, num_stored)}))


def _held(
    worker: Worker, task: Task, token_ids: Sequence[int], cuts: tuple[int, ...]
) -> tuple[int, ...]:
    """Return those of ascending cuts for which the node has memory; computing takes more of it."""

    def is_held(cut: int) -> bool:
        num_prompt, num_cached = len(task.prompt_ids), cut * BLOCK_TOKENS
        needed = worker.steps.bytes_for(task.method, token_ids, num_prompt, num_cached)
        return needed <= worker.steps.capacity

    if is_held(cuts[0]):
        return cuts
    return (*filter(is_held, cuts[:-1]), cuts[-1])


def _answer_s(worker: Worker, task: Task, num_generated: int) -> float:
    """Return the seconds that the rest of the answer takes at most; 0 while that is not known."""
    steps = worker.steps
    if not steps.counts.get("generated_tokens"):
        return 0.0
    return max(0, task.sampling.max_tokens - num_generated) * steps.times.pass_s(1)


def _limit_s(task: Task, answer_s: float) -> float:
    """Return the seconds until the first token must be there, if all others are to be in time."""
    return min(task.first_token_unix_s, task.deadline_unix_s - answer_s) - time.time()
