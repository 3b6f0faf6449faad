"""A copy of everything a store holds, to measure what it really kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.protos import admin_pb2, admin_pb2_grpc
from kvstrata.protos.frame import Frame
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import BlockHash, BlockKey, ScopeDigest
from kvstrata.protos.service import CALL_METADATA, open_channel

TIMEOUT_S = 30.0
PAGE_SIZE = 500


@dataclass(slots=True)
class StoredBlock:
    """One block's frames as received, and their bytes."""

    frames: dict[Stratum, Frame] = field(default_factory=dict)
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """Blocks by key."""

    blocks: dict[BlockKey, StoredBlock]

    def prefix(self, scope: ScopeDigest, hashes: Sequence[BlockHash]) -> list[StoredBlock]:
        """Return the longest run of blocks present, from the first hash on."""
        run = []
        for block_hash in hashes:
            block = self.blocks.get(BlockKey(scope, block_hash))
            if block is None:
                break
            run.append(block)
        return run


async def read_store(address: str) -> StoredBlocks:
    """Return every committed block of the store at ``address``."""
    blocks: dict[BlockKey, StoredBlock] = {}
    async with (
        open_channel(address) as channel,
        StoreClient(address, timeout_s=TIMEOUT_S) as client,
    ):
        admin: Any = admin_pb2_grpc.AdminStub(channel)  # type: ignore[no-untyped-call]
        token = ""
        while True:
            page = await admin.ListBlocks(
                admin_pb2.ListBlocksRequest(page_size=PAGE_SIZE, page_token=token),
                timeout=TIMEOUT_S,
                metadata=CALL_METADATA,
            )
            for listing in page.blocks:
                key = BlockKey(ScopeDigest(listing.key.scope), BlockHash(listing.key.block_hash))
                blocks[key] = block = StoredBlock()
                strata = [size.stratum for size in listing.strata]
                async for piece in client.get(key.scope, [key.block_hash], strata):
                    if piece.frame is not None:
                        block.frames[cast(Stratum, piece.stratum)] = piece.frame
                        block.num_bytes += piece.num_bytes
            token = page.next_page_token
            if not token:
                return StoredBlocks(blocks)
