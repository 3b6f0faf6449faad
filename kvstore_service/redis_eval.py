"""Running Lua scripts by their hash; sent whole only where Redis does not know them yet."""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

from redis.exceptions import NoScriptError, ResponseError

from kvstrata.kvstore_service.redis_connection import RedisConnection
from kvstrata.protos.errors import CapacityError


def script_command(script: str, keys: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """Return the command of a script; its reply is ``NoScriptError`` if Redis does not know it."""
    return ("EVALSHA", _sha(script), len(keys), *keys, *args)


async def run_script(
    connection: RedisConnection, script: str, keys: Sequence[Any], args: Sequence[Any]
) -> Any:
    """Return what a script returns.

    Raises:
        TierUnavailableError: Redis is down.
        CapacityError: Redis is out of memory.
    """
    async with connection.use() as redis:
        try:
            try:
                return await redis.evalsha(_sha(script), len(keys), *keys, *args)
            except NoScriptError:
                return await redis.eval(script, len(keys), *keys, *args)
        except ResponseError as error:
            if "OOM" in str(error):
                raise CapacityError("redis is out of memory", tier="redis") from error
            raise


@functools.cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
