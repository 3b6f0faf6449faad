"""Both clients and both commands against a gateway behind mutual TLS."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvstrata.client import AsyncClient, Client
from kvstrata.client.kvctl import app as kvctl
from kvstrata.client.kvstrata import app as kvstrata
from kvstrata.protos.credentials import ClientCredentials
from kvstrata.protos.errors import ConfigurationError, UnavailableError
from tests.certificates import Authority
from tests.client.conftest import Gateway


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def gateway_tls(authority: Authority) -> AsyncIterator[Gateway]:
    double = Gateway()
    server = await double.serve(authority.server(mutual=True))
    yield double
    await server.stop(None)


async def test_both_clients_show_their_certificate_and_token(
    gateway_tls: Gateway, authority: Authority
) -> None:
    shown = authority.client(mutual=True)
    shown = ClientCredentials(shown.ca, shown.cert, shown.key, "t0ken")
    address = gateway_tls.address
    async with AsyncClient(address, timeout_s=10, credentials=shown) as client:
        assert (await client.generate("a b c")).text == "a b c"

    def blocking() -> str:
        with Client(address, timeout_s=10, credentials=shown) as client:
            assert client.model().name == "smollm2"
            return client.generate("a b").text

    assert await asyncio.to_thread(blocking) == "a b"
    assert [seen["authorization"] for seen in gateway_tls.metadata] == ["Bearer t0ken"] * 3


async def test_other_clients_are_refused(gateway_tls: Gateway, authority: Authority) -> None:
    for shown in (ClientCredentials(), authority.client()):
        async with AsyncClient(gateway_tls.address, timeout_s=2, credentials=shown) as client:
            with pytest.raises(UnavailableError):
                await client.generate("a")
    assert gateway_tls.requests == []


async def test_the_commands_take_options_and_variables(
    gateway_tls: Gateway, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTRATA_ADDRESS", gateway_tls.address)
    shown = authority.client(mutual=True)
    options = ["--tls-ca", shown.ca, "--tls-cert", shown.cert, "--tls-key", shown.key]
    run = CliRunner().invoke
    for app, command in (
        (kvctl, [*options, "health", "--json"]),
        (kvstrata, ["generate", "a b", "--json", *options]),
    ):
        found = await asyncio.to_thread(run, app, command)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout)
    for name, value in (("CA", shown.ca), ("CERT", shown.cert), ("KEY", shown.key)):
        monkeypatch.setenv(f"KVSTRATA_TLS_{name}", value)
    for app, command in ((kvctl, ["stats", "--json"]), (kvstrata, ["generate", "a"])):
        found = await asyncio.to_thread(run, app, command)
        assert found.exit_code == 0, found.output


def test_a_bad_file_is_told_by_the_commands_and_the_clients(tmp_path: Path) -> None:
    found = CliRunner().invoke(kvctl, ["--tls-ca", str(tmp_path / "none"), "stats"])
    assert found.exit_code == 2
    assert "cannot read" in found.stderr
    assert "hint:" in found.stderr
    with pytest.raises(ConfigurationError, match="cannot read"):
        Client("127.0.0.1:1", credentials=ClientCredentials(str(tmp_path)))
