"""TTFT without a service: transformers, and our engine, each as one process that keeps nothing."""

import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from kvstrata.engine.gguf_conversion import read_model
from kvstrata.engine.loading import find_default_model
from kvstrata.engine.model import Model
from kvstrata.kernels.warmup import WORKER_OPS, warm_up

CHUNK = 512  # as a worker computes prompts; of 512, 1024 and whole prompts none is faster by 5%


class SingleProcess:
    """Our engine, in this process: no codec, no store, no hand-over. Bytes of KV as computed."""

    name = "kvstrata single process"

    def __init__(self, dtype: torch.dtype) -> None:
        self._model = Model.load(dtype=dtype, device="cpu")
        self._model.pack()
        self.tokenizer = self._model.tokenizer
        warm_up((self._model.spec.head_dim,), (dtype,), WORKER_OPS)

    def ask(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Return the seconds until the first token is chosen, and the token."""
        start = time.perf_counter()
        cache = self._model.new_cache(capacity=len(prompt))
        for first in range(0, len(prompt), CHUNK):
            logits = self._model.forward(cache, prompt[first : first + CHUNK])
        token = int(logits[-1].argmax() if logits.ndim > 1 else logits.argmax())
        return time.perf_counter() - start, token


class Transformers:
    """``transformers``' own model over a DynamicCache: the first step of ``generate``."""

    name = "transformers"

    def __init__(self, dtype: torch.dtype) -> None:
        folder, name = find_default_model()
        self._model: Any = read_model(folder / name, dtype).eval()
        self._model.generation_config.eos_token_id = None

    @torch.inference_mode()
    def ask(self, prompt: Sequence[int]) -> tuple[float, int]:
        """Return the seconds until the first token is chosen, and the token."""
        start = time.perf_counter()
        cache = transformers.DynamicCache(config=self._model.config)
        for chunk in torch.tensor([list(prompt)]).split(CHUNK, 1):
            out = self._model(chunk, past_key_values=cache, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        return time.perf_counter() - start, token
