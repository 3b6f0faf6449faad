"""What the step loop has done so far, for statistics; read from any thread."""

from collections import Counter


class StepCounts:
    """Counters by name.

    ``passes``, ``generated_tokens``, ``prompt_tokens``; ``parked`` sequences, ``expired`` requests.
    """

    def __init__(self) -> None:
        """Start at nothing."""
        self._counts: Counter[str] = Counter()

    def add(self, name: str, count: int = 1) -> None:
        """Count."""
        self._counts[name] += count

    def add_pass(self, num_generated: int, num_prompt: int) -> None:
        """Count a pass over so many generated tokens, and tokens of prompts."""
        self.add("passes")
        self.add("generated_tokens", num_generated)
        self.add("prompt_tokens", num_prompt)

    def get(self, name: str) -> int:
        """Return a count."""
        return self._counts[name]

    def all(self) -> dict[str, int]:
        """Return all counts."""
        return dict(self._counts)
