"""Requests that cannot be served: each is told what is wrong, and the service goes on."""

import math
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from kvstrata.cluster import admission
from kvstrata.cluster.admission import Admission, sampling_params
from kvstrata.engine import Model
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.prefill_node import PrefillNode, WorkerConfig
from kvstrata.protos.errors import UnknownPresetError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.inference_pb2 import (
    ChatMessage,
    ChatMessages,
    GenerateRequest,
    H2OSettings,
    MethodSettings,
    Sampling,
    SkipDecodeSettings,
    TokenIds,
)
from tests.cluster.local_workers import GENERATE, Cluster, error_of, has_details, request_of
from tests.prefill_node.nodes import MAX_POSITIONS, VOCAB_SIZE, prompt_of

Code = grpc.StatusCode


def chat(role: str, content: str = "Hello") -> GenerateRequest:
    messages = [ChatMessage(role=role, content=content)]
    return GenerateRequest(messages=ChatMessages(messages=messages))


def ids(*values: int) -> GenerateRequest:
    return GenerateRequest(token_ids=TokenIds(ids=values))


def text(**fields: Any) -> GenerateRequest:
    return GenerateRequest(text="Hello", **fields)


def sampled(**fields: Any) -> GenerateRequest:
    return text(sampling=Sampling(**fields))


def method(**fields: Any) -> GenerateRequest:
    return text(settings=MethodSettings(**fields))


BAD: dict[str, tuple[GenerateRequest, Code, str]] = {
    "empty text": (GenerateRequest(text=""), Code.INVALID_ARGUMENT, "EmptyPromptError"),
    "empty messages": (
        GenerateRequest(messages=ChatMessages()),
        Code.INVALID_ARGUMENT,
        "EmptyPromptError",
    ),
    "no prompt": (GenerateRequest(), Code.INVALID_ARGUMENT, "EmptyPromptError"),
    "no token ids": (ids(), Code.INVALID_ARGUMENT, "EmptyPromptError"),
    "bad role": (chat("boss"), Code.INVALID_ARGUMENT, "InvalidRequestError"),
    "empty role": (chat(""), Code.INVALID_ARGUMENT, "InvalidRequestError"),
    "token beyond the vocabulary": (
        ids(5, VOCAB_SIZE),
        Code.INVALID_ARGUMENT,
        "InvalidTokenError",
    ),
    "largest token": (ids(2**32 - 1), Code.INVALID_ARGUMENT, "InvalidTokenError"),
    "prompt of the whole context": (
        ids(*prompt_of(MAX_POSITIONS)),
        Code.OUT_OF_RANGE,
        "PromptTooLongError",
    ),
    "prompt far beyond the context": (
        GenerateRequest(text="a" * 100_000),
        Code.OUT_OF_RANGE,
        "PromptTooLongError",
    ),
    "unknown preset": (text(preset="best"), Code.NOT_FOUND, "UnknownPresetError"),
    "unknown codec": (method(codec="zip"), Code.NOT_FOUND, "UnknownPresetError"),
    "no codec": (method(sink_tokens=4), Code.NOT_FOUND, "UnknownPresetError"),
    "too many sinks": (
        method(codec="fallback", sink_tokens=65),
        Code.INVALID_ARGUMENT,
        "LimitError",
    ),
    "layer beyond the model": (
        method(codec="fallback", representatives="3"),
        Code.INVALID_ARGUMENT,
        "LimitError",
    ),
    "sinks of exact": (method(codec="exact", sink_tokens=0), Code.INVALID_ARGUMENT, "LimitError"),
    "stratum of another codec": (
        method(codec="fallback", read_stratum=Stratum.STRATUM_EXACT),
        Code.INVALID_ARGUMENT,
        "LimitError",
    ),
    "stratum of no codec": (
        method(codec="exact", read_stratum=99),
        Code.INVALID_ARGUMENT,
        "LimitError",
    ),
    "coarsest stratum of another codec": (
        text(preset="exact", coarsest_stratum=Stratum.STRATUM_BASE),
        Code.INVALID_ARGUMENT,
        "LimitError",
    ),
    "more layers than the model has": (
        method(skipdecode=SkipDecodeSettings(max_layers=9, min_layers=2)),
        Code.INVALID_ARGUMENT,
        "InvalidRequestError",
    ),
    "one number of layers": (
        method(skipdecode=SkipDecodeSettings(max_layers=3)),
        Code.INVALID_ARGUMENT,
        "LimitError",
    ),
    "a speed-up that leaves no layer": (
        method(skipdecode=SkipDecodeSettings(speedup=50)),
        Code.INVALID_ARGUMENT,
        "InvalidRequestError",
    ),
    "skipdecode and a stage": (
        method(skipdecode=SkipDecodeSettings(max_layers=3, min_layers=2), h2o=H2OSettings()),
        Code.INVALID_ARGUMENT,
        "MethodConflictError",
    ),
    "hot": (sampled(temperature=99), Code.INVALID_ARGUMENT, "LimitError"),
    "cold": (sampled(temperature=-0.1), Code.INVALID_ARGUMENT, "LimitError"),
    "temperature no number": (
        sampled(temperature=math.nan),
        Code.INVALID_ARGUMENT,
        "LimitError",
    ),
    "top_p 0": (sampled(top_p=0), Code.INVALID_ARGUMENT, "LimitError"),
    "top_p above 1": (sampled(top_p=1.5), Code.INVALID_ARGUMENT, "LimitError"),
    "top_p infinite": (sampled(top_p=math.inf), Code.INVALID_ARGUMENT, "LimitError"),
    "top_k": (sampled(top_k=2_000_000), Code.INVALID_ARGUMENT, "LimitError"),
    "no tokens": (sampled(max_tokens=0), Code.INVALID_ARGUMENT, "LimitError"),
    "too many tokens": (sampled(max_tokens=4_000_000_000), Code.INVALID_ARGUMENT, "LimitError"),
    "17 stop strings": (sampled(stop=map(str, range(17))), Code.INVALID_ARGUMENT, "LimitError"),
    "empty stop string": (sampled(stop=[""]), Code.INVALID_ARGUMENT, "LimitError"),
    "long stop string": (sampled(stop=["a" * 1025]), Code.INVALID_ARGUMENT, "LimitError"),
    "another model": (text(model="gpt"), Code.NOT_FOUND, "UnknownModelError"),
}


