"""What the stages of the pipeline have in common: each is a paper's part, told by a few numbers."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True, slots=True)
class Stage:
    """A paper's settings and what it decides by them; a value without state.

    A subclass is one file: its fields are the paper's hyper-parameters with the paper's defaults,
    and one or two methods decide. Settings that make no sense raise ``LimitError`` when made.
    """

    name: ClassVar[str]  # as requests and the cache scope spell it
    paper: ClassVar[str]
    changes_blocks: ClassVar[bool]  # whether it changes the K and V that are stored, or which

    @property
    def needs_whole_prompt(self) -> bool:
        """Return whether stored blocks depend on what follows them in the prompt.

        Then they are that prompt's alone: what was chosen for one question must not serve another.
        """
        return False

    @classmethod
    def neutral(cls) -> Self:
        """Return settings under which nothing changes: the dense model's logits."""
        raise NotImplementedError

    def settings(self) -> str:
        """Return the canonical text of all settings."""
        return f"{self.name}({','.join(f'{k}={v!r}' for k, v in self._values())})"

    def _values(self) -> list[tuple[str, Any]]:
        return [(f.name, getattr(self, f.name)) for f in fields(self)]
