"""A request's answer while it is made: its tokens, their text, and whether they end it."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import torch

from kvstrata.engine.detokenizer import Detokenizer
from kvstrata.engine.model import Model
from kvstrata.engine.sampling import sample
from kvstrata.prefill_node.task import Task
from kvstrata.protos.inference_pb2 import FinishReason, GenerateReply

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


class Answer:
    """What a node has generated for a task; tokens that were delivered before are taken as read.

    Any node continues it: a draw depends on the seed and on how many tokens there are already.

    Attributes:
        token_ids: All of its tokens so far.
        finish: Why it is complete; None while it is not.
    """

    def __init__(self, model: Model, task: Task) -> None:
        """Begin behind ``task.generated_ids``, in the running event loop."""
        self._spec = model.spec
        self._task = task
        self._detokenizer = Detokenizer(model.tokenizer, task.sampling.stop)
        self._loop = asyncio.get_running_loop()
        self._replies: asyncio.Queue[GenerateReply | None] = asyncio.Queue()
        self.token_ids = list(task.generated_ids)
        for token_id in self.token_ids:
            self._detokenizer.push(token_id)
        self.finish = self._finished()

    def choose(self, logits: torch.Tensor) -> int | None:
        """Choose, and send, the next token; in any thread. None if that ends the answer."""
        token_id = sample(logits, self._task.sampling, len(self.token_ids))
        self.token_ids.append(token_id)
        text = self._detokenizer.push(token_id)
        self.finish = self._finished()
        if self.finish is not None:
            text += self._detokenizer.finish()
        reply = GenerateReply(token_ids=[token_id], text=text)
        self._loop.call_soon_threadsafe(self._replies.put_nowait, reply)
        return token_id if self.finish is None else None

    async def replies(self, work: Coroutine[Any, Any, None]) -> AsyncGenerator[GenerateReply]:
        """Yield a reply per token that ``work`` chooses; raise its errors, cancel it if closed."""
        working = asyncio.create_task(self._ending(work))
        try:
            while (reply := await self._replies.get()) is not None:
                yield reply
            await working
        finally:
            working.cancel()
            await asyncio.wait({working})

    async def _ending(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        finally:
            self._replies.put_nowait(None)

    def _finished(self) -> FinishReason | None:
        if not self.token_ids:
            return None
        task, spec = self._task, self._spec
        ends = self.token_ids[-1] in spec.eos_token_ids and not task.sampling.ignore_eos
        if ends or self._detokenizer.stopped is not None:
            return STOP
        length = len(task.prompt_ids) + len(self.token_ids)
        if len(self.token_ids) >= task.sampling.max_tokens or length >= spec.max_positions:
            return LENGTH
        return None
