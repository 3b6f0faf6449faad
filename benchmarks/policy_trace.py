"""The trace: requests as chains of blocks, read from where it is and never copied."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512
DEFAULT = (
    Path(__file__).parents[1] / ".." / "shared" / "data" / "mooncake_conversation_trace.jsonl.gz"
)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt: its chained block ids, first block first, and its tokens.

    The last block may be shorter than the others; the trace gives it an id all the same.
    """

    blocks: Sequence[int]
    num_tokens: int

    def tokens_of(self, num_blocks: int) -> int:
        """Return the tokens in the first ``num_blocks`` blocks."""
        return min(num_blocks * BLOCK_TOKENS, self.num_tokens)


def read_trace(path: Path) -> list[Request]:
    """Return the requests in order; only ``input_length`` and ``hash_ids`` of each are used."""
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    return [Request(row["hash_ids"], row["input_length"]) for row in rows]


def num_distinct(requests: Sequence[Request]) -> int:
    """Return how many different blocks there are."""
    return len({block for request in requests for block in request.blocks})
