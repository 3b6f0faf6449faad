"""Conversations: the part that sync and async share.

The history grows by whole turns only: a failed or cancelled turn leaves no trace.
"""

import uuid
import weakref
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar, Unpack

from kvstrata.client.request import ChatMessage, GenerateOptions, Prompt
from kvstrata.client.results import Completion
from kvstrata.client.validation import check_text
from kvstrata.protos.errors import InvalidRequestError


class _Endable(Protocol):
    @property
    def ended(self) -> bool:
        """Whether the turn has ended."""


StreamT = TypeVar("StreamT", bound=_Endable)
OpenStream = Callable[[Prompt, GenerateOptions, Callable[[Completion], None]], StreamT]


class Conversation(Generic[StreamT]):
    """The history of a conversation and its next turn.

    Args:
        open_stream: Starts a call; its last argument is called if the call ends well.
        system: System message, or None.
        defaults: Options of every turn.
    """

    def __init__(
        self, open_stream: OpenStream[StreamT], *, system: str | None, defaults: GenerateOptions
    ) -> None:
        self._open_stream = open_stream
        self._messages: list[ChatMessage] = []
        if system is not None:
            self._messages.append(ChatMessage("system", check_text("system", system)))
        self._session_id = defaults.get("session_id") or str(uuid.uuid4())
        self._defaults: GenerateOptions = {
            "priority": "normal",  # so that the store knows the session when it is released
            **defaults,
            "session_id": self._session_id,
        }
        self._images = list(defaults.get("images") or ())
        self._turn: weakref.ref[StreamT] | None = None

    @property
    def session_id(self) -> str:
        """The name of this conversation in the service's logs, and for ``release``."""
        return self._session_id

    @property
    def messages(self) -> tuple[ChatMessage, ...]:
        """The history: the system message, then a user and an assistant message per turn."""
        return tuple(self._messages)

    def stream(self, text: str, **options: Unpack[GenerateOptions]) -> StreamT:
        """Return the answer to ``text`` as it comes; read to its end, it joins the history.

        A turn's ``images`` join the history with it, and are sent again with the turns that follow.

        Raises:
            InvalidRequestError: An earlier turn is still running, or the input is bad.
        """
        running = self._turn() if self._turn is not None else None
        if running is not None and not running.ended:
            raise InvalidRequestError(
                "an earlier turn is still running", "read its stream to the end or close it first"
            )
        message = ChatMessage("user", check_text("the message", text))
        images = [*self._images, *(options.get("images") or ())]

        def commit(completion: Completion) -> None:
            self._messages += [message, ChatMessage("assistant", completion.text)]
            self._images = images

        merged: GenerateOptions = {**self._merge(options), "images": images}
        stream = self._open_stream([*self._messages, message], merged, commit)
        self._turn = weakref.ref(stream)
        return stream

    def _merge(self, options: GenerateOptions) -> GenerateOptions:
        merged: GenerateOptions = {**self._defaults, **options}
        if options.get("settings") is not None and options.get("preset") is None:
            merged["preset"] = None  # a turn's settings replace the conversation's preset
        if options.get("preset") is not None and options.get("settings") is None:
            merged["settings"] = None
        return merged
