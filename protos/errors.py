"""The error tree. Every error has one gRPC status, a reason, and a remedy the user can act on.

* KVStrataError
  - InvalidRequestError         INVALID_ARGUMENT
    . EmptyPromptError
    . InvalidTokenError
    . MalformedMessageError
    . LimitError
    . MethodConflictError
    . ImageError
      - EmptyVideoError
      - ImageCountError
      - TextOnlyModelError
  - PromptTooLongError          OUT_OF_RANGE
  - NotFoundError               NOT_FOUND
    . UnknownPresetError
    . UnknownModelError
    . BlockNotFoundError
  - ProtocolVersionError        FAILED_PRECONDITION
  - ConfigurationError          FAILED_PRECONDITION   raised at start-up: bad URL, occupied port
  - UnauthenticatedError        UNAUTHENTICATED       no token, or one that nobody has
  - PermissionDeniedError       PERMISSION_DENIED     a tenant that may not do this
  - MessageTooLargeError        RESOURCE_EXHAUSTED
  - CapacityError               RESOURCE_EXHAUSTED
    . ThrottledError            RESOURCE_EXHAUSTED    a tenant's quota or rate is used up
  - UnavailableError            UNAVAILABLE           a peer cannot be reached
    . DrainingError
  - DeadlineError               DEADLINE_EXCEEDED
  - CorruptFrameError           DATA_LOSS
  - InternalError               INTERNAL              a defect of ours

On the wire an error is a ``google.rpc.Status`` with one ``google.rpc.ErrorInfo`` detail: ``reason``
is the class name, ``domain`` is "kvstrata", ``metadata["remedy"]`` says what to do. A throttled
call's ``metadata["retry_after_s"]`` is told as ``google.rpc.RetryInfo`` too, for other libraries.
"""

from typing import ClassVar

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "kvstrata"
RETRY_AFTER = "retry_after_s"
MAX_RETRY_AFTER_S = 86_400.0


class KVStrataError(Exception):
    """Base of everything this project raises for its users.

    Args:
        message: What was wrong, naming the value.
        remedy: What to do about it.
        metadata: Further fields for machines.
    """

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(self, message: str, remedy: str = "", **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy
        self.metadata = metadata

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message

    def describe(self) -> str:
        """Return what a command prints: the error, and its remedy on a line of its own."""
        hint = f"\nhint: {self.remedy}" if self.remedy else ""
        return printable(f"error: {self.message}{hint}")

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.message, self.remedy, self.metadata))


def printable(text: str) -> str:
    """Return ``text`` without the control characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def _rebuild(
    kind: type[KVStrataError], message: str, remedy: str, metadata: dict[str, str]
) -> KVStrataError:
    error = kind(message, remedy)
    error.metadata = metadata  # not as keywords: a peer may use any names
    return error


class InvalidRequestError(KVStrataError):
    """A request that no state of the service could answer."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class EmptyPromptError(InvalidRequestError):
    """A prompt without a token."""


class InvalidTokenError(InvalidRequestError):
    """A token id outside the vocabulary."""


class MalformedMessageError(InvalidRequestError):
    """Bytes that are no valid message of the contract, such as invalid UTF-8."""


class LimitError(InvalidRequestError):
    """A number outside its range."""


class MethodConflictError(InvalidRequestError):
    """Methods that exclude each other; ``metadata["rule"]`` says by which rule."""


class ImageError(InvalidRequestError):
    """An image, or a frame of a video, of the wrong size or type."""


class EmptyVideoError(ImageError):
    """A video without a frame."""


class ImageCountError(ImageError):
    """More images than places for them in the prompt, or fewer."""


class TextOnlyModelError(ImageError):
    """Images for a model that sees none."""


class PromptTooLongError(KVStrataError):
    """Prompt and wanted tokens exceed the model's context."""

    code = grpc.StatusCode.OUT_OF_RANGE


class NotFoundError(KVStrataError):
    """A name that names nothing here."""

    code = grpc.StatusCode.NOT_FOUND


class UnknownPresetError(NotFoundError):
    """A preset or codec that does not exist."""


class UnknownModelError(NotFoundError):
    """A model that is not served here, or a folder that holds none."""


class BlockNotFoundError(NotFoundError):
    """A block that no tier holds."""


class ProtocolVersionError(KVStrataError):
    """Client and server speak different versions of the contract."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class ConfigurationError(KVStrataError):
    """A setting with which the process cannot start."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class UnauthenticatedError(KVStrataError):
    """A call without a token, or with one that belongs to no tenant."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(KVStrataError):
    """A call that the caller's tenant may not make."""

    code = grpc.StatusCode.PERMISSION_DENIED


