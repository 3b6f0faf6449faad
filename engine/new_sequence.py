"""Which kind of running sequence a method needs."""

from collections.abc import Sequence

from kvstrata.engine.kv_pool import KVPool
from kvstrata.engine.model import Model
from kvstrata.engine.selecting_sequence import SelectingSequence
from kvstrata.engine.sequence import RunningSequence
from kvstrata.engine.skipping_sequence import SkippingSequence
from kvstrata.methods.presets import Method


def new_sequence(
    model: Model,
    method: Method,
    token_ids: Sequence[int],
    *,
    salt: bytes = b"",
    num_prompt: int | None = None,
    pool: KVPool | None = None,
) -> RunningSequence:
    """Return the sequence of a request, in ``pool`` unless its method has stages.

    Raises:
        ArenaFullError: The pool has no place for another sequence.
    """
    if method.pipeline.stages:
        return SelectingSequence(model, method, token_ids, salt=salt, num_prompt=num_prompt)
    if method.skip is not None:
        return SkippingSequence(
            model, method, token_ids, salt=salt, num_prompt=num_prompt, pool=pool
        )
    return RunningSequence(model, method, token_ids, salt=salt, pool=pool)
