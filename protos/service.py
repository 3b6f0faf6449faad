"""The contract that every gRPC server of ours keeps, in one interceptor, and the channel to one.

The interceptor answers bytes that are no valid message, an unknown protocol version and every error
of our tree with the right status and details; the handlers themselves just raise.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from kvstrata.protos import call_context, tracing
from kvstrata.protos.call_context import DEFAULT_TENANT
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials, ServerTls
from kvstrata.protos.errors import (
    ConfigurationError,
    InternalError,
    KVStrataError,
    LimitError,
    MalformedMessageError,
    ProtocolVersionError,
    to_status,
)

PROTOCOL_VERSION = "1"
VERSION_KEY = "kvstrata-protocol"
MAX_MESSAGE_BYTES = 4 << 20
MAX_METADATA_BYTES = 16 << 10
MAX_HEADERS = 64
CHUNK_BYTES = 1 << 20  # the size at which gRPC streams are fastest
MAX_DISCARDED_BYTES = 64 << 20
MAX_DISCARD_S = 60.0
DISCARD_S = 1.0  # silence after which a refused client is taken to have stopped writing
MAX_WHOLE_BYTES = 2 << 20  # up to here one message is still better than two and a join

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # gRPC's own would let a server that was away for minutes wait two more for its clients.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_concurrent_streams", 1024),  # of one connection
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
]
CALL_METADATA: tuple[tuple[str, str], ...] = ((VERSION_KEY, PROTOCOL_VERSION),)

logger = logging.getLogger(__name__)


Metadata = tuple[tuple[str, str | bytes], ...]
Authorize = Callable[[str, Metadata], str]
"""Returns the name of the caller's tenant; raises unless it may call this method."""
Observe = Callable[[str, str, float], None]
"""Told of every call that has ended: "KVStore/Get", its status's name, and its seconds."""


class ContractInterceptor(grpc.aio.ServerInterceptor):
    """Parses requests, checks the protocol version, and turns raised errors into gRPC statuses.

    Args:
        authorize: Asked before every call of our services, before its request is read.
        observe: Told of every call of our services.
    """

    def __init__(self, authorize: Authorize | None = None, observe: Observe | None = None) -> None:
        self._authorize = authorize
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler with the contract wrapped around it; foreign services pass through."""
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or not method.startswith("/kvstrata."):
            return handler

        def check(metadata: Metadata) -> str:
            check_version(metadata)
            return self._authorize(method, metadata) if self._authorize else DEFAULT_TENANT

        return _guard(handler, check, lambda: _Call(method, self._observe))


class _Call:
    """One call, from its arrival to its end: what counters, logs and spans say of it."""

    __slots__ = ("_begin_s", "_method", "_observe", "_span")

    def __init__(self, method: str, observe: Observe | None) -> None:
        self._method = method.removeprefix("/kvstrata.v1.")
        self._observe = observe
        self._span = tracing.NOTHING
        self._begin_s = time.perf_counter()

    def enter(self, metadata: Metadata) -> None:
        """Note what the caller sent of its request and trace."""
        self._span = tracing.enter_call(self._method, metadata)

    def admitted(self, tenant: str) -> None:
        """Note whose call it is."""
        call_context.tenant.set(tenant)
        self._span.set(tenant=tenant)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        code = grpc.StatusCode.OK
        if isinstance(error, KVStrataError):
            code = error.code
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            code = grpc.StatusCode.CANCELLED
        elif error is not None:
            code = grpc.StatusCode.INTERNAL
        self._span.end(error)
        if self._observe is not None:
            self._observe(self._method, code.name, time.perf_counter() - self._begin_s)


def metadata_of(context: Any) -> Metadata:
    """Return the caller's headers; ``LimitError`` if there are more than ``MAX_HEADERS``."""
    metadata: Metadata = tuple(context.invocation_metadata() or ())
    if len(metadata) > MAX_HEADERS:
        raise LimitError(
            f"{len(metadata)} headers exceed the limit of {MAX_HEADERS}", "send fewer headers"
        )
    return metadata