class MessageTooLargeError(KVStrataError):
    """A message beyond the server's size limit."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class CapacityError(KVStrataError):
    """No room or no slot at present; trying again later may succeed."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class ThrottledError(CapacityError):
    """A tenant has used up what it may at present; ``retry_after_s`` says when to come again."""

    @property
    def retry_after_s(self) -> float:
        """Seconds to wait before another attempt, a day at most; 0 if the server did not say."""
        try:
            return min(max(0.0, float(self.metadata.get(RETRY_AFTER, "0"))), MAX_RETRY_AFTER_S)
        except ValueError:
            return 0.0


class UnavailableError(KVStrataError):
    """A peer that cannot be reached."""

    code = grpc.StatusCode.UNAVAILABLE


class DrainingError(UnavailableError):
    """The process is shutting down and takes no new work."""


class DeadlineError(KVStrataError):
    """The time limit was over first."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CorruptFrameError(KVStrataError):
    """Bytes that fail their checksum or break the frame layout."""

    code = grpc.StatusCode.DATA_LOSS


class InternalError(KVStrataError):
    """A defect of ours; the server's log has the traceback."""

    code = grpc.StatusCode.INTERNAL


def _tree(root: type[KVStrataError]) -> dict[str, type[KVStrataError]]:
    found = {root.__name__: root}
    for kind in root.__subclasses__():
        found |= _tree(kind)
    return found


ERRORS: dict[str, type[KVStrataError]] = _tree(KVStrataError)
# What a bare status means when no detail of ours came with it (sent by gRPC itself or by a proxy).
_BY_STATUS: dict[grpc.StatusCode, type[KVStrataError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: MessageTooLargeError,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.OUT_OF_RANGE: PromptTooLongError,
    grpc.StatusCode.UNIMPLEMENTED: ProtocolVersionError,
    grpc.StatusCode.INTERNAL: InternalError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
}
# What grpcio says, with INTERNAL, where a stream ends under a write: the connection was cut, or the
# server stopped (grpc/grpc issue 36066).
_CUT = "Internal error from Core"
_REMEDIES: dict[grpc.StatusCode, str] = {
    grpc.StatusCode.UNAVAILABLE: "check the address and that the server runs",
    grpc.StatusCode.DEADLINE_EXCEEDED: "raise the timeout or ask for fewer tokens",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "send a smaller message",
    grpc.StatusCode.UNIMPLEMENTED: "use a client and a server of the same version",
    grpc.StatusCode.UNAUTHENTICATED: "set KVSTRATA_TOKEN, or check the certificates",
}


def to_status(error: KVStrataError) -> status_pb2.Status:
    """Return ``error`` as the ``google.rpc.Status`` that goes over the wire."""
    info = error_details_pb2.ErrorInfo(
        reason=type(error).__name__,
        domain=DOMAIN,
        metadata={"remedy": error.remedy, **error.metadata},
    )
    details = [info]
    if isinstance(error, ThrottledError) and error.retry_after_s:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(retry)
    packed = [any_pb2.Any() for _ in details]
    for target, detail in zip(packed, details, strict=True):
        target.Pack(detail)
    number = code_pb2.Code.Value(error.code.name)
    return status_pb2.Status(code=number, message=error.message, details=packed)


def from_rpc_error(error: grpc.RpcError, peer: str = "") -> KVStrataError:
    """Return the error of our tree that the server sent, or the nearest one for a bare status."""
    try:
        sent = _sent_error(error)
    except (DecodeError, ValueError):  # unreadable details, or those of another status
        sent = None
    if sent is not None:
        return sent
    code: grpc.StatusCode = error.code()
    if code is grpc.StatusCode.INTERNAL and error.details() == _CUT:
        code = grpc.StatusCode.UNAVAILABLE
    kind = _BY_STATUS.get(code, InternalError)
    where = f"{peer}: " if peer else ""
    return kind(f"{where}{code.name}: {error.details() or 'no details'}", _REMEDIES.get(code, ""))


def _sent_error(error: grpc.RpcError) -> KVStrataError | None:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN and info.reason in ERRORS:
            metadata = dict(info.metadata)
            remedy = metadata.pop("remedy", "")
            return _rebuild(ERRORS[info.reason], status.message, remedy, metadata)
    return None
