"""From keyword arguments to a ``GenerateRequest``, checked before anything is sent.

Only what is wrong for every server is refused here; what depends on the served model (vocabulary,
context, presets) the server answers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from kvstrata.client.method_settings import MethodSettings, StratumName, set_method, stratum_of
from kvstrata.client.validation import check_integer, check_number, check_seconds, check_text
from kvstrata.client.visuals import Visual, to_visuals
from kvstrata.protos import inference_pb2, retention_pb2
from kvstrata.protos.errors import (
    EmptyPromptError,
    InvalidRequestError,
    InvalidTokenError,
    LimitError,
    MessageTooLargeError,
)
from kvstrata.protos.service import MAX_MESSAGE_BYTES

Role = Literal["system", "user", "assistant"]
Priority = Literal["low", "normal", "high"]

ROLES = ("system", "user", "assistant")
PRIORITIES = ("low", "normal", "high")
MAX_UINT32 = 2**32 - 1
MAX_UINT64 = 2**64 - 1
MAX_FLOAT32 = 3.4028234e38


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation; ``{"role": ..., "content": ...}`` is accepted in its place."""

    role: Role
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage | Mapping[str, str]]


class GenerateOptions(TypedDict, total=False):
    """Keyword arguments of every call that generates. None is the same as leaving one out.

    Attributes:
        preset: Named method settings; the server's default is "balanced".
        settings: Explicit method settings, in place of a preset.
        max_tokens: At most this many new tokens; the server's default is 256.
        temperature: 0, the default, is greedy.
        top_p: Nucleus sampling, above 0; the default 1 is off.
        top_k: Sample from the k likeliest; the default 0 is off.
        seed: Makes sampling repeatable.
        stop: Text, or texts, before which the continuation ends.
        ignore_eos: Go on past the end-of-sequence token.
        session_id: Names the conversation in logs and for ``release``; never part of a block's
            identity.
        model: Refuse to be answered by another model.
        timeout_s: Time limit of this call, in place of the client's.
        images: One for each placeholder in the prompt: a PNG or JPEG file as bytes or Path, or
            8-bit RGB pixels, (height, width, 3), such as a NumPy array; a list is a video.
        coarsest: The coarsest stratum that stored blocks may be read at, should the first token be
            late otherwise, and be refined later; by default they are read as finely as the preset
            or the settings say.
        first_token_s: When the first token is wanted; by default in time for ``timeout_s``.
        priority: Of this session's blocks in the store: "low" goes before all others, "high" after,
            as far as the store has room for such blocks. What a later request says holds for all.
        keep_s: How long that holds; at most, and by default, the store's limit.
    """

    preset: str | None
    settings: MethodSettings | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool
    session_id: str | None
    model: str | None
    timeout_s: float | None
    images: Sequence[Visual] | None
    coarsest: StratumName | None
    first_token_s: float | None
    priority: Priority | None
    keep_s: float | None


def build_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """Return the message for ``prompt`` and ``options``; ``timeout_s`` is not part of it.

    Raises:
        InvalidRequestError: Input that no server could answer; a subclass where one fits.
        MessageTooLargeError: The request is larger than a server accepts.
    """
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise InvalidRequestError(
            f"unknown option {sorted(unknown)[0]!r}",
            f"use one of {', '.join(GenerateOptions.__annotations__)}",
        )
    request = inference_pb2.GenerateRequest()
    _set_prompt(request, prompt)
    request.visuals.extend(to_visuals(options.get("images") or ()))
    set_method(request, options.get("preset"), options.get("settings"))
    _set_sampling(request.sampling, options)
    request.session_id = check_text("session_id", options.get("session_id") or "")
    request.model = check_text("model", options.get("model") or "")
    if (coarsest := options.get("coarsest")) is not None:
        request.coarsest_stratum = stratum_of("coarsest", coarsest)
    if (first_token_s := options.get("first_token_s")) is not None:
        milliseconds = check_seconds("first_token_s", first_token_s) * 1000
        request.first_token_ms = min(max(1, round(milliseconds)), MAX_UINT32)
    _set_retention(request, options.get("priority"), options.get("keep_s"))
    if request.ByteSize() > MAX_MESSAGE_BYTES:
        raise MessageTooLargeError(
            f"the request has {request.ByteSize()} bytes, a server accepts {MAX_MESSAGE_BYTES}",
            "shorten the prompt, or scale images down",
        )
    return request


