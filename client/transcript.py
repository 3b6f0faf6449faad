"""The replies of one call, gathered into chunks and at the end into a completion."""

from kvstrata.client.results import FINISH_REASONS, CacheReport, Chunk, Completion, Usage
from kvstrata.protos import inference_pb2 as pb
from kvstrata.protos.errors import InternalError, InvalidRequestError


class Transcript:
    """Collects the replies of one ``Generate`` call; shared by the sync and the async stream."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._last: pb.GenerateReply | None = None
        self._completion: Completion | None = None

    def read(self, reply: pb.GenerateReply) -> Chunk | None:
        """Return what ``reply`` adds, or None where it adds no token and no text."""
        self._texts.append(reply.text)
        self._token_ids.extend(reply.token_ids)
        if reply.finish_reason in FINISH_REASONS:
            self._last = reply
        if not reply.text and not reply.token_ids:
            return None
        return Chunk(reply.text, tuple(reply.token_ids))

    def end(self) -> Completion:
        """Return the whole, once the call has ended without an error.

        Raises:
            InternalError: No reply had a finish reason, so the text may be cut short.
        """
        if self._last is None:
            raise InternalError(
                "the stream ended without a finish reason",
                "use a client and a server of the same release",
            )
        self._completion = Completion(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=FINISH_REASONS[self._last.finish_reason],
            usage=Usage.from_proto(self._last.usage),
            cache=CacheReport.from_proto(self._last.cache),
        )
        return self._completion

    @property
    def completion(self) -> Completion:
        """The completion of an ended stream.

        Raises:
            InvalidRequestError: The stream was not read to its end.
        """
        if self._completion is None:
            raise InvalidRequestError(
                "the stream has no completion yet", "read the stream to its end first"
            )
        return self._completion
