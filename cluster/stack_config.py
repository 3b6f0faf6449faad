"""What ``kvstrata up`` is told."""

import dataclasses
import json
import math
from dataclasses import dataclass

from kvstrata.protos.credentials import ServerTls
from kvstrata.protos.errors import ConfigurationError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class StackConfig:
    """Settings of the local stack.

    Attributes:
        listen: Of the gateway, ``host:port``; port 0 takes a free one.
        model: Folder, hub id, or None for the default model.
        dtype: "auto", "float32", "bfloat16" or "float16".
        redis: Whether to use Redis at all.
        redis_url: An existing Redis; without it one is started, if a binary is found.
        dram_bytes: Bound of the store's dram tier.
        redis_bytes: Bound of the redis tier.
        ttl_s: How long an unused block stays in Redis.
        prefill_workers: Prefill nodes to run.
        decode_workers: Decode nodes to run.
        tenants: File of the gateway's tenants; without it everybody is one and needs no token.
        tls: Of the gateway's port; plaintext without it. What is behind it keeps to the loopback.
    """

    listen: str = "127.0.0.1:0"
    model: str | None = None
    dtype: str = "auto"
    redis: bool = True
    redis_url: str | None = None
    dram_bytes: int = 1024 * MIB
    redis_bytes: int = 4096 * MIB
    ttl_s: float = 86_400.0
    prefill_workers: int = 1
    decode_workers: int = 1
    tls: ServerTls | None = None
    tenants: str = ""

    def validate(self) -> None:
        """Raise ``ConfigurationError`` naming the first bad value."""
        host, _, port = self.listen.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65_535:
            raise ConfigurationError(
                f"listen must be host:port, got {self.listen!r}", "use for example 127.0.0.1:0"
            )
        for name in ("dram_bytes", "redis_bytes", "ttl_s", "prefill_workers", "decode_workers"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"{name} must be positive and finite, got {getattr(self, name)}",
                    "correct the option",
                )
        if self.redis_url and not self.redis:
            raise ConfigurationError("--no-redis and --redis-url exclude each other", "drop one")

    def encode(self) -> str:
        """Return the settings as text for another process; not the Redis URL, a secret."""
        return json.dumps({**dataclasses.asdict(self), "redis_url": None})

    @classmethod
    def decode(cls, text: str, redis_url: str | None) -> "StackConfig":
        """Return the settings that ``encode`` wrote."""
        values = json.loads(text)
        tls = ServerTls(**values["tls"]) if values["tls"] else None
        return cls(**{**values, "redis_url": redis_url, "tls": tls})
