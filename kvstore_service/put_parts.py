"""Blocks as the messages of a Put stream, on the client."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping

from kvstrata.kvstore_service.data_codec import PutPart
from kvstrata.kvstore_service.wire import key_message, size_messages
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos.identity import BlockKey
from kvstrata.protos.retention import Retention
from kvstrata.protos.service import CHUNK_BYTES, MAX_WHOLE_BYTES

Blocks = Iterable[tuple[BlockKey, Mapping[int, bytes]]]
AsyncBlocks = AsyncIterable[tuple[BlockKey, Mapping[int, bytes]]]


async def iterate(
    blocks: Blocks | AsyncBlocks,
) -> AsyncIterator[tuple[BlockKey, Mapping[int, bytes]]]:
    """Yield blocks, however they come."""
    if isinstance(blocks, AsyncIterable):
        async for block in blocks:
            yield block
    else:
        for block in blocks:
            yield block


def put_parts(
    key: BlockKey,
    frames: Mapping[int, bytes],
    durability: str,
    retention: Retention | None,
) -> Iterator[PutPart]:
    """Yield the messages of one block: one if it fits, else pieces of 1 MiB."""
    sizes = size_messages({stratum: len(frame) for stratum, frame in frames.items()})
    opening: pb.PutOpen | None = pb.PutOpen(
        key=key_message(key),
        strata=sizes,
        durability=durability,
        retention=retention.message() if retention is not None else None,
    )
    if sum(map(len, frames.values())) <= MAX_WHOLE_BYTES:
        yield PutPart(opening, tuple(frames.values()))
        return
    for frame in frames.values():
        view = memoryview(frame)
        for first in range(0, len(frame), CHUNK_BYTES):
            yield PutPart(opening, (view[first : first + CHUNK_BYTES],))
            opening = None
