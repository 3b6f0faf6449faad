"""The error tree: one status each, and the same error at the other end of a wire."""

import inspect
import pickle
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import code_pb2, error_details_pb2

from kvstrata.protos import admin_pb2, admin_pb2_grpc, errors
from kvstrata.protos.errors import (
    ERRORS,
    RETRY_AFTER,
    KVStrataError,
    ThrottledError,
    from_rpc_error,
    to_status,
)
from kvstrata.protos.service import CALL_METADATA, ContractInterceptor, open_channel

GRPC: Any = admin_pb2_grpc  # generated without annotations
KINDS = list(ERRORS.values())
MESSAGE = 'the value "größe\u2028" \t is wrong: 100 %\nsecond line'


class _Raiser(admin_pb2_grpc.AdminServicer):
    """Raises what the test put into ``error``."""

    error: Exception

    async def Stats(  # noqa: N802
        self, request: admin_pb2.StatsRequest, context: object
    ) -> admin_pb2.StatsReply:
        raise self.error


class _Bare(admin_pb2_grpc.AdminServicer):
    """Ends the call with the status and the details, in hex, that the page token names."""

    async def ListBlocks(  # noqa: N802
        self, request: admin_pb2.ListBlocksRequest, context: Any
    ) -> admin_pb2.ListBlocksReply:
        status, _, details = request.page_token.partition(":")
        if details:
            context.set_trailing_metadata((("grpc-status-details-bin", bytes.fromhex(details)),))
        await context.abort(grpc.StatusCode[status], "bare")
        raise AssertionError("abort returns never")


@pytest.fixture
def raiser() -> _Raiser:
    return _Raiser()


@pytest.fixture
async def stub(raiser: _Raiser) -> AsyncIterator[admin_pb2_grpc.AdminStub]:
    server = grpc.aio.server(interceptors=[ContractInterceptor()])
    GRPC.add_AdminServicer_to_server(raiser, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield GRPC.AdminStub(channel)
    await server.stop(None)


def test_the_tree_is_the_one_that_the_module_describes() -> None:
    described: dict[str, tuple[str, str]] = {}
    parents: dict[int, str] = {-1: "KVStrataError"}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"( *)[*.-] (\w+Error)(?: +([A-Z_]{4,}))?", line)
        if match is None:
            continue
        depth = len(match[1]) // 2
        parent = parents[depth - 1]
        status = match[3] or described.get(parent, ("", "UNKNOWN"))[1]
        described[match[2]] = (parent, status)
        parents[depth] = match[2]
    described["KVStrataError"] = ("Exception", "UNKNOWN")
    real = {
        kind.__name__: (kind.__mro__[1].__name__, kind.code.name)
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, KVStrataError)
    }
    assert described == real
    assert set(ERRORS) == set(real)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_has_one_status_with_reason_domain_and_remedy(
    kind: type[KVStrataError],
) -> None:
    status = to_status(kind("what", "do this", block="12"))
    assert code_pb2.Code.Name(status.code) == kind.code.name
    assert status.message == "what"
    assert len(status.details) == 1
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (kind.__name__, "kvstrata")
    assert dict(info.metadata) == {"remedy": "do this", "block": "12"}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
async def test_every_error_arrives_as_it_was_raised(
    kind: type[KVStrataError], raiser: _Raiser, stub: admin_pb2_grpc.AdminStub
) -> None:
    for sent in (kind(MESSAGE, "tu dies, bitte: äöü", block="ß 12", tier="ram"), kind("short")):
        raiser.error = sent
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await stub.Stats(admin_pb2.StatsRequest(), metadata=CALL_METADATA)
        assert failure.value.code() is kind.code
        received = from_rpc_error(failure.value, "127.0.0.1:1")
        assert type(received) is kind
        assert received.message == sent.message
        assert received.remedy == sent.remedy
        assert received.metadata == sent.metadata
        assert str(received) == str(sent)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_survives_pickling(kind: type[KVStrataError]) -> None:
    error = kind("what", "do this", block="12")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.message, copy.remedy, copy.metadata) == ("what", "do this", {"block": "12"})
    assert str(copy) == "what (do this)"
    assert copy.args == error.args


def test_an_error_without_a_remedy_is_told_by_its_message_alone() -> None:
    assert str(KVStrataError("what")) == "what"


