"""The way to Redis: bounded connections and times; a breaker so that a dead Redis costs nothing."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from redis.exceptions import OutOfMemoryError, RedisError

from kvstrata.kvstore_service.redis_client import (
    ClientLimits,
    close_client,
    is_cluster,
    make_client,
)
from kvstrata.kvstore_service.redis_url import mask_url
from kvstrata.kvstore_service.redis_wire import Command, RedisWire
from kvstrata.kvstore_service.tier import TierUnavailableError
from kvstrata.protos.errors import CapacityError, ConfigurationError

logger = logging.getLogger(__name__)


class RedisConnection:
    """A client that fails within about ``timeout_s`` and then at once, until Redis answers again.

    After a failure nothing is sent but a PING every ``probe_s``; recovery needs nobody's help. At
    most ``max_connections`` commands run at a time, further ones queue.

    Attributes:
        is_cluster: Whether a command may only name keys of one slot.

    Args:
        url: See ``redis_client.parse_place``; its secrets reach no message and no log.
        timeout_s: Time limit of connecting and of each read and write.
        max_connections: Bound of the pool.
        probe_s: Pause between probes while Redis is down.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 1.0,
        max_connections: int = 16,
        probe_s: float = 1.0,
    ) -> None:
        self.masked_url = mask_url(url)
        self._probe_s = probe_s
        self.is_cluster = is_cluster(url)
        self._slots = asyncio.Semaphore(max_connections)
        self._probe: asyncio.Task[None] | None = None
        self._is_closed = False
        self._detail = ""
        try:
            self._redis = make_client(url, ClientLimits(timeout_s, max_connections))
        except (ValueError, TypeError):
            raise ConfigurationError(  # the cause may quote the password
                f"not a Redis URL: {self.masked_url}",
                "write redis://[user:password@]host:port/db, redis+cluster://host:port,host:port "
                "or redis+sentinel://host:port,host:port/service; rediss for TLS",
            ) from None
        self._wire: RedisWire | None = None
        if not self.is_cluster:
            self._wire = RedisWire(self._redis.connection_pool.make_connection, timeout_s)

    @property
    def detail(self) -> str:
        """Why Redis is taken for down; empty when it is not."""
        return self._detail

    async def check(self) -> None:
        """Raise ``ConfigurationError`` unless Redis answers now."""
        try:
            await self._redis.ping()
        except (RedisError, OSError) as error:
            raise ConfigurationError(
                f"Redis at {self.masked_url} cannot be used: {_reason(error)}",
                "start Redis, or correct the store's --redis-url, or leave it out",
            ) from None

    @contextlib.asynccontextmanager
    async def use(self) -> AsyncIterator[Any]:
        """Give the client for one command or pipeline.

        Raises:
            TierUnavailableError: Redis is down, or went down under this command.
            CapacityError: Redis is out of memory.
        """
        self._refuse_if_down()
        async with self._slots:
            self._refuse_if_down()
            try:
                yield self._redis
            except OutOfMemoryError as error:
                raise CapacityError(
                    "redis is out of memory",
                    "raise its maxmemory, or lower the store's --redis-bytes",
                    tier="redis",
                ) from error
            except (RedisError, OSError) as error:
                self._mark_down(_reason(error))
                raise self._down_error() from None

    async def exchange(self, commands: Sequence[Command]) -> list[Any]:
        """Return the reply of each command, error replies as such, after one round trip.

        The way for large values; the commands may run twice. Raises what ``use`` does.
        """
        async with self.use() as redis:
            if self._wire is not None:
                return await self._wire.exchange(commands)
            pipe = redis.pipeline(transaction=False)
            for command in commands:
                pipe.execute_command(*command)
            return list(await pipe.execute(raise_on_error=False))

    def _refuse_if_down(self) -> None:
        if self._detail:
            raise self._down_error()

    def _down_error(self) -> TierUnavailableError:
        return TierUnavailableError(
            f"redis does not answer: {self._detail}", f"check {self.masked_url}", tier="redis"
        )

    def _mark_down(self, reason: str) -> None:
        if not self._detail:
            extra = {"url": self.masked_url, "reason": reason}
            logger.warning("redis is down", extra=extra)
        self._detail = reason
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._probe_until_up())

    async def _probe_until_up(self) -> None:
        while not self._is_closed:  # the client may turn a cancellation into a time-out
            await asyncio.sleep(self._probe_s)
            with contextlib.suppress(RedisError, OSError):
                await self._redis.ping()
                break
        self._detail = ""
        logger.warning("redis is up again", extra={"url": self.masked_url})

    async def close(self) -> None:
        """Close every connection and stop probing. Idempotent."""
        self._is_closed = True
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        if self._wire is not None:
            await self._wire.close()
        with contextlib.suppress(RedisError, OSError):
            await close_client(self._redis)


def _reason(error: Exception) -> str:
    """Return the kind of failure and nothing that could quote a secret."""
    kind = type(error).__name__
    cause: Any = error.__cause__ or error
    number = getattr(cause, "strerror", None)
    return f"{kind}: {number}" if number else kind
