"""The asyncio client: the same calls as the blocking one, awaited. Belongs to one event loop."""

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from kvstrata.client.chat import Conversation
from kvstrata.client.connection import CONNECT_TIMEOUT_S, TIMEOUT_S, Endpoint
from kvstrata.client.request import GenerateOptions, Prompt, build_request, release_request
from kvstrata.client.results import Chunk, Completion, ModelInfo
from kvstrata.client.transcript import Transcript
from kvstrata.protos import inference_pb2, inference_pb2_grpc, tracing
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials
from kvstrata.protos.errors import InvalidRequestError, KVStrataError


class AsyncStream(AsyncIterator[Chunk]):
    """The running continuation of one prompt; made by ``AsyncClient.stream``.

    Ending it early, by ``aclose``, by leaving its ``async with`` block, by cancelling the task that
    reads it or by dropping it, cancels the call, and the server frees everything the call held.
    """

    def __init__(
        self,
        call: Any,
        endpoint: Endpoint,
        owner: object = None,
        on_completion: Callable[[Completion], None] | None = None,
        span: tracing.Span = tracing.NOTHING,
    ) -> None:
        self._call = call
        self._span = span
        self._endpoint = endpoint
        self._owner = owner  # keeps the client's channel open while this stream lives
        self._on_completion = on_completion
        self._transcript = Transcript()
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether the stream has ended, for whatever reason."""
        return self._ended

    @property
    def completion(self) -> Completion:
        """The whole continuation, once the stream has been read to its end.

        Raises:
            InvalidRequestError: The stream was not read to its end.
        """
        return self._transcript.completion

    async def __anext__(self) -> Chunk:
        while not self._ended:
            try:
                reply = await self._call.read()
            except grpc.RpcError as error:
                failure = self._endpoint.error(error)
                self._span.end(failure)
                self._cancel()
                raise failure from None
            except asyncio.CancelledError:
                if self._ended and not _task_is_cancelled():
                    break  # closed by another task
                self._cancel()
                if _task_is_cancelled():
                    raise
                raise self._endpoint.gone("by the server or by closing the client") from None
            if reply is grpc.aio.EOF:
                self._finish()
                break
            chunk = self._transcript.read(reply)
            if chunk is not None:
                return chunk
        raise StopAsyncIteration

    async def read(self) -> Completion:
        """Return the completion, reading whatever is left of the stream."""
        async with self:
            async for _ in self:
                pass
            return self.completion

    async def aclose(self) -> None:
        """Cancel the call unless it has ended; may be repeated."""
        self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cancel()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            with contextlib.suppress(RuntimeError):  # the event loop may be closed already
                self._cancel()

    def _cancel(self) -> None:
        self._ended = True
        self._call.cancel()
        self._span.end()

    def _finish(self) -> None:
        self._ended = True
        completion = self._transcript.end()
        self._span.set(cached_tokens=completion.cache.cached_tokens)
        self._span.end()
        if self._on_completion is not None:
            self._on_completion(completion)


def _task_is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class AsyncChatSession(Conversation[AsyncStream]):
    """A conversation over an ``AsyncClient``; made by ``AsyncClient.chat``.

    At the end of its ``async with`` block it is over: see ``aclose``.
    """

    def __init__(
        self, client: "AsyncClient", *, system: str | None, defaults: GenerateOptions
    ) -> None:
        super().__init__(client._open, system=system, defaults=defaults)
        self._client = client

    async def aclose(self) -> None:
        """Tell the store that it may forget first what this conversation alone used.

        It may go on all the same. May be repeated.
        """
        await self._client.release(self.session_id)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(KVStrataError):  # a hint that is lost costs room for a while
            await self.aclose()

    async def send(self, text: str, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole answer to ``text``, which with it joins the history."""
        return await self.stream(text, **options).read()


class AsyncClient:
    """A connection to a KVStrata gateway, for asyncio. Nothing connects before the first call.

    Takes the same arguments and raises the same errors as ``Client``.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        credentials: ClientCredentials = ANONYMOUS,
    ) -> None:
        self._closed = False
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._endpoint = Endpoint(address, timeout_s, connect_timeout_s, credentials)

    async def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole continuation of text, token ids or messages; see ``GenerateOptions``."""
        return await self._open(prompt, options).read()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> AsyncStream:
        """Return the continuation as it comes; the request is checked and sent at once."""
        return self._open(prompt, options)

    def chat(
        self, *, system: str | None = None, **defaults: Unpack[GenerateOptions]
    ) -> AsyncChatSession:
        """Return a conversation; ``defaults`` hold for its turns unless a turn says otherwise."""
        return AsyncChatSession(self, system=system, defaults=defaults)

    async def model(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Return what is served and within which limits."""
        request = inference_pb2.GetModelRequest()
        return ModelInfo.from_proto(await self._call("GetModel", request, timeout_s))

    async def release(self, session_id: str, *, timeout_s: float | None = None) -> int:
        """Let the store forget first what a session alone used; return how many blocks it has.

        0 for a session that gave no ``priority`` or ``keep_s``, or whose time is over. Idempotent.
        """
        return int((await self._call("Release", release_request(session_id), timeout_s)).blocks)

    async def _call(self, name: str, request: Any, timeout_s: float | None) -> Any:
        try:
            return await getattr(self._connect(), name)(
                request,
                timeout=self._endpoint.time_limit(timeout_s),
                metadata=self._endpoint.metadata,
            )
        except grpc.RpcError as error:
            raise self._endpoint.error(error) from None

    async def aclose(self) -> None:
        """Cancel what runs and close the connection; may be repeated."""
        self._closed = True
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    def _open(
        self,
        prompt: Prompt,
        options: GenerateOptions,
        on_completion: Callable[[Completion], None] | None = None,
    ) -> AsyncStream:
        request = build_request(prompt, options)
        stub, timeout_s = self._connect(), self._endpoint.time_limit(options.get("timeout_s"))
        span = tracing.start("client.generate", "client")
        call = stub.Generate(
            request, timeout=timeout_s, metadata=(*self._endpoint.metadata, *span.headers)
        )
        return AsyncStream(call, self._endpoint, self, on_completion, span)

    def _connect(self) -> Any:
        """Return the stub. The channel is made here because it binds to the running event loop."""
        if self._closed:
            raise InvalidRequestError("the client is closed", "make a new AsyncClient")
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._loop = loop
            self._channel = self._endpoint.open_async()
            self._stub = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        if self._loop is not loop:
            raise InvalidRequestError(
                "the client belongs to another event loop", "make one AsyncClient per event loop"
            )
        return self._stub

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<AsyncClient {self._endpoint.address}{' closed' if self._closed else ''}>"

    def __del__(self) -> None:
        if getattr(self, "_channel", None) is not None:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
