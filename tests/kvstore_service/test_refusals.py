"""What is refused before anything is read: headers too many or too large, a Put of nobody."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.testing import LocalStore, sample_block
from kvstrata.protos import admin_pb2, kvstore_pb2, retention_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.errors import LimitError, UnauthenticatedError, from_rpc_error
from kvstrata.protos.identity import ScopeDigest
from kvstrata.protos.kvstore_pb2_grpc import KVStoreStub
from kvstrata.protos.service import (
    MAX_HEADERS,
    MAX_MESSAGE_BYTES,
    MAX_METADATA_BYTES,
    call_metadata,
    open_channel,
)
from tests.kvstore_service.tenancy import credentials, tenants_file
from tests.kvstore_service.test_tenants import EVERY_RPC

BASE = 1


@pytest.fixture
async def channel(tmp_path: Path) -> AsyncIterator[grpc.aio.Channel]:
    """To a store of one tenant, who is an admin."""
    path = tenants_file(tmp_path, ops="admin = true")
    async with LocalStore(StoreConfig(tenants=path)) as store, open_channel(store.address) as made:
        yield made


def call(channel: grpc.aio.Channel, rpc: str, headers: Any, request: Any = None) -> Any:
    service, _, name = rpc.partition(".")
    stub: Any = (KVStoreStub if service == "KVStore" else AdminStub)(channel)  # type: ignore[no-untyped-call]
    method = getattr(stub, name)
    kind = f"{name}Request"
    known = (admin_pb2, kvstore_pb2, retention_pb2)
    empty = next(getattr(module, kind)() for module in known if hasattr(module, kind))
    streams_in = name in ("Put", "Write")
    return method(iter(()) if streams_in else request or empty, metadata=headers, timeout=30)


async def refusal(made: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        _ = [reply async for reply in made] if hasattr(made, "__aiter__") else await made
    return caught.value


@pytest.mark.parametrize("rpc", EVERY_RPC)
async def test_too_many_headers_are_refused_by_every_call(
    channel: grpc.aio.Channel, rpc: str
) -> None:
    headers = (*call_metadata(credentials("ops")), *((f"x-{n}", "1") for n in range(MAX_HEADERS)))
    error = await refusal(call(channel, rpc, headers))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    found = from_rpc_error(error)
    assert isinstance(found, LimitError)
    assert f"limit of {MAX_HEADERS}" in found.message


@pytest.mark.parametrize("rpc", ["KVStore.Lookup", "KVStore.Get", "Admin.Stats"])
async def test_headers_that_are_too_large_are_refused(channel: grpc.aio.Channel, rpc: str) -> None:
    headers = (*call_metadata(credentials("ops")), ("x", "y" * 2 * MAX_METADATA_BYTES))
    error = await refusal(call(channel, rpc, headers))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_message_that_is_too_large_is_refused(channel: grpc.aio.Channel) -> None:
    request = kvstore_pb2.LookupRequest(scope=bytes(16), block_hashes=bytes(MAX_MESSAGE_BYTES + 1))
    headers = call_metadata(credentials("ops"))
    error = await refusal(call(channel, "KVStore.Lookup", headers, request))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_put_without_a_token_is_told_so_however_much_it_sends(
    channel: grpc.aio.Channel, scope: ScopeDigest
) -> None:
    """A client that still writes when the call ends would see INTERNAL instead."""
    key, frames = sample_block(scope, strata={BASE: 3_000_000})
    opening = kvstore_pb2.PutOpen(
        key=kvstore_pb2.BlockKey(scope=scope, block_hash=key.block_hash),
        strata=[kvstore_pb2.StratumSize(stratum=1, frame_bytes=len(frames[BASE]))],  # type: ignore[arg-type]
    )
    pieces = [frames[BASE][at : at + (1 << 20)] for at in range(0, len(frames[BASE]), 1 << 20)]
    stub: Any = KVStoreStub(channel)  # type: ignore[no-untyped-call]
    for _ in range(30):

        async def requests() -> AsyncIterator[kvstore_pb2.PutRequest]:
            for _ in range(3):
                yield kvstore_pb2.PutRequest(open=opening)
                for piece in pieces:
                    yield kvstore_pb2.PutRequest(data=piece)

        error = await refusal(stub.Put(requests(), timeout=60))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, error.details()
        assert isinstance(from_rpc_error(error), UnauthenticatedError)
