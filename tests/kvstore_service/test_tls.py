"""The store behind TLS: who gets in, and who does not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.server import start_store
from kvstrata.kvstore_service.testing import LocalStore, free_port, sample_block
from kvstrata.protos.credentials import ClientCredentials, ServerTls
from kvstrata.protos.errors import ConfigurationError, UnavailableError
from kvstrata.protos.identity import ScopeDigest
from kvstrata.protos.service import open_channel
from tests.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def other(tmp_path: Path) -> Authority:
    """An authority that the server does not know."""
    (tmp_path / "other").mkdir()
    return Authority(tmp_path / "other")


async def put_and_get(address: str, credentials: ClientCredentials, scope: ScopeDigest) -> None:
    key, frames = sample_block(scope)
    async with StoreClient(address, timeout_s=3, credentials=credentials) as client:
        assert (await client.put([(key, frames)]))[0].outcome in ("committed", "exists")
        (got,) = [g async for g in client.get(scope, [key.block_hash], [1])]
        assert got.frame is not None


@pytest.mark.parametrize("mutual", [False, True], ids=["tls", "mutual"])
async def test_only_the_right_certificates_get_in(
    authority: Authority, other: Authority, scope: ScopeDigest, mutual: bool
) -> None:
    right = authority.client(mutual=mutual)
    wrong = {
        "plaintext": ClientCredentials(),
        "trusts another authority": ClientCredentials(other.ca, right.cert, right.key),
    }
    if mutual:
        wrong["shows no certificate"] = ClientCredentials(authority.ca)
        wrong["shows another authority's"] = ClientCredentials(authority.ca, *other.issue("x"))
    async with LocalStore(StoreConfig(tls=authority.server(mutual=mutual))) as store:
        await put_and_get(store.address, right, scope)
        for credentials in wrong.values():
            with pytest.raises(UnavailableError):
                await put_and_get(store.address, credentials, scope)
        await put_and_get(store.address, right, scope)


async def test_a_tls_client_does_not_talk_to_a_plaintext_store(
    authority: Authority, scope: ScopeDigest
) -> None:
    async with LocalStore() as store:
        with pytest.raises(UnavailableError):
            await put_and_get(store.address, authority.client(), scope)


async def test_a_certificate_for_another_host_is_refused(
    authority: Authority, scope: ScopeDigest
) -> None:
    async with LocalStore(StoreConfig(tls=authority.server())) as store:
        with pytest.raises(UnavailableError):
            await put_and_get(f"localhost:{store.running.port}", authority.client(), scope)


async def test_mutual_tls_holds_for_health_and_reflection_too(authority: Authority) -> None:
    async with (
        LocalStore(StoreConfig(tls=authority.server(mutual=True))) as store,
        open_channel(store.address, authority.client()) as bare,
        open_channel(store.address, authority.client(mutual=True)) as shown,
    ):
        request = health_pb2.HealthCheckRequest()
        with pytest.raises(grpc.aio.AioRpcError):
            await health_pb2_grpc.HealthStub(bare).Check(request, timeout=3)
        assert (await health_pb2_grpc.HealthStub(shown).Check(request, timeout=20)).status == 1


async def test_a_bad_file_is_told_before_the_port_opens(authority: Authority) -> None:
    cert, _ = authority.issue("one")
    _, key = authority.issue("two")
    listen = f"127.0.0.1:{free_port()}"
    with pytest.raises(ConfigurationError, match=r"two\.key is not the key"):
        await start_store(StoreConfig(listen=listen, tls=ServerTls(cert, key)))
    running = await start_store(StoreConfig(listen=listen))
    await running.stop(0)


async def test_the_command_takes_certificates_and_logs_no_key(
    authority: Authority, scope: ScopeDigest
) -> None:
    tls = authority.server(mutual=True)
    options = ("--tls-cert", tls.cert, "--tls-key", tls.key, "--tls-client-ca", tls.client_ca)
    command = [sys.executable, "-P", "-m", "kvstrata.kvstore_service", "--log-level", "DEBUG"]
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GRPC_VERBOSITY": "debug"},
    )
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    await put_and_get(ready["address"], authority.client(mutual=True), scope)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (0, "")
    secret = Path(tls.key).read_text().splitlines()[1]
    assert secret not in err
    assert "PRIVATE KEY" not in err
