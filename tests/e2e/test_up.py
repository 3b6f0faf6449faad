"""``kvstrata up``: what it prints, what it refuses, and that it leaves nothing behind."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image as PillowImage

from kvstrata.client import Client
from kvstrata.kvstore_service.client import StoreClient
from kvstrata.protos.identity import BlockHash, ScopeDigest
from tests.conftest import ROOT, Environment
from tests.engine.vision_families import picture, save_vision_model
from tests.stack import BIN, Stack

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(500)]


def refused(tmp_path: Path, *options: str, **env: str) -> str:
    """Return what ``kvstrata up`` says when it refuses to start."""
    done = subprocess.run(
        [BIN / "kvstrata", "up", *options],
        cwd=tmp_path,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_an_occupied_port_is_named_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        begin = time.monotonic()
        message = refused(tmp_path, "--listen", address)
    assert address in message
    assert "free port" in message
    assert time.monotonic() - begin < 30


def test_an_unreachable_redis_is_named_without_its_password(tmp_path: Path) -> None:
    url = "redis://:s3cret@127.0.0.1:1/0"
    message = refused(tmp_path, "--listen", "127.0.0.1:0", KVSTRATA_REDIS_URL=url)
    assert "127.0.0.1:1" in message
    assert "s3cret" not in message


def test_an_unknown_model_folder_is_named(tmp_path: Path) -> None:
    message = refused(tmp_path, "--listen", "127.0.0.1:0", "--no-redis", "--model", "no/such/model")
    assert "no/such/model" in message


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--listen", "nowhere"), "listen"),
        (("--listen", "127.0.0.1:99999"), "listen"),
        (("--dram-mib", "0"), "dram_bytes"),
        (("--decode-workers", "-1"), "decode_workers"),
        (("--no-redis", "--redis-url", "redis://127.0.0.1:1"), "--no-redis"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, tuple) else value,
)
def test_a_bad_option_is_named(tmp_path: Path, options: tuple[str, ...], named: str) -> None:
    assert named in refused(tmp_path, *options)


def test_without_redis_it_serves_from_dram_and_a_crash_leaves_nothing(tmp_path: Path) -> None:
    stack = Stack(tmp_path, "--no-redis")
    prompt = "The cache that never changes the answer. " * 40
    with Client(stack.address, timeout_s=180) as client:
        cold = client.generate(prompt, max_tokens=4)
        warm = client.generate(prompt, max_tokens=4)
    stats = stack.kvctl("stats")
    processes = stack.processes()
    assert cold.token_ids == warm.token_ids
    assert warm.cache.cached_tokens == warm.cache.shareable_tokens > 0
    assert list(stats["tiers"]) == ["dram"]
    stack.find("kvstrata.cluster.local_stack").kill()
    assert stack.stop() == 128 + 9
    assert stack.leftovers() == []
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert alive == []


def test_the_command_shows_pictures_and_videos_to_a_model_behind_ray(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    files = [tmp_path / "one.png", *(tmp_path / "clip" / f"{i}.png" for i in range(6))]
    for seed, path in enumerate(files):
        image = picture(seed)
        PillowImage.frombytes("RGB", (image.width, image.height), image.pixels).save(path)
    stack = Stack(
        tmp_path, "--no-redis", "--model", str(save_vision_model("llava", tmp_path / "m"))
    )
    command = [BIN / "kvstrata", "generate", "What is to be seen here? " * 4, "--json"]
    command += ["--image", files[0], "--image", tmp_path / "clip", "--preset", "exact"]
    command += ["--address", stack.address, "--max-tokens", "6"]
    cold, warm = (
        json.loads(subprocess.run(command, capture_output=True, text=True, timeout=120).stdout)
        for _ in range(2)
    )
    assert warm["token_ids"] == cold["token_ids"]
    assert cold["usage"]["prompt_tokens"] > 7 * 16
    assert cold["cache"]["cached_tokens"] == 0
    assert warm["cache"]["cached_tokens"] == cold["cache"]["shareable_tokens"] > 0
    assert stack.stop() == 0
    assert stack.leftovers() == []


async def ask_for_nothing(address: str) -> None:
    """Read a block that no tier holds."""
    async with StoreClient(address) as client:
        pieces = client.get(ScopeDigest(bytes(16)), [BlockHash(bytes(16))], [1])
        assert [piece.miss async for piece in pieces] == ["absent"]


def test_stats_of_a_running_service_have_the_figures_operators_need(stack: Stack) -> None:
    prompt = "Figures that operators need. " * 40
    with Client(stack.address, timeout_s=180) as client:
        client.generate(prompt, max_tokens=4)
        stack.evict("dram")
        client.generate(prompt, max_tokens=4)
    before = stack.kvctl("stats")["misses"].get("absent", 0)
    asyncio.run(ask_for_nothing(stack.store))
    stats = stack.kvctl("stats")
    assert stats["health"] == "ok"
    assert stats["hits"] > 0
    assert stats["misses"]["absent"] == before + 1
    for tier in ("dram", "redis"):
        assert stats["tiers"][tier]["healthy"]
        assert stats["tiers"][tier]["blocks"] > 0
        assert stats["tiers"][tier]["bytes"] > 0
        assert stats["tiers"][tier]["hits"] == stack.counter("hits_total", tier=tier)
    assert stats["tiers"]["redis"]["hits"] > 0
    listing = stack.kvctl("ls")
    assert listing


def listening(process: psutil.Process) -> list[tuple[str, int]]:
    return [
        (connection.laddr.ip, connection.laddr.port)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]


def test_our_servers_listen_on_loopback_and_ray_takes_no_strangers(stack: Stack) -> None:
    gateway_port = int(stack.address.rpartition(":")[2])
    ours = [
        *listening(stack.find("redis-server")),
        *listening(stack.find("kvstrata.kvstore_service")),
        *[at for at in listening(stack.find("local_stack")) if at[1] == gateway_port],
    ]
    assert len(ours) == 3
    for host, _ in ours:
        assert host.removeprefix("::ffff:").startswith("127.")
    port = listening(stack.find("gcs_server"))[0][1]
    join = f"import ray; ray.init(address='127.0.0.2:{port}', log_to_driver=False)"
    done = subprocess.run(
        [sys.executable, "-P", "-c", join], capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "ConnectionError" in done.stderr


@pytest.mark.long
def test_the_demo_runs_from_the_wheel_beside_the_package_kernels(
    new_wheel_venv: Environment, tmp_path: Path
) -> None:
    """The installed wheel alone, in an environment with Hugging Face's `kernels`, elsewhere."""
    new_wheel_venv.pip("install", "--no-deps", "-c", ROOT / "constraints.txt", "kernels")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [new_wheel_venv.bin / "kvstrata", "demo", "--no-quality", "--max-tokens", "8"],
        cwd=tmp_path,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text())
    cold, *warm = figures["sessions"]
    assert cold["cached_tokens"] == 0
    for session in warm:
        assert session["cached_tokens"] >= 0.95 * session["shareable_tokens"]
        assert session["ttft_ms"] < cold["ttft_ms"]
    assert figures["ratio_to_bf16"] >= 3.3
    assert (tmp_path / "demo" / "timeline.png").stat().st_size > 10_000