async def refused(cluster: Cluster, call: Any, code: Code, reason: str) -> grpc.aio.AioRpcError:
    """Check that the call is refused as told before any work, and that the next one is served."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [reply async for reply in call]
    error = error_of(caught.value)
    assert (caught.value.code(), type(error).__name__) == (code, reason)
    assert error.message
    assert error.remedy
    assert cluster.workers.prefills == cluster.workers.decodes == []
    assert len((await cluster.generate(request_of((5, 6), max_tokens=1))).tokens) == 1
    return caught.value


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_request_is_refused_with_reason_and_remedy(cluster: Cluster, name: str) -> None:
    request, code, reason = BAD[name]
    error = await refused(cluster, cluster.inference.Generate(request), code, reason)
    assert has_details(error)
    counters = await cluster.counters()
    assert counters["requests_total", reason] == counters["requests_total", "ok"] == 1


@pytest.mark.parametrize(
    "message",
    [b"\x0a\x02\xff\xfe", b"\x0a\x7fshort", b"\xff\xff\xff", b"\x32\x04\x32\x02\xc3\x28"],
    ids=["text", "cut", "garbage", "stop string"],
)
async def test_bytes_that_are_no_message_are_refused(cluster: Cluster, message: bytes) -> None:
    method: Any = cluster.channel.unary_stream(GENERATE)
    call = method(message)
    error = await refused(cluster, call, Code.INVALID_ARGUMENT, "MalformedMessageError")
    assert has_details(error)


async def test_a_message_beyond_the_limit_is_refused(cluster: Cluster) -> None:
    request = GenerateRequest(text="a" * (5 << 20))
    call = cluster.inference.Generate(request)
    await refused(cluster, call, Code.RESOURCE_EXHAUSTED, "MessageTooLargeError")


async def test_another_version_of_the_protocol_is_refused(cluster: Cluster) -> None:
    call = cluster.inference.Generate(ids(5), metadata=(("kvstrata-protocol", "2"),))
    error = await refused(cluster, call, Code.FAILED_PRECONDITION, "ProtocolVersionError")
    assert has_details(error)


@pytest.fixture
async def checks(config: WorkerConfig, model: Model, store: LocalStore) -> Admission:
    return Admission(await PrefillNode(config).info(), model.tokenizer, b"tenant")


async def test_gates_that_only_the_workers_have_trouble_nobody_else(checks: Admission) -> None:
    elsewhere = replace(checks, info=replace(checks.info, gates_id="ab" * 16))
    assert elsewhere.preset("exact").codec.name == "exact"
    assert elsewhere.preset("") == checks.preset("")
    with pytest.raises(UnknownPresetError, match="gates"):
        elsewhere.preset("attention-gate")


async def test_a_task_has_all_that_a_node_needs(checks: Admission, model: Model) -> None:
    request = GenerateRequest(
        token_ids=TokenIds(ids=[5, 6]),
        settings=MethodSettings(
            codec="fallback", read_stratum=Stratum.STRATUM_BASE, representatives="1"
        ),
        sampling=Sampling(temperature=0.5, stop=["\n"]),
        model=model.name,
    )
    task = checks.admit(request, None)
    assert task.prompt_ids == (5, 6)
    assert task.method.represented == "1"
    assert task.salt == b"tenant"
    assert task.method.wanted == (Stratum.STRATUM_BASE,)
    assert (task.sampling.temperature, task.sampling.max_tokens) == (0.5, 256)
    assert task.sampling.stop == ("\n",)
    assert task.request_id != checks.admit(request, None).request_id


@pytest.mark.parametrize(
    ("remaining_s", "granted_s"), [(None, 3600), (5.0, 5), (1e6, 3600), (0.0, 0)]
)
async def test_the_deadline_is_the_callers_up_to_an_hour(
    checks: Admission, remaining_s: float | None, granted_s: float
) -> None:
    task = checks.admit(ids(5), remaining_s)
    assert task.deadline_unix_s - time.time() == pytest.approx(granted_s, abs=1.0)
    assert admission.MAX_DEADLINE_S == 3600


def test_sampling_defaults_are_those_of_the_contract() -> None:
    params = sampling_params(Sampling())
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (256, 0, 1, 0)
    assert params.seed is not None
    assert params.seed != sampling_params(Sampling()).seed


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_a_given_seed_is_kept(seed: int) -> None:
    assert sampling_params(Sampling(seed=seed)).seed == seed


async def test_a_tokenizer_beyond_the_models_vocabulary_is_refused_too(
    checks: Admission,
) -> None:
    assert len(checks.admit(GenerateRequest(text="\x7f\xff~"), None).prompt_ids) == 4
