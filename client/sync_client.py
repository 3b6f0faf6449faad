"""The blocking client. Threads may share a client; one thread reads a stream, any may close it."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
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


class Stream(Iterator[Chunk]):
    """The running continuation of one prompt; made by ``Client.stream``.

    Ending it early, by ``close``, by leaving its ``with`` block or by dropping it, cancels the
    call, and the server frees everything the call held. After an error it is ended.
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

    def __next__(self) -> Chunk:
        while not self._ended:
            try:
                chunk = self._transcript.read(next(self._call))
            except StopIteration:
                self._finish()
                break
            except grpc.RpcError as error:
                if self._ended:
                    break  # closed by another thread
                failure = self._endpoint.error(error)
                self._span.end(failure)
                self.close()
                raise failure from None
            except BaseException:  # KeyboardInterrupt above all: the server must not go on
                self.close()
                raise
            if chunk is not None:
                return chunk
        raise StopIteration

    def read(self) -> Completion:
        """Return the completion, reading whatever is left of the stream."""
        with self:
            for _ in self:
                pass
            return self.completion

    def close(self) -> None:
        """Cancel the call unless it has ended; may be repeated."""
        self._ended = True
        self._call.cancel()
        self._span.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_ended", True):
            self.close()

    def _finish(self) -> None:
        self._ended = True
        completion = self._transcript.end()
        self._span.set(cached_tokens=completion.cache.cached_tokens)
        self._span.end()
        if self._on_completion is not None:
            self._on_completion(completion)


class ChatSession(Conversation[Stream]):
    """A conversation over a ``Client``; made by ``Client.chat``. Belongs to one thread.

    At the end of its ``with`` block it is over: see ``close``.
    """

    def __init__(self, client: "Client", *, system: str | None, defaults: GenerateOptions) -> None:
        super().__init__(client._open, system=system, defaults=defaults)
        self._client = client

    def close(self) -> None:
        """Tell the store that it may forget first what this conversation alone used.

        It may go on all the same. May be repeated.
        """
        self._client.release(self.session_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(KVStrataError):  # a hint that is lost costs room for a while
            self.close()

    def send(self, text: str, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole answer to ``text``, which with it joins the history."""
        return self.stream(text, **options).read()


class Client:
    """A connection to a KVStrata gateway. Nothing connects before the first call.

    Every call has a time limit, and every error is a ``KVStrataError`` that names the address.

    Args:
        address: The gateway's gRPC address, "host:port".
        timeout_s: Time limit of a whole call, the streaming included.
        connect_timeout_s: Time limit of one attempt to connect.
        credentials: The gateway's CA, and this client's certificate and token;
            ``ClientCredentials.from_environment()`` reads them. Plaintext without any.

    Raises:
        ConfigurationError: The address can be no gRPC target, or a file of the credentials is bad.
        LimitError: A time limit is not positive and finite.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_s: float = TIMEOUT_S,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        credentials: ClientCredentials = ANONYMOUS,
    ) -> None:
        self._closed = True
        self._endpoint = Endpoint(address, timeout_s, connect_timeout_s, credentials)
        self._channel = self._endpoint.open()
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)  # type: ignore[no-untyped-call]
        self._closed = False

    def generate(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Completion:
        """Return the whole continuation of text, token ids or messages; see ``GenerateOptions``."""
        return self.stream(prompt, **options).read()

    def stream(self, prompt: Prompt, **options: Unpack[GenerateOptions]) -> Stream:
        """Return the continuation as it comes; the request is checked and sent at once."""
        return self._open(prompt, options)

    def chat(
        self, *, system: str | None = None, **defaults: Unpack[GenerateOptions]
    ) -> ChatSession:
        """Return a conversation; ``defaults`` hold for its turns unless a turn says otherwise."""
        return ChatSession(self, system=system, defaults=defaults)

    def model(self, *, timeout_s: float | None = None) -> ModelInfo:
        """Return what is served and within which limits."""
        request = inference_pb2.GetModelRequest()
        return ModelInfo.from_proto(self._call("GetModel", request, timeout_s))

    def release(self, session_id: str, *, timeout_s: float | None = None) -> int:
        """Let the store forget first what a session alone used; return how many blocks it has.

        0 for a session that gave no ``priority`` or ``keep_s``, or whose time is over. Idempotent.
        """
        return int(self._call("Release", release_request(session_id), timeout_s).blocks)

    def _call(self, name: str, request: Any, timeout_s: float | None) -> Any:
        self._check_open()
        try:
            return getattr(self._stub, name)(
                request,
                timeout=self._endpoint.time_limit(timeout_s),
                metadata=self._endpoint.metadata,
            )
        except grpc.RpcError as error:
            raise self._endpoint.error(error) from None

    def close(self) -> None:
        """Cancel what runs and close the connection; may be repeated."""
        if not self._closed:
            self._closed = True
            self._channel.close()

    def _open(
        self,
        prompt: Prompt,
        options: GenerateOptions,
        on_completion: Callable[[Completion], None] | None = None,
    ) -> Stream:
        self._check_open()
        request = build_request(prompt, options)
        timeout_s = self._endpoint.time_limit(options.get("timeout_s"))
        span = tracing.start("client.generate", "client")
        call = self._stub.Generate(
            request, timeout=timeout_s, metadata=(*self._endpoint.metadata, *span.headers)
        )
        return Stream(call, self._endpoint, self, on_completion, span)

    def _check_open(self) -> None:
        if self._closed:
            raise InvalidRequestError("the client is closed", "make a new Client")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client {self._endpoint.address}{' closed' if self._closed else ''}>"

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=1)
            with contextlib.suppress(Exception):  # the interpreter may be shutting down
                self.close()
