"""What a client asks of ``Retrieve``, and what comes back."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.identity import BlockHash, ScopeDigest, split_hashes


@dataclass(frozen=True, slots=True)
class Selection:
    """The blocks chosen for one query: their ids, ascending, and a score each (NaN for none)."""

    ids: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What answers a search.

    Attributes:
        hashes: The blocks that were looked at; ids are positions in it.
        selections: One a query.
        absent: Ids of blocks that no tier holds.
        unrepresented: Ids of blocks that lack a representative for one of the queries.
        degraded: A tier was silent: absent blocks may be there.
        truncated: The scope may have more blocks.
    """

    hashes: tuple[BlockHash, ...]
    selections: tuple[Selection, ...]
    absent: tuple[int, ...]
    unrepresented: tuple[int, ...]
    degraded: bool
    truncated: bool


def retrieve_request(
    scope: ScopeDigest,
    hashes: Sequence[BlockHash],
    queries: Sequence[tuple[int, Sequence[float]]],
    *,
    cosine: bool,
) -> pb.RetrieveRequest:
    """Return the message of a search, its counts still to be set."""
    return pb.RetrieveRequest(
        scope=scope,
        block_hashes=b"".join(hashes),
        queries=[
            pb.RetrieveQuery(layer=layer, vector=struct.pack(f"<{len(vector)}f", *vector))
            for layer, vector in queries
        ],
        similarity=pb.SIMILARITY_COSINE if cosine else pb.SIMILARITY_DOT,
    )


def retrieved(reply: pb.RetrieveReply, hashes: Sequence[BlockHash]) -> Retrieved:
    """Return the answer to a search among ``hashes``."""
    return Retrieved(
        tuple(split_hashes(reply.block_hashes)) or tuple(hashes),
        tuple(Selection(tuple(s.ids), tuple(s.scores)) for s in reply.selections),
        tuple(reply.absent),
        tuple(reply.unrepresented),
        reply.degraded,
        reply.truncated,
    )
