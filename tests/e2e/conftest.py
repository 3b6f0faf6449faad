"""Real text, and the tokens of an undisturbed run."""

import pydoc_data.topics

import pytest

_TOPICS = pydoc_data.topics.topics
_TEXT = "\n\n".join(_TOPICS[name] for name in sorted(_TOPICS) if len(_TOPICS[name]) > 3000)


class Texts:
    """Pieces of Python's documentation; each test takes another one, so that it starts uncached."""

    def __init__(self) -> None:
        self._next = 0

    def take(self, num_chars: int) -> str:
        first = self._next
        self._next += num_chars
        return _TEXT[first : self._next]


@pytest.fixture(scope="session")
def texts() -> Texts:
    return Texts()
