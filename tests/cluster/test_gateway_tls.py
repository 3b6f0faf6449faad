"""A gateway behind TLS, over a store behind mutual TLS."""

from pathlib import Path
from typing import Any, cast

import grpc
import pytest

from kvstrata.cluster.gateway_server import start_gateway
from kvstrata.cluster.stack_config import StackConfig
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.testing import LocalStore
from kvstrata.prefill_node import WorkerInfo
from kvstrata.protos import admin_pb2, inference_pb2
from kvstrata.protos.admin_pb2_grpc import AdminStub
from kvstrata.protos.credentials import ServerTls
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.inference_pb2_grpc import InferenceStub
from kvstrata.protos.service import open_channel
from tests.certificates import Authority

INFO = WorkerInfo("tiny", b"f" * 16, "float32", 4096, 259, 64, 1)
UNUSED = cast(Any, None)


async def test_a_gateway_shows_its_own_certificate_to_the_store(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with LocalStore(StoreConfig(tls=authority.server(mutual=True))) as store:
        server = await start_gateway(
            "127.0.0.1:0",
            store_address=store.address,
            workers=UNUSED,
            info=INFO,
            tokenizer=None,
            tls=authority.server(),
            store_credentials=authority.client(mutual=True),
        )
        try:
            async with open_channel(server.address, authority.client()) as channel:
                inference: Any = InferenceStub(channel)  # type: ignore[no-untyped-call]
                admin: Any = AdminStub(channel)  # type: ignore[no-untyped-call]
                assert (await inference.GetModel(inference_pb2.GetModelRequest())).name == "tiny"
                assert (await admin.Stats(admin_pb2.StatsRequest())).health == "ok"
            async with open_channel(server.address) as plain:
                inference = InferenceStub(plain)  # type: ignore[no-untyped-call]
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await inference.GetModel(inference_pb2.GetModelRequest(), timeout=3)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        finally:
            await server.stop(0)


async def test_a_bad_file_is_told_and_nothing_serves(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        await start_gateway(
            "127.0.0.1:0",
            store_address="127.0.0.1:1",
            workers=UNUSED,
            info=INFO,
            tokenizer=None,
            tls=ServerTls(str(tmp_path / "none"), "k"),
        )


@pytest.mark.parametrize("tls", [None, ServerTls("c", "k", "a")])
def test_the_stack_keeps_the_setting(tls: ServerTls | None) -> None:
    config = StackConfig(tls=tls)
    assert StackConfig.decode(config.encode(), None) == config
