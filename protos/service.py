"""The contract that every gRPC server of ours keeps, in one interceptor, and the channel to one.

The interceptor answers bytes that are no valid message, an unknown protocol version and every error
of our tree with the right status and details; the handlers themselves just raise.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_status import rpc_status

from kvstrata.protos.errors import (
    ConfigurationError,
    InternalError,
    KVStrataError,
    MalformedMessageError,
    ProtocolVersionError,
    to_status,
)

PROTOCOL_VERSION = "1"
VERSION_KEY = "kvstrata-protocol"
MAX_MESSAGE_BYTES = 4 << 20
CHUNK_BYTES = 1 << 20  # the size at which gRPC streams are fastest

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
]
SERVER_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
CALL_METADATA: tuple[tuple[str, str], ...] = ((VERSION_KEY, PROTOCOL_VERSION),)

logger = logging.getLogger(__name__)


class ContractInterceptor(grpc.aio.ServerInterceptor):
    """Parses requests, checks the protocol version, and turns raised errors into gRPC statuses."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the handler with the contract wrapped around it; foreign services pass through."""
        handler = await continuation(handler_call_details)
        if handler is None or not str(handler_call_details.method).startswith("/kvstrata."):
            return handler
        return _guard(handler)


def _guard(handler: Any) -> Any:
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
            yield read(message)

    inner = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    streams_in = bool(handler.request_streaming)

    async def unary(request: Any, context: Any) -> Any:
        try:
            check_version(context)
            return await inner(read_all(request) if streams_in else read(request), context)
        except KVStrataError as error:
            await abort(context, error)
        except Exception:
            await _abort_defect(context)

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            check_version(context)
            replies = inner(read_all(request) if streams_in else read(request), context)
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


def check_version(context: Any) -> None:
    """Raise ``ProtocolVersionError`` if the caller names another protocol version than ours."""
    for key, value in context.invocation_metadata() or ():
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


def bind(server: grpc.aio.Server, listen: str) -> int:
    """Have ``server`` listen at ``host:port`` and return the port, which is another one for port 0.

    Raises:
        ConfigurationError: The port is taken or the address is not local.
    """
    port = 0
    with contextlib.suppress(RuntimeError):
        port = server.add_insecure_port(listen)
    if not port:
        raise ConfigurationError(
            f"cannot listen at {listen}", "choose a free port (0 takes any) and a local address"
        )
    return port


def open_channel(address: str) -> grpc.aio.Channel:
    """Return an asynchronous channel with our limits; nothing connects before the first call."""
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