@pytest.fixture
async def bare() -> AsyncIterator[admin_pb2_grpc.AdminStub]:
    server = grpc.aio.server()
    GRPC.add_AdminServicer_to_server(_Bare(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        yield GRPC.AdminStub(channel)
    await server.stop(None)


@pytest.mark.parametrize(
    ("status", "kind", "remedy"),
    [
        ("UNAVAILABLE", errors.UnavailableError, "check the address"),
        ("DEADLINE_EXCEEDED", errors.DeadlineError, "raise the timeout"),
        ("RESOURCE_EXHAUSTED", errors.MessageTooLargeError, "smaller message"),
        ("INVALID_ARGUMENT", errors.InvalidRequestError, ""),
        ("NOT_FOUND", errors.NotFoundError, ""),
        ("OUT_OF_RANGE", errors.PromptTooLongError, ""),
        ("UNIMPLEMENTED", errors.ProtocolVersionError, "same version"),
        ("INTERNAL", errors.InternalError, ""),
        ("PERMISSION_DENIED", errors.InternalError, ""),
    ],
)
async def test_a_bare_status_becomes_the_nearest_error(
    status: str, kind: type[KVStrataError], remedy: str, bare: admin_pb2_grpc.AdminStub
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await bare.ListBlocks(admin_pb2.ListBlocksRequest(page_token=status))
    error = from_rpc_error(failure.value, "store:1")
    assert type(error) is kind
    assert error.message == f"store:1: {status}: bare"
    assert remedy in error.remedy
    assert from_rpc_error(failure.value).message == f"{status}: bare"


@pytest.mark.parametrize(
    "details",
    [
        "ffff",  # no message
        "080e12056f74686572",  # code 14, message "other"
        "080512046261726500",  # the right status with a tag that does not exist
        "08051204626172651a020a00",  # a detail of no type
        "08051204626172651a2d0a27" + b"type.googleapis.com/google.rpc.ErrorInf".hex() + "1200",
        "08051204626172651a2e0a28" + b"type.googleapis.com/google.rpc.ErrorInfo".hex() + "1202ffff",
    ],
)
async def test_unreadable_details_count_as_a_bare_status(
    details: str, bare: admin_pb2_grpc.AdminStub
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await bare.ListBlocks(admin_pb2.ListBlocksRequest(page_token=f"NOT_FOUND:{details}"))
    error = from_rpc_error(failure.value)
    assert type(error) is errors.NotFoundError
    assert error.message == "NOT_FOUND: bare"


def test_a_stream_that_is_cut_under_a_write_is_unavailable() -> None:
    cut = grpc.aio.AioRpcError(
        grpc.StatusCode.INTERNAL,
        grpc.aio.Metadata(),
        grpc.aio.Metadata(),
        details="Internal error from Core",
    )
    error = from_rpc_error(cut, "store:1")
    assert type(error) is errors.UnavailableError
    assert error.message == "store:1: UNAVAILABLE: Internal error from Core"
    assert "check the address" in error.remedy


async def test_an_address_without_a_server_is_unavailable() -> None:
    async with open_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await GRPC.AdminStub(channel).Stats(admin_pb2.StatsRequest())
    assert type(from_rpc_error(failure.value)) is errors.UnavailableError


async def test_a_server_without_the_method_speaks_another_version() -> None:
    server = grpc.aio.server(interceptors=[ContractInterceptor()])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await GRPC.AdminStub(channel).Stats(admin_pb2.StatsRequest())
    await server.stop(None)
    assert type(from_rpc_error(failure.value)) is errors.ProtocolVersionError


@pytest.mark.parametrize(
    ("reason", "domain"), [("NewerError", "kvstrata"), ("LimitError", "other")]
)
async def test_details_of_others_and_unknown_reasons_count_as_a_bare_status(
    reason: str, domain: str, monkeypatch: pytest.MonkeyPatch, raiser: _Raiser,
    stub: admin_pb2_grpc.AdminStub,
) -> None:  # fmt: skip
    kind = type(reason, (errors.CapacityError,), {})
    monkeypatch.setattr(errors, "DOMAIN", domain)
    raiser.error = kind("from another release", "its remedy")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Stats(admin_pb2.StatsRequest())
    monkeypatch.undo()
    error = from_rpc_error(failure.value)
    assert type(error) is errors.MessageTooLargeError
    assert error.message == "RESOURCE_EXHAUSTED: from another release"


@pytest.mark.parametrize("key", ["message", "self", "kind"])
async def test_metadata_may_have_any_name(
    key: str, raiser: _Raiser, stub: admin_pb2_grpc.AdminStub
) -> None:
    raiser.error = errors.LimitError("what", "do this")
    raiser.error.metadata[key] = "value"
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await stub.Stats(admin_pb2.StatsRequest())
    error = from_rpc_error(failure.value)
    assert (error.message, error.remedy, error.metadata) == ("what", "do this", {key: "value"})
    assert pickle.loads(pickle.dumps(error)).metadata == error.metadata


@pytest.mark.parametrize(
    ("told", "seconds"),
    [("1.5", 1.5), ("", 0), ("soon", 0), ("-1", 0), ("nan", 0), ("1e300", 86_400), ("inf", 86_400)],
)
def test_the_time_to_wait_is_always_one_that_can_be_sent(told: str, seconds: float) -> None:
    error = ThrottledError("rate: too much", "wait")
    error.metadata[RETRY_AFTER] = told
    assert error.retry_after_s == seconds
    assert len(to_status(error).details) == (2 if seconds else 1)
