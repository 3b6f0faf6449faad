"""The contract of every server, over real connections and all four kinds of calls."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest

from kvstrata.protos import errors
from kvstrata.protos.admin_pb2 import ListBlocksReply, ListBlocksRequest
from kvstrata.protos.errors import KVStrataError, from_rpc_error
from kvstrata.protos.service import (
    CALL_METADATA,
    MAX_MESSAGE_BYTES,
    SERVER_OPTIONS,
    VERSION_KEY,
    ContractInterceptor,
    open_channel,
)

SECRET = "the secret of a stack trace"
ARITIES = ["unary_unary", "unary_stream", "stream_unary", "stream_stream"]
BAD_UTF8 = b"\x12\x02\xff\xfe"  # page_token: no text
CUT_SHORT = b"\x12\x7fabc"  # page_token: longer than the message
NO_MESSAGE = b"\xff" * 20

each_arity = pytest.mark.parametrize("arity", ARITIES)


class Echo:
    """Answers page tokens; some of them are orders.

    Attributes:
        closed: Set when a streaming answer has run its ``finally``.
        blocked: Set when a streaming answer waits for ever, or for its reader.
    """

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.blocked = asyncio.Event()

    async def answer(self, request: ListBlocksRequest, context: Any) -> ListBlocksReply:
        match request.page_token:
            case "defect":
                raise RuntimeError(SECRET)
            case "error":
                raise errors.LimitError("too large", "use less", limit="3")
            case "abort":
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, "by itself")
        return ListBlocksReply(next_page_token=request.page_token)

    async def unary_unary(self, request: ListBlocksRequest, context: Any) -> ListBlocksReply:
        return await self.answer(request, context)

    async def unary_stream(
        self, request: ListBlocksRequest, context: Any
    ) -> AsyncIterator[ListBlocksReply]:
        try:
            yield ListBlocksReply(next_page_token="first")
            if request.page_token == "wait":
                self.blocked.set()
                await asyncio.Event().wait()
            while request.page_token == "flood":
                self.blocked.set()
                yield ListBlocksReply(next_page_token="x" * (1 << 20))
            yield await self.answer(request, context)
        finally:
            self.closed.set()

    async def stream_unary(
        self, requests: AsyncIterator[ListBlocksRequest], context: Any
    ) -> ListBlocksReply:
        replies = [await self.answer(request, context) async for request in requests]
        return ListBlocksReply(next_page_token="".join(r.next_page_token for r in replies))

    async def stream_stream(
        self, requests: AsyncIterator[ListBlocksRequest], context: Any
    ) -> AsyncIterator[ListBlocksReply]:
        try:
            async for request in requests:
                if request.page_token == "wait":
                    self.blocked.set()
                    await asyncio.Event().wait()
                yield await self.answer(request, context)
        finally:
            self.closed.set()


Call = Callable[..., Awaitable[list[str]]]


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
async def channel(echo: Echo) -> AsyncIterator[grpc.aio.Channel]:
    handlers = {
        arity: getattr(grpc, f"{arity}_rpc_method_handler")(
            getattr(echo, arity),
            request_deserializer=ListBlocksRequest.FromString,
            response_serializer=ListBlocksReply.SerializeToString,
        )
        for arity in ARITIES
    }
    server = grpc.aio.server(interceptors=[ContractInterceptor()], options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("kvstrata.v1.Echo", handlers),
            grpc.method_handlers_generic_handler("foreign.Echo", handlers),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with open_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(None)


@pytest.fixture
def call(channel: grpc.aio.Channel) -> Call:
    """Return a function that sends raw messages in a call and returns all page tokens."""

    async def send(
        arity: str,
        *messages: bytes,
        service: str = "kvstrata.v1.Echo",
        metadata: tuple[tuple[str, str], ...] = CALL_METADATA,
    ) -> list[str]:
        method: Any = getattr(channel, arity)(
            f"/{service}/{arity}", response_deserializer=ListBlocksReply.FromString
        )
        argument: Any = iter(messages) if arity.startswith("stream") else messages[0]
        running = method(argument, metadata=metadata, timeout=20)
        if arity.endswith("unary"):
            return [(await running).next_page_token]
        return [reply.next_page_token async for reply in running]

    return send


def _message(page_token: str) -> bytes:
    return ListBlocksRequest(page_token=page_token).SerializeToString()


async def _error(replies: Awaitable[list[str]]) -> tuple[KVStrataError, grpc.StatusCode]:
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await replies
    assert SECRET not in repr(failure.value)
    return from_rpc_error(failure.value), failure.value.code()


@each_arity
async def test_good_calls_are_answered(arity: str, call: Call) -> None:
    replies = await call(arity, _message("a"))
    assert replies == (["first", "a"] if arity == "unary_stream" else ["a"])
    assert await call(arity, b"") == (["first", ""] if arity == "unary_stream" else [""])


@each_arity
@pytest.mark.parametrize("message", [BAD_UTF8, CUT_SHORT, NO_MESSAGE], ids=["utf8", "cut", "noise"])
async def test_a_malformed_message_is_told_and_the_server_goes_on(
    arity: str, message: bytes, call: Call
) -> None:
    error, code = await _error(call(arity, message))
    assert type(error) is errors.MalformedMessageError
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "valid UTF-8" in error.remedy
    assert "a" in await call(arity, _message("a"))


@pytest.mark.parametrize("arity", ["stream_unary", "stream_stream"])
async def test_a_malformed_message_in_the_middle_of_a_stream_ends_it(
    arity: str, call: Call, echo: Echo
) -> None:
    error, _ = await _error(call(arity, _message("a"), BAD_UTF8, _message("b")))
    assert type(error) is errors.MalformedMessageError
    assert echo.closed.is_set() == (arity == "stream_stream")


@each_arity
@pytest.mark.parametrize("version", ["0", "2", "", "1.0", "x" * 500])
async def test_another_protocol_version_is_refused(arity: str, version: str, call: Call) -> None:
    metadata = (("other", "9"), (VERSION_KEY, version))
    error, code = await _error(call(arity, _message("a"), metadata=metadata))
    assert type(error) is errors.ProtocolVersionError
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "same release" in error.remedy
    assert len(error.message) < 200


@each_arity
async def test_a_caller_that_names_no_version_is_served(arity: str, call: Call) -> None:
    assert "a" in await call(arity, _message("a"), metadata=())


@each_arity
async def test_an_unexpected_error_keeps_its_text_in_the_servers_log(
    arity: str, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        error, code = await _error(call(arity, _message("defect")))
    assert type(error) is errors.InternalError
    assert code is grpc.StatusCode.INTERNAL
    assert (error.message, error.remedy) == ("internal error", "see the server's log")
    assert SECRET in caplog.text
    assert "Traceback" in caplog.text
    assert "a" in await call(arity, _message("a"))


@each_arity
async def test_an_error_of_our_tree_arrives_with_all_it_says(
    arity: str, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        error, _ = await _error(call(arity, _message("error")))
    assert type(error) is errors.LimitError
    assert (error.message, error.remedy, error.metadata) == (
        "too large",
        "use less",
        {"limit": "3"},
    )
    assert not [r for r in caplog.records if r.name.startswith("kvstrata")]


@each_arity
async def test_a_handler_that_ends_the_call_itself_is_no_defect(
    arity: str, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        _, code = await _error(call(arity, _message("abort")))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert not [r for r in caplog.records if r.name.startswith("kvstrata")]


@each_arity
async def test_services_of_others_are_left_alone(arity: str, call: Call) -> None:
    version = ((VERSION_KEY, "99"),)
    assert "a" in await call(arity, _message("a"), service="foreign.Echo", metadata=version)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await call(arity, _message("error"), service="foreign.Echo")
    assert failure.value.code() is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    ("arity", "order"),
    [("unary_stream", "wait"), ("unary_stream", "flood"), ("stream_stream", "wait")],
)
async def test_a_cancelled_call_closes_the_answering_generator_at_once(
    arity: str, order: str, channel: grpc.aio.Channel, echo: Echo
) -> None:
    method: Any = getattr(channel, arity)(f"/kvstrata.v1.Echo/{arity}")
    message = _message(order)
    running = method(iter([message]) if arity == "stream_stream" else message, timeout=20)
    await asyncio.wait_for(echo.blocked.wait(), 5)
    if order == "flood":
        await asyncio.sleep(0.2)  # until nothing more fits into the connection's window
    assert not echo.closed.is_set()
    running.cancel()
    await asyncio.wait_for(echo.closed.wait(), 2)


async def test_a_reader_that_goes_away_closes_the_answering_generator(
    echo: Echo, call: Call, channel: grpc.aio.Channel
) -> None:
    method: Any = channel.unary_stream("/kvstrata.v1.Echo/unary_stream")
    running = method(_message("wait"))
    assert ListBlocksReply.FromString(await running.read()).next_page_token == "first"
    await asyncio.wait_for(echo.blocked.wait(), 5)
    await channel.close()
    await asyncio.wait_for(echo.closed.wait(), 2)


async def test_a_message_beyond_the_limit_is_refused(call: Call) -> None:
    error, code = await _error(call("unary_unary", _message("x" * (MAX_MESSAGE_BYTES + 1))))
    assert type(error) is errors.MessageTooLargeError
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await call("unary_unary", _message("a")) == ["a"]
