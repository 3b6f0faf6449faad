"""What a request or a session wishes of a cache, as a value that rooms hand on."""

from dataclasses import dataclass

from kvstrata.protos import retention_pb2 as pb
from kvstrata.protos.errors import InvalidRequestError, LimitError

LOW, NORMAL, HIGH = (
    int(pb.PRIORITY_LOW),
    int(pb.PRIORITY_NORMAL),
    int(pb.PRIORITY_HIGH),
)
MAX_NAME_CHARS = 128


@dataclass(frozen=True, slots=True)
class Retention:
    """A hint for the blocks of a session; ``retention.proto`` says what holds.

    Attributes:
        priority: ``LOW``, ``NORMAL`` or ``HIGH``.
        keep_s: How long the hint holds; 0 is the server's limit.
        session: Its name; empty for the hint of one request.
        account: Whose session it is among the caller's own users.
    """

    priority: int = NORMAL
    keep_s: float = 0.0
    session: str = ""
    account: str = ""

    def message(self) -> pb.Retention:
        """Return it as a message."""
        return pb.Retention(
            priority=self.priority,  # type: ignore[arg-type]
            keep_ms=int(self.keep_s * 1000),
            session=self.session,
            account=self.account,
        )


def read_retention(message: pb.Retention) -> Retention:
    """Return the hint in a message.

    Raises:
        InvalidRequestError: An unknown priority.
        LimitError: A name that is too long.
    """
    if message.priority not in pb.Priority.values():
        raise InvalidRequestError(
            f"unknown priority {message.priority}", "use LOW, NORMAL or HIGH, or leave it out"
        )
    check_names(message.session, message.account)
    return Retention(
        int(message.priority) or NORMAL, message.keep_ms / 1000, message.session, message.account
    )


def check_names(*names: str) -> None:
    """Raise ``LimitError`` if the name of a session or an account is too long."""
    longest = max(map(len, names))
    if longest > MAX_NAME_CHARS:
        raise LimitError(
            f"a session's name has {longest} characters, the limit is {MAX_NAME_CHARS}",
            "give it a shorter one",
        )
