"""Representatives of blocks that were searched, in memory: a bounded cache of what frames say."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstrata.protos.errors import CorruptFrameError
from kvstrata.protos.frame import Frame
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.representatives import unpack_representatives

_OVERHEAD_BYTES = 512  # of an entry, without its values

Query = tuple[int, npt.NDArray[np.float32]]
"""A layer, and the vector to compare its representatives with."""


@dataclass(frozen=True, slots=True)
class Representative:
    """What one block is searched by.

    Attributes:
        position: Of its first token.
        layers: Ascending; empty for a block that was written without representatives.
        values: float16 (layers, num_kv_heads, head_dim).
    """

    position: int
    layers: tuple[int, ...]
    values: npt.NDArray[np.float16]

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, roughly."""
        return self.values.nbytes + _OVERHEAD_BYTES

    @classmethod
    def of(cls, frame: bytes) -> "Representative":
        """Return what a verified frame says; no layers where its writer packed them wrongly."""
        opened = Frame.open(frame)
        try:
            header, rows = opened.header, unpack_representatives(opened)
        except CorruptFrameError:
            header, rows = opened.header, {}
        values = np.frombuffer(b"".join(rows.values()), "<f2")
        shape = (len(rows), header.num_kv_heads, header.head_dim)
        return cls(header.first_position, tuple(rows), values.reshape(shape))


class RepresentativeIndex:
    """Representatives by key, the least recently searched dropped first.

    A cache of frames and nothing else: what is missing is read again, what changed is forgotten.

    Args:
        max_bytes: Bound on the memory of all entries.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[BlockKey, Representative] = OrderedDict()
        self._expected: set[BlockKey] = set()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: Sequence[BlockKey]) -> list[Representative | None]:
        """Return the entry of each key, None where there is none; a use of those found."""
        found = [self._entries.get(key) for key in keys]
        for key, entry in zip(keys, found, strict=True):
            if entry is not None:
                self._entries.move_to_end(key)
        return found

    def expect(self, key: BlockKey) -> None:
        """Tell that the block's frame is about to be read."""
        self._expected.add(key)

    def add(self, key: BlockKey, entry: Representative) -> None:
        """Keep an entry that was expected, unless the block changed since."""
        if key not in self._expected or entry.num_bytes > self._max_bytes:
            return
        self.forget([key])
        while self.num_bytes + entry.num_bytes > self._max_bytes:
            self.num_bytes -= self._entries.popitem(last=False)[1].num_bytes
        self._entries[key] = entry
        self.num_bytes += entry.num_bytes

    def forget(self, keys: Iterable[BlockKey]) -> None:
        """Drop the entries of blocks that changed."""
        for key in keys:
            self._expected.discard(key)
            if (entry := self._entries.pop(key, None)) is not None:
                self.num_bytes -= entry.num_bytes


def score(
    entries: Sequence[Representative | None], queries: Sequence[Query], *, cosine: bool
) -> npt.NDArray[np.float64]:
    """Return how well blocks answer queries, (len(queries), len(entries)), larger is better.

    NaN for a block that is not there or has no representative that fits the query. The reference
    is ``methods/representatives.py``.

    Args:
        entries: Blocks.
        queries: A layer each, and a vector (query heads * head_dim,), finite, before RoPE; query
            heads are a multiple of the KV heads, those of one group neighbours.
        cosine: Divide by the norms of the query and of the representative repeated for every head.
    """
    scores = np.full((len(queries), len(entries)), np.nan)
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for place, entry in enumerate(entries):
        if entry is not None:
            alike.setdefault((entry.layers, entry.values.shape), []).append(place)
    for (layers, (_, heads, dim)), places in alike.items():
        values = np.stack([e.values for p in places if (e := entries[p]) is not None])
        for number, (layer, query) in enumerate(queries):
            if layer in layers and len(query) % (heads * dim) == 0:
                means = values[:, layers.index(layer)].reshape(len(places), -1)
                scores[number, places] = _compare(means, query, heads, cosine=cosine)
    return scores


def _compare(
    means: npt.NDArray[np.float16], query: npt.NDArray[np.float32], heads: int, *, cosine: bool
) -> npt.NDArray[np.float64]:
    """Return the scores of ``means`` (n, heads * head_dim); in float64, where none overflows."""
    rows, vector = means.astype(np.float64), query.astype(np.float64)
    group = len(vector) // rows.shape[1]
    dots = rows @ vector.reshape(heads, group, -1).sum(axis=1).ravel()
    if not cosine:
        return np.asarray(dots)
    norms = np.linalg.norm(rows, axis=1) * np.linalg.norm(vector) * np.sqrt(group)
    return np.asarray(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0))


def select(
    scores: npt.NDArray[np.float64],
    is_present: npt.NDArray[np.bool_],
    *,
    top_k: int,
    chunk: int = 1,
    sinks: int = 0,
    recent: int = 0,
) -> npt.NDArray[np.intp]:
    """Return the chosen blocks, ascending: the first, the last, and the best chunks between.

    A chunk is ``chunk`` neighbouring blocks, the last one perhaps fewer; its score is the mean of
    its blocks'. Of equal chunks the first is taken.

    Args:
        scores: In order of time; NaN for a block that has none.
        is_present: Whether the block can be read; the others are never chosen.
        top_k: Blocks wanted on top of ``sinks`` and ``recent``; a multiple of ``chunk``.
        chunk: Blocks of a chunk.
        sinks: First blocks, chosen without a score.
        recent: Last blocks, chosen without a score.
    """
    count = len(scores)
    first = min(sinks, count)
    last = max(first, count - recent)
    chosen = np.ones(count, bool)
    chosen[first:last] = False
    between = np.where(is_present[first:last], scores[first:last], np.nan)
    if between.size:
        known = ~np.isnan(between)
        starts = np.arange(0, len(between), chunk)
        sums = np.add.reduceat(np.where(known, between, 0.0), starts)
        counts = np.add.reduceat(known.astype(np.int64), starts)
        chunks = np.flatnonzero(counts)
        order = np.argsort(-sums[chunks] / counts[chunks], kind="stable")[: top_k // chunk]
        taken = np.isin(np.arange(len(between)) // chunk, chunks[order])
        chosen[first:last] = taken & known
    return np.flatnonzero(chosen & is_present)
