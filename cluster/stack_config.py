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
        adapter: Folder of a LoRA that is merged into the model; None for none.
        redis: Whether to use Redis at all.
        redis_url: An existing Redis; without it one is started, if a binary is found.
        dram_bytes: Bound of the store's dram tier.
        redis_bytes: Bound of the redis tier.
        ttl_s: How long an unused block stays in Redis.
        prefill_workers: Prefill nodes to run.
        decode_workers: Decode nodes to run.
        tenants: File of the gateway's tenants; without it everybody is one and needs no token.
        tls: Of the gateway's ports; plaintext without it. What is behind it keeps to the loopback.
        metrics_listen: ``host:port`` of the gateway's Prometheus metrics; none without it.
        store_metrics_listen: Of the store's.
        ssd_path: Folder of the store's ssd tier; none without it.
        ssd_bytes: Bound of the ssd tier.
        object_url: Of the store's object tier; none without it. Credentials are the environment's.
        object_bytes: Bound of the object tier.
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
    metrics_listen: str = ""
    store_metrics_listen: str = ""
    ssd_path: str = ""
    ssd_bytes: int = 16 << 30
    object_url: str = ""
    object_bytes: int = 64 << 30
    adapter: str | None = None

    def validate(self) -> None:
        """Raise ``ConfigurationError`` naming the first bad value."""
        for name in ("listen", "metrics_listen", "store_metrics_listen"):
            listen = getattr(self, name)
            host, _, port = listen.rpartition(":")
            if not listen and name != "listen":
                continue
            if not host or not port.isdecimal() or int(port) > 65_535:
                raise ConfigurationError(
                    f"{name} must be host:port, got {listen!r}", "use for example 127.0.0.1:0"
                )
        for name in (
            *("dram_bytes", "redis_bytes", "ssd_bytes", "object_bytes", "ttl_s"),
            *("prefill_workers", "decode_workers"),
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigurationError(
                    f"{name} must be positive and finite, got {getattr(self, name)}",
                    "correct the option",
                )
        if self.redis_url and not self.redis:
            raise ConfigurationError("--no-redis and --redis-url exclude each other", "drop one")

    def store_options(self) -> list[str]:
        """Return what the store is told of its tiers and ports, as options of its command."""
        options = [
            *("--dram", str(self.dram_bytes)),
            *("--redis-bytes", str(self.redis_bytes), "--ttl-s", str(self.ttl_s)),
        ]
        if self.ssd_path:
            options += ["--ssd-path", self.ssd_path, "--ssd", str(self.ssd_bytes)]
        if self.object_url:
            options += ["--object-url", self.object_url, "--object", str(self.object_bytes)]
        if self.store_metrics_listen:
            options += ["--metrics-listen", self.store_metrics_listen]
        return options

    def encode(self) -> str:
        """Return the settings as text for another process; not the Redis URL, a secret."""
        return json.dumps({**dataclasses.asdict(self), "redis_url": None})

    @classmethod
    def decode(cls, text: str, redis_url: str | None) -> "StackConfig":
        """Return the settings that ``encode`` wrote."""
        values = json.loads(text)
        tls = ServerTls(**values["tls"]) if values["tls"] else None
        return cls(**{**values, "redis_url": redis_url, "tls": tls})