def _guard(handler: Any, check: Callable[[Metadata], str], make_call: Callable[[], _Call]) -> Any:
    parse = handler.request_deserializer

    def read(message: bytes) -> Any:
        try:
            return parse(message)
        except DecodeError as error:
            raise MalformedMessageError(
                f"unreadable message: {error}", "send valid UTF-8 and messages of this contract"
            ) from error

    async def read_all(requests: AsyncIterator[bytes]) -> AsyncIterator[Any]:
        async for message in requests:
            try:
                request = read(message)
            except MalformedMessageError:
                await discard(requests)
                raise
            yield request

    inner = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    streams_in = bool(handler.request_streaming)

    async def admit(call: _Call, request: Any, context: Any) -> Any:
        """Return what the handler reads, if the caller may call it."""
        try:
            metadata = metadata_of(context)
            call.enter(metadata)
            call.admitted(check(metadata))
        except KVStrataError:
            if streams_in:
                await discard(request)
            raise
        return read_all(request) if streams_in else read(request)

    async def unary(request: Any, context: Any) -> Any:
        try:
            with make_call() as call:
                return await inner(await admit(call, request, context), context)
        except KVStrataError as error:
            await abort(context, error)
        except Exception:
            await _abort_defect(context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            with make_call() as call:
                replies = inner(await admit(call, request, context), context)
                async with contextlib.aclosing(replies):
                    async for reply in replies:
                        yield reply
        except KVStrataError as error:
            await abort(context, error)
        except Exception:
            await _abort_defect(context)

    make: Any = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[streams_in, bool(handler.response_streaming)]
    return make(
        stream if handler.response_streaming else unary,
        request_deserializer=None,
        response_serializer=handler.response_serializer,
    )


async def discard(
    requests: AsyncIterator[Any], idle_s: float = DISCARD_S, size: Callable[[Any], int] = len
) -> None:
    """Read what is on its way to a call that ends now: a client that still writes sees no status.

    Ends with the stream, after ``idle_s`` of silence, after ``MAX_DISCARDED_BYTES`` or
    ``MAX_DISCARD_S``.
    """
    left = MAX_DISCARDED_BYTES
    with contextlib.suppress(StopAsyncIteration, TimeoutError):
        async with asyncio.timeout(MAX_DISCARD_S):
            while left > 0:
                async with asyncio.timeout(idle_s):
                    left -= 1024 + size(await anext(requests))


def check_version(metadata: Metadata) -> None:
    """Raise ``ProtocolVersionError`` if the caller names another protocol version than ours."""
    for key, value in metadata:
        if key == VERSION_KEY and value != PROTOCOL_VERSION:
            raise ProtocolVersionError(
                f"the client speaks protocol version {str(value)[:32]!r}, "
                f"this server {PROTOCOL_VERSION!r}",
                "use a client and a server of the same release",
            )


async def abort(context: Any, error: KVStrataError) -> NoReturn:
    """End the call with the status and details of ``error``."""
    status = rpc_status.to_status(to_status(error))
    context.set_trailing_metadata(status.trailing_metadata)
    await context.abort(status.code, status.details)
    raise AssertionError("abort returns never")


async def _abort_defect(context: Any) -> None:
    if context.done():  # the handler ended the call itself
        return
    logger.exception("unhandled error in a handler")
    await abort(context, InternalError("internal error", "see the server's log"))


def bind(server: grpc.aio.Server, listen: str, tls: ServerTls | None = None) -> int:
    """Have ``server`` listen at ``host:port`` and return the port, which is another one for port 0.

    Raises:
        ConfigurationError: The port is taken, the address is not local, or a file of ``tls`` is
            bad; nothing was opened.
    """
    credentials = tls.credentials() if tls else None
    port = 0
    with contextlib.suppress(RuntimeError):
        if credentials is None:
            port = server.add_insecure_port(listen)
        else:
            port = server.add_secure_port(listen, credentials)
    if not port:
        raise ConfigurationError(
            f"cannot listen at {listen}", "choose a free port (0 takes any) and a local address"
        )
    return port


def open_channel(
    address: str,
    credentials: ClientCredentials = ANONYMOUS,
    options: Sequence[tuple[str, int]] = CHANNEL_OPTIONS,
) -> grpc.aio.Channel:
    """Return an asynchronous channel with our limits; nothing connects before the first call.

    The token of ``credentials`` goes with each call, as ``call_metadata``.

    Raises:
        ConfigurationError: A file of ``credentials`` is bad.
    """
    tls = credentials.channel()
    if tls is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, tls, options=options)


def call_metadata(credentials: ClientCredentials) -> tuple[tuple[str, str], ...]:
    """Return the headers of a call: protocol version, and the token if there is one."""
    return (*CALL_METADATA, *credentials.metadata)
