"""Starting, stopping and the command, as real processes."""

import json
import os
import signal
import subprocess
import sys

import pytest

import kvstrata.kvstore_service as room
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
from kvstrata.kvstore_service.server import start_store
from kvstrata.kvstore_service.testing import LocalStore, free_port, sample_block
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.identity import ScopeDigest
from kvstrata.protos.sizes import parse_size


def python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


async def test_the_command_serves_until_a_signal(scope: ScopeDigest) -> None:
    process = python("-m", "kvstrata.kvstore_service", "--dram", "64MiB")
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready["event"] == "ready"
    async with StoreClient(ready["address"]) as client:
        assert (await client.put([sample_block(scope)]))[0].outcome == "committed"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, out) == (0, "")
    assert "store stopped" in err


def test_a_wrong_redis_is_told_without_its_password_and_with_a_remedy() -> None:
    url = f"redis://:s3cret@127.0.0.1:{free_port()}/0"
    process = python("-m", "kvstrata.kvstore_service", KVSTRATA_REDIS_URL=url)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2
    assert out == ""
    assert "redis://***@127.0.0.1" in err
    assert "hint:" in err
    assert "s3cret" not in err


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("kvstrata.kvstore_service.server", ("torch", "transformers", "scipy")),
        ("kvstrata.kvstore_service.client", ("torch", "redis", "hiredis", "typer")),
    ],
)
def test_imports_stay_small(module: str, absent: tuple[str, ...]) -> None:
    code = (
        f"import sys, asyncio, {module}\n"
        "if 'server' in sys.argv[1]:\n"
        "    from kvstrata.kvstore_service import StoreConfig, start_store\n"
        "    async def main():\n"
        "        await (await start_store(StoreConfig())).stop(0)\n"
        "    asyncio.run(main())\n"
        f"print([name for name in {absent!r} if name in sys.modules])"
    )
    out, err = python("-c", code, module).communicate(timeout=240)
    assert out.strip() == "[]", err


async def test_an_occupied_port_is_told_with_a_remedy() -> None:
    async with LocalStore() as store:
        with pytest.raises(ConfigurationError, match="cannot listen") as caught:
            await start_store(StoreConfig(listen=store.address))
    assert "free port" in caught.value.remedy


def test_every_bad_setting_is_named() -> None:
    config = StoreConfig(listen="nowhere", dram_bytes=0, ttl_s=-1, limits=StoreLimits(max_hashes=0))
    with pytest.raises(ConfigurationError) as caught:
        config.validate()
    for name in ("listen='nowhere'", "dram_bytes=0", "ttl_s=-1", "limits.max_hashes=0"):
        assert name in caught.value.message


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 << 30), ("512M", 512 << 20), ("1048576", 1 << 20), ("1.5 kb", 1536), ("0", 0)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "-1", "2 apples", "1e9", "GiB", "9" * 400, "٢"])
def test_other_texts_are_no_sizes(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_size(text)


def test_public_names_are_sorted_and_importable() -> None:
    assert room.__all__ == sorted(room.__all__)
    assert len(room.__all__) <= 10
    assert all(getattr(room, name) is not None for name in room.__all__)
    with pytest.raises(AttributeError):
        room.nothing  # noqa: B018
