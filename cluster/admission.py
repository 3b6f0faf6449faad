"""From a ``GenerateRequest`` to a checked ``Task``: all that can be wrong with it is said here."""

import logging
import math
import secrets
import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from kvstrata.cluster.visuals import place_visuals
from kvstrata.engine.chat import encode_text, render_chat
from kvstrata.engine.sampling import SamplingParams
from kvstrata.methods.gate_weights import GATES, GateError, GateWeights
from kvstrata.methods.presets import Method, from_preset, from_settings
from kvstrata.methods.profile import PROFILES, Profile
from kvstrata.methods.representatives import check_layers
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import WorkerInfo
from kvstrata.protos.errors import (
    EmptyPromptError,
    InvalidRequestError,
    InvalidTokenError,
    LimitError,
    PromptTooLongError,
    UnknownModelError,
)
from kvstrata.protos.inference_pb2 import GenerateRequest, Sampling
from kvstrata.protos.retention import MAX_NAME_CHARS, read_retention

logger = logging.getLogger(__name__)

MAX_DEADLINE_S = 3600.0


@dataclass(frozen=True, slots=True)
class Admission:
    """Checks requests against one served model.

    Attributes:
        info: The model's limits.
        tokenizer: The model's tokenizer.
        salt: The tenant's secret part of the cache scope.
    """

    info: WorkerInfo
    tokenizer: Any
    salt: bytes = field(repr=False)

    def admit(self, request: GenerateRequest, remaining_s: float | None) -> Task:
        """Return the task of a request.

        Args:
            request: As received.
            remaining_s: The caller's own time limit, if it set one.

        Raises:
            InvalidRequestError: Empty prompt, bad token id, bad chat message, a number out of
                range.
            NotFoundError: No such preset, codec or model.
            PromptTooLongError: The prompt leaves no room for one token.
            ImageError: See ``place_visuals``.
        """
        if request.model and request.model != self.info.model:
            raise UnknownModelError(
                f"model {request.model[:128]!r} is not served here",
                f"use {self.info.model!r} or leave the model out",
            )
        method = self._method(request)
        sampling = sampling_params(request.sampling)
        prompt_ids, images = place_visuals(self._prompt_ids(request), request.visuals, self.info)
        if len(prompt_ids) >= self.info.max_positions:
            raise PromptTooLongError(
                f"the prompt has {len(prompt_ids)} tokens, the model's context is "
                f"{self.info.max_positions}",
                f"shorten the prompt to at most {self.info.max_positions - 1} tokens",
            )
        coarsest = request.coarsest_stratum or None
        if coarsest is not None and coarsest not in method.wanted:
            raise LimitError(
                f"codec {method.codec.name!r} has no stratum {coarsest} to read",
                "leave coarsest_stratum out, or take one that is read",
            )
        request_id, session_id = uuid.uuid4().hex, request.session_id[:MAX_NAME_CHARS]
        retention = None
        if request.HasField("retention"):
            retention = replace(read_retention(request.retention), session=session_id or request_id)
        now = time.time()
        first_token_s = request.first_token_ms / 1000 if request.first_token_ms else math.inf
        return Task(
            request_id=request_id,
            prompt_ids=tuple(prompt_ids),
            images=images,
            method=method,
            sampling=sampling,
            deadline_unix_s=now
            + (MAX_DEADLINE_S if remaining_s is None else min(remaining_s, MAX_DEADLINE_S)),
            session_id=session_id,
            retention=retention,
            salt=self.salt,
            coarsest=coarsest,
            first_token_unix_s=now + first_token_s,
        )

    @property
    def placeholder(self) -> str:
        """Text that marks the place of a picture or video; empty for a model of text alone."""
        if not self.info.image_tokens:
            return ""
        return str(self.tokenizer.decode([self.info.placeholder_id]))

    @property
    def _profile(self) -> Profile | None:
        return PROFILES.by_id(self.info.profile_id) if self.info.profile_id else None

    @property
    def _gates(self) -> GateWeights | None:
        try:
            return GATES.by_id(self.info.gates_id) if self.info.gates_id else None
        except GateError:  # they lie on the workers' machine alone: others need none of them
            logger.warning("the workers' gates are not on this machine", exc_info=True)
            return None

    def _method(self, request: GenerateRequest) -> Method:
        if request.WhichOneof("method") == "settings":
            method = from_settings(
                request.settings, self._profile, self._gates, num_layers=self.info.num_layers
            )
            check_layers(method.represented, self.info.num_layers)
            return method
        return self.preset(request.preset)

    def preset(self, name: str) -> Method:
        """Return what a preset means for the served model; ``UnknownPresetError`` for no preset."""
        return from_preset(name, self._profile, self._gates)

    def _prompt_ids(self, request: GenerateRequest) -> tuple[int, ...]:
        kind = request.WhichOneof("prompt")
        try:
            if kind == "messages":
                messages = [
                    {"role": m.role, "content": m.content} for m in request.messages.messages
                ]
                ids = render_chat(self.tokenizer, messages) if messages else []
            elif kind == "text":
                ids = encode_text(self.tokenizer, request.text) if request.text else []
            else:
                ids = list(request.token_ids.ids)
        except ValueError as error:
            raise InvalidRequestError(str(error), "correct the prompt") from error
        if not ids:
            raise EmptyPromptError("the prompt is empty", "send at least one token of text")
        bad = next((i for i in ids if i >= self.info.vocab_size), None)
        if bad is not None:
            raise InvalidTokenError(
                f"token id {bad} is outside the vocabulary",
                f"use ids from 0 to {self.info.vocab_size - 1}",
            )
        return tuple(ids)


def sampling_params(sampling: Sampling) -> SamplingParams:
    """Return checked sampling parameters; a seed is drawn here, so that replays repeat it.

    Raises:
        LimitError: Names the field and its range.
    """
    given = {
        name: getattr(sampling, name)
        for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")
        if sampling.HasField(name)
    }
    given.setdefault("seed", secrets.randbits(63))
    params = SamplingParams(**given, stop=tuple(sampling.stop), ignore_eos=sampling.ignore_eos)
    try:
        params.validate()
    except ValueError as error:
        raise LimitError(str(error), "use a value in that range") from error
    return params