def release_request(session_id: str) -> retention_pb2.ReleaseRequest:
    """Return the message that ends a session; ``InvalidRequestError`` without a name."""
    if not check_text("session_id", session_id):
        raise InvalidRequestError("no session to release", "name the session, such as a chat's id")
    return retention_pb2.ReleaseRequest(session=session_id)


def _set_retention(
    request: inference_pb2.GenerateRequest, priority: Priority | None, keep_s: float | None
) -> None:
    if priority is not None:
        if priority not in PRIORITIES:
            raise InvalidRequestError(
                f"unknown priority {str(priority)[:40]!r}", f"use one of {', '.join(PRIORITIES)}"
            )
        number = retention_pb2.Priority.Value(f"PRIORITY_{priority.upper()}")
        request.retention.priority = number  # type: ignore[assignment]
    if keep_s is not None:
        milliseconds = check_seconds("keep_s", keep_s) * 1000
        request.retention.keep_ms = min(max(1, round(milliseconds)), MAX_UINT32)


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        request.text = check_text("prompt", prompt)
        if not prompt:
            raise EmptyPromptError("the prompt is empty", "give at least one character")
        return
    if isinstance(prompt, bytes | bytearray | Mapping) or not isinstance(prompt, Iterable):
        raise InvalidRequestError(
            f"a prompt cannot be a {type(prompt).__name__}",
            "give text, a list of token ids, or a list of messages",
        )
    items = list(prompt)
    if not items:
        raise EmptyPromptError("the prompt is empty", "give at least one token id or message")
    if isinstance(items[0], ChatMessage | Mapping):
        request.messages.messages.extend(_message(i, item) for i, item in enumerate(items))
    else:
        request.token_ids.ids.extend(_token_id(i, item) for i, item in enumerate(items))


def _token_id(index: int, item: object) -> int:
    try:
        return check_integer(f"token id {index}", item, 0, MAX_UINT32)
    except InvalidRequestError as error:
        raise InvalidTokenError(error.message, "give ids of the model's vocabulary") from None


def _message(index: int, item: object) -> inference_pb2.ChatMessage:
    if isinstance(item, ChatMessage):
        role, content = item.role, item.content
    elif isinstance(item, Mapping) and item.keys() == {"role", "content"}:
        role, content = item["role"], item["content"]
    else:
        raise InvalidRequestError(
            f"message {index} is no chat message: {str(item)[:80]!r}",
            'give {"role": "user", "content": "..."} or ChatMessage(role, content)',
        )
    if role not in ROLES:
        raise InvalidRequestError(
            f"message {index} has the role {str(role)[:40]!r}", f"use one of {', '.join(ROLES)}"
        )
    content = check_text(f"the content of message {index}", content)
    return inference_pb2.ChatMessage(role=role, content=content)


def _set_sampling(sampling: inference_pb2.Sampling, options: GenerateOptions) -> None:
    if (max_tokens := options.get("max_tokens")) is not None:
        sampling.max_tokens = check_integer("max_tokens", max_tokens, 1, MAX_UINT32)
    if (temperature := options.get("temperature")) is not None:
        sampling.temperature = check_number("temperature", temperature, 0.0, MAX_FLOAT32)
    if (top_p := options.get("top_p")) is not None:
        sampling.top_p = check_number("top_p", top_p, 0.0, 1.0)
        if top_p == 0:
            raise LimitError("top_p is 0", "give a number above 0 and at most 1")
    if (top_k := options.get("top_k")) is not None:
        sampling.top_k = check_integer("top_k", top_k, 0, MAX_UINT32)
    if (seed := options.get("seed")) is not None:
        sampling.seed = check_integer("seed", seed, 0, MAX_UINT64)
    sampling.stop.extend(_stops(options.get("stop")))
    sampling.ignore_eos = bool(options.get("ignore_eos"))


def _stops(stop: str | Sequence[str] | None) -> list[str]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        if not check_text("stop", text):
            raise InvalidRequestError("a stop string is empty", "give at least one character")
    return stops
