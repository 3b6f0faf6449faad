"""What was learned about how soon blocks are read again, and what that makes a block worth.

Time between two uses falls into four buckets an octave. For blocks that were used equally often,
the table holds how many waits ended in each bucket, and so which share goes on waiting. A block of
some age is worth its Gittins index: the best rate, over all times to give up at, of expected uses
per expected unit of time it takes up. It need not fall with age: where people think for a minute
before they ask again, a block of one second is worth less than one of fifty.
"""

from collections.abc import Sequence

_FIRST_OCTAVE = 6
_PER_OCTAVE = 4
NUM_BUCKETS = 64
_PRIOR = 32.0  # made-up waits for each number of uses


def age_bucket(age: int) -> int:
    """Return the bucket of an age; the first holds all below 80, the last all above 2**22."""
    octave = age.bit_length() - 1
    if octave < _FIRST_OCTAVE:
        return 0
    step = age >> (octave - 2) & 3
    return min(_PER_OCTAVE * (octave - _FIRST_OCTAVE) + step, NUM_BUCKETS - 1)


def bucket_begin(bucket: int) -> int:
    """Return the least age in a bucket."""
    octave, step = divmod(bucket, _PER_OCTAVE)
    return (4 + step) << (octave + _FIRST_OCTAVE - 2) if bucket else 0


_WIDTHS = [bucket_begin(b + 1) - bucket_begin(b) for b in range(NUM_BUCKETS)]


class ReuseAges:
    """Waits between uses, by how often the block was used before; older ones count less.

    Before anything is learned, more uses are worth more and so is the younger of two ages.

    Args:
        num_classes: Numbers of uses that are told apart; the last stands for all above.
        memory: Share of what is known that ``learn`` keeps.
    """

    def __init__(self, num_classes: int, memory: float) -> None:
        self._memory = memory
        self._begun = [0.0] * num_classes
        self._ended = [[0.0] * NUM_BUCKETS for _ in range(num_classes)]
        self.worth: list[list[float]] = []
        self.learn()

    def begin(self, uses: int) -> None:
        """Count a block that begins to wait after so many uses."""
        self._begun[uses] += 1

    def end(self, uses: int, age: int) -> None:
        """Count a wait that a use ended."""
        self._ended[uses][age_bucket(age)] += 1

    def learn(self) -> None:
        """Renew ``worth``, by uses and bucket: expected uses per unit of time, higher is better."""
        self.worth = []
        for uses, (begun, ended) in enumerate(zip(self._begun, self._ended, strict=True)):
            made_up = _PRIOR * (uses + 1) / (uses + 2) / NUM_BUCKETS
            self.worth.append(gittins(begun + _PRIOR, [n + made_up for n in ended]))
            self._begun[uses] = begun * self._memory
            self._ended[uses] = [n * self._memory for n in ended]


def gittins(begun: float, ended: Sequence[float]) -> list[float]:
    """Return the index for each bucket: max over later buckets of uses per time from here to there.

    Going backwards, a bucket joins the stretch behind it as long as that raises its rate.

    Args:
        begun: Waits that began.
        ended: Of those, how many ended in each bucket.
    """
    times = []
    for width, here in zip(_WIDTHS, ended, strict=True):
        left = max(begun - here, 0.0)
        times.append(width * (left + min(here, begun) / 2) or 1.0)
        begun = left
    worth = [0.0] * len(times)
    stretches: list[tuple[float, float]] = []
    for bucket in range(len(times) - 1, -1, -1):
        uses, time = ended[bucket], times[bucket]
        while stretches and stretches[-1][0] * time > uses * stretches[-1][1]:
            more_uses, more_time = stretches.pop()
            uses, time = uses + more_uses, time + more_time
        stretches.append((uses, time))
        worth[bucket] = uses / time
    return worth
