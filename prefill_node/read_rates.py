"""What reading and computing blocks takes on this node, learned from what was really seen.

A rate is a median over what was seen last, in which later and larger pieces of work count more: one
fetch that hung, or one small one, changes little. What a link did is forgotten after a while, so
that one that was slow once is tried again.
"""

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from kvstrata.methods.codec import BlockCodec
from kvstrata.prefill_node.read_plan import Precision, TierRate
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.service import MAX_WHOLE_BYTES

KEPT = 32  # observations of a rate
FADING = 0.9  # weight of an observation against that of the next one
MIN_SEEN = 3  # before that nothing is told
MAX_AGE_S = 60.0  # of what is known of a link
MAX_RATES = 256  # of all kinds: clients may name any number of settings
# Of a small fetch all pieces come in one message: within so much of its time, or so many seconds,
# after one another, and no more of them than a message holds.
TOGETHER_SHARE, TOGETHER_S = 0.02, 0.001


def settings_of(codec: BlockCodec) -> str:
    """Return the name that the rates of a codec go by."""
    return f"{codec.name};{codec.settings()}"


class FadingMedian:
    """The weighted median of the last observations of one quantity.

    Args:
        max_age_s: When the last one is older, all are forgotten.
        now: A clock, in seconds.
    """

    def __init__(
        self, max_age_s: float = math.inf, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_age_s = max_age_s
        self._now = now
        self._seen: deque[tuple[float, float]] = deque(maxlen=KEPT)
        self._seen_at = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        """Take note of an observation; ``weight`` is the work that it stands for."""
        self._forget()
        self._seen.append((value, weight))
        self._seen_at = self._now()

    @property
    def value(self) -> float | None:
        """The median; None while there are fewer than ``MIN_SEEN`` observations."""
        self._forget()
        if len(self._seen) < MIN_SEEN:
            return None
        newest_first = reversed(self._seen)
        weighted = sorted((v, w * FADING**age) for age, (v, w) in enumerate(newest_first))
        half = sum(weight for _, weight in weighted) / 2
        for value, weight in weighted:
            half -= weight
            if half <= 0:
                return value
        return weighted[-1][0]

    def _forget(self) -> None:
        if self._now() - self._seen_at > self._max_age_s:
            self._seen.clear()


class Arrivals:
    """The pieces of one fetch, as they come.

    Args:
        now: A clock, in seconds.

    Attributes:
        tiers: Where they came from.
        num_bytes: Of all of them.
        first: The tier of the first one, and seconds until what came with it was there.
        first_bytes: Of the first one.
        beside_bytes: Of those that came with it.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.tiers: dict[str, list[float]] = {}  # bytes and seconds of all pieces but those
        self.strata: dict[int, int] = {}  # bytes
        self.num_bytes = 0
        self.first: tuple[str, float] | None = None
        self.first_bytes = self.beside_bytes = 0
        self._is_first = True  # whether the next piece may have come with the first one
        self._now = now
        self._last_s = now()

    def add(self, tier: str, stratum: int, num_bytes: int) -> None:
        """Note that a piece is there."""
        now = self._now()
        seconds, self._last_s = now - self._last_s, now
        self.num_bytes += num_bytes
        self.strata[stratum] = self.strata.get(stratum, 0) + num_bytes
        total = self.tiers.setdefault(tier, [0, 0.0])
        if self.first is None:
            self.first, self.first_bytes = (tier, seconds), num_bytes
            return
        first_tier, first_s = self.first
        limit_s = max(TOGETHER_S, TOGETHER_SHARE * first_s)
        message_bytes = self.first_bytes + self.beside_bytes + num_bytes
        self._is_first = (
            self._is_first
            and tier == first_tier
            and seconds <= limit_s
            and message_bytes <= MAX_WHOLE_BYTES
        )
        if self._is_first:
            self.first = (tier, first_s + seconds)
            self.beside_bytes += num_bytes
        else:
            total[0] += num_bytes
            total[1] += seconds


class ReadRates:
    """The rates of one node. Not thread-safe: its event loop owns them.

    Args:
        now: A clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._medians: OrderedDict[tuple[str, ...], FadingMedian] = OrderedDict()

    def fetched(self, arrivals: Arrivals, settings: str, full: Sequence[Stratum]) -> None:
        """Learn from a fetch that ended well; ``full`` are all strata of its codec."""
        if arrivals.first is not None:
            self._first_came(arrivals, *arrivals.first)
        for tier, (num_bytes, seconds) in arrivals.tiers.items():
            if num_bytes:
                self._of("byte", tier).add(seconds / num_bytes, num_bytes)
        if arrivals.num_bytes and set(arrivals.strata) == set(full):
            for stratum, num_bytes in arrivals.strata.items():
                self._of("share", settings, str(stratum)).add(num_bytes / arrivals.num_bytes)

    def _first_came(self, arrivals: Arrivals, tier: str, seconds: float) -> None:
        """Learn from what came first: latency where more came later, else the whole fetch's rate.

        So a small fetch over a slow link tells that the link is slow, not that it answers late.
        """
        latency = self._of("latency", tier)
        num_later, later_s = arrivals.tiers[tier]
        if num_later:
            latency.add(max(0.0, seconds - arrivals.beside_bytes * later_s / num_later))
        elif num_bytes := arrivals.first_bytes + arrivals.beside_bytes:
            byte_s = max(0.0, seconds - (latency.value or 0.0)) / num_bytes
            self._of("byte", tier).add(byte_s, num_bytes)

    def unpacked(
        self, settings: str, strata: Sequence[Stratum], num_blocks: int, seconds: float
    ) -> None:
        """Learn how long it took to bring blocks into the cache."""
        self._of("unpack", settings, str(tuple(strata))).add(seconds / num_blocks, num_blocks)

    def computed(self, num_tokens: int, seconds: float) -> None:
        """Learn how long tokens of prompts took, those that stood before them included."""
        self._of("token").add(seconds / num_tokens, num_tokens)

    def sealed(self, settings: str, num_blocks: int, seconds: float) -> None:
        """Learn how long it took to encode blocks."""
        self._of("seal", settings).add(seconds / num_blocks, num_blocks)

    def tier(self, tier: str) -> TierRate | None:
        """Return what reading from a tier takes; None while that is not known."""
        latency_s, byte_s = self._of("latency", tier).value, self._of("byte", tier).value
        if byte_s is None:
            return None
        return TierRate(latency_s or 0.0, byte_s)  # what never comes first starts at once

    def precision(
        self, settings: str, strata: tuple[Stratum, ...], full: tuple[Stratum, ...]
    ) -> Precision | None:
        """Return what reading ``strata`` of a block takes; None while that is not known.

        What was never read so coarsely is taken to unpack no faster than ``full``.
        """
        unpack_s = self._of("unpack", settings, str(strata)).value
        if unpack_s is None:
            unpack_s = self._of("unpack", settings, str(full)).value
        shares = [self._of("share", settings, str(stratum)).value for stratum in strata]
        known = [share for share in shares if share is not None]
        if unpack_s is None or len(known) < len(shares):
            return None
        return Precision(strata, min(1.0, sum(known)), unpack_s)

    @property
    def token_s(self) -> float | None:
        """Seconds that a prompt's token takes; None while that is not known."""
        return self._of("token").value

    def seal_s(self, settings: str) -> float:
        """Return the seconds that encoding a block takes; 0 while that is not known."""
        return self._of("seal", settings).value or 0.0

    def _of(self, *name: str) -> FadingMedian:
        if name not in self._medians:
            is_link = name[0] in ("latency", "byte")
            self._medians[name] = FadingMedian(MAX_AGE_S if is_link else math.inf, self._now)
            if len(self._medians) > MAX_RATES:
                self._medians.popitem(last=False)
        self._medians.move_to_end(name)
        return self._medians[name]
