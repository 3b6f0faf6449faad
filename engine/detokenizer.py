"""Token ids in, text deltas out, each safe to show: no half character, no part of a stop string."""

from collections.abc import Iterable
from typing import Any

_REPLACEMENT = "\ufffd"


class Detokenizer:
    r"""Turns the tokens of one generation into text as they come.

    The deltas joined, ``finish()`` included, are ``tokenizer.decode(all ids)`` without special
    tokens and without the clean-up of spaces, up to the first stop string. Two windows over the
    ids give each delta its context: a decoder may treat the first token of a text differently
    (sentencepiece drops its space).

    Example: with ``stop=("\n\n",)`` the tokens ``a``, ``\n``, ``b`` give ``"a"``, ``""`` (held
    back, a stop string may begin here) and ``"\nb"``.

    Source:
        The windows are those of vLLM and TGI (prefix offset, read offset).
    """

    def __init__(self, tokenizer: Any, stop: Iterable[str] = ()) -> None:
        """Start with no text.

        Args:
            tokenizer: A transformers tokenizer.
            stop: Strings that end the text; none empty.
        """
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._hidden_ids = _special_ids(tokenizer)
        self._ids: list[int] = []
        self._prefix_text = ""
        self._num_read = 0
        self._held = ""
        self._stopped: str | None = None
        self._emitted_chars = 0

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, or None."""
        return self._stopped

    @property
    def emitted_chars(self) -> int:
        """Characters returned so far by ``push`` and ``finish``."""
        return self._emitted_chars

    def push(self, token_id: int) -> str:
        """Return the text that is now safe to show; often "", always "" after a stop string."""
        if self._stopped is not None or token_id in self._hidden_ids:
            return ""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if text.endswith(_REPLACEMENT) or len(text) <= len(self._prefix_text):
            return ""
        delta = text[len(self._prefix_text) :]
        del self._ids[: self._num_read]
        self._num_read = len(self._ids)
        self._prefix_text = self._decode(self._ids)
        return self._release(delta, is_last=False)

    def finish(self) -> str:
        """Return what was still held back; a character cut in half becomes U+FFFD."""
        if self._stopped is not None:
            return ""
        delta = self._decode(self._ids)[len(self._prefix_text) :]
        self._ids, self._num_read, self._prefix_text = [], 0, ""
        return self._release(delta, is_last=True)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _release(self, delta: str, *, is_last: bool) -> str:
        self._held += delta
        match = self._first_match()
        if match is not None:
            end, self._stopped = match
            safe, self._held = self._held[: end - len(self._stopped)], ""
        else:
            cut = len(self._held) if is_last else len(self._held) - self._num_undecided()
            safe, self._held = self._held[:cut], self._held[cut:]
        self._emitted_chars += len(safe)
        return safe

    def _first_match(self) -> tuple[int, str] | None:
        """Return the stop string that is complete first, the longest if several end there.

        So the outcome does not depend on how the text was cut into tokens.
        """
        found = [
            (self._held.find(stop) + len(stop), -len(stop), stop)
            for stop in self._stop
            if stop in self._held
        ]
        if not found:
            return None
        end, _, stop = min(found)
        return end, stop

    def _num_undecided(self) -> int:
        """Return the length of the longest suffix held that could begin a stop string."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop) - 1, len(self._held)) + 1)
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids that decoding skips; left out early, a run of them costs nothing.

    Only for tokenizers of the ``tokenizers`` library, which skip exactly the ids marked special.
    """
    if not getattr(tokenizer, "is_fast", False):
        return frozenset()
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
