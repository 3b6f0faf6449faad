"""How long passes take, learned as they run, and how large a prompt's chunk may therefore be."""

_KEPT = 0.8  # of an estimate, when a new time comes in
_KEPT_RISING = 0.98  # of a pass without prompts: what disturbs some must not allow longer chunks,
# and sealing, which does, runs beside passes just when no prompt is computed
MIN_CHUNK, MAX_CHUNK = 16, 512
# Before anything was measured: a pass, and a token of a prompt, in seconds.
_FIRST_PASS_S, _FIRST_TOKEN_S = 0.05, 0.002
_LEAST_TOKEN_S = 1e-6  # a pass may take no longer with tokens of a prompt than the estimate without


class StepTimes:
    """Estimates from passes that were timed.

    A pass over generated tokens alone is the measure: a chunk may make it ``max_stall`` times as
    long, so that is the longest that streams wait for another request's prompt.
    """

    def __init__(self, max_stall: float) -> None:
        """Start with a guess.

        Args:
            max_stall: How many times as long a pass may take with a chunk of a prompt in it.
        """
        self._max_stall = max_stall
        self._passes_s: dict[int, float] = {}
        self._token_s: float | None = None

    @property
    def prompt_token_s(self) -> float:
        """Seconds that a prompt's token takes."""
        return _FIRST_TOKEN_S if self._token_s is None else self._token_s

    def add(self, num_generated: int, num_prompt: int, seconds: float) -> None:
        """Learn from a pass over so many generated tokens, and tokens of prompts."""
        if not num_prompt:
            old = self._passes_s.get(num_generated, seconds)
            risen = _KEPT_RISING * old + (1 - _KEPT_RISING) * seconds
            self._passes_s[num_generated] = min(risen, seconds)
        else:
            base = self.pass_s(num_generated) if num_generated else 0.0
            own = max((seconds - base) / num_prompt, _LEAST_TOKEN_S)
            old_own = own if self._token_s is None else self._token_s
            self._token_s = _KEPT * old_own + (1 - _KEPT) * own

    def pass_s(self, num_generated: int) -> float:
        """Return the seconds of a pass over so many generated tokens alone."""
        if not self._passes_s:
            return _FIRST_PASS_S
        nearest = min(self._passes_s, key=lambda known: abs(known - num_generated))
        return self._passes_s[nearest]

    def chunk(self, num_generated: int) -> int:
        """Return how many tokens of prompts a pass may take along."""
        if not num_generated:
            return MAX_CHUNK
        room_s = (self._max_stall - 1) * self.pass_s(num_generated)
        return max(MIN_CHUNK, min(int(room_s / self.prompt_token_s), MAX_CHUNK))
