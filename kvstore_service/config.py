"""The store's settings."""

from dataclasses import dataclass

from kvstrata.protos.credentials import ServerTls
from kvstrata.protos.errors import ConfigurationError

MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What one request may ask for; each is checked before anything is allocated.

    Attributes:
        max_block_bytes: Frames of one block together.
        max_hashes: Blocks that one Lookup, Get, Pin, Unpin, Delete or Evict may name.
        max_queries: Queries of one Retrieve.
        max_wait_ms: Longest wait of a Get, and longest time of a Retrieve; longer ones are cut.
        max_pin_ttl_ms: Longest pin; longer ones are cut.
        max_lease_ms: Longest lease of a Lookup; longer ones are cut.
        max_keep_ms: Longest time that a hint of retention holds; longer ones are cut.
        max_in_flight_bytes: Bytes of blocks being received, over all streams.
        max_page_size: Blocks on one page of ListBlocks.
        put_idle_s: A Put stream with a block half sent and silent for so long is ended.
    """

    max_block_bytes: int = 256 * MIB
    max_hashes: int = 16_384
    max_queries: int = 256
    max_wait_ms: int = 30_000
    max_pin_ttl_ms: int = 600_000
    max_lease_ms: int = 60_000
    max_keep_ms: int = 3_600_000
    max_in_flight_bytes: int = 512 * MIB
    max_page_size: int = 1000
    put_idle_s: float = 30.0


@dataclass(frozen=True, slots=True)
class StoreConfig:
    """Everything one store process is told at start.

    Attributes:
        listen: ``host:port``; port 0 takes a free one.
        dram_bytes: Bound of the dram tier.
        redis_url: The shared tier; none without it.
        redis_bytes: Bound of the shared tier; give every process that shares a Redis the same.
        ttl_s: How long an unused block stays in Redis.
        redis_timeout_s: Time limit of one Redis command.
        redis_connections: Bound of the connection pool.
        redis_probe_s: Pause between probes while Redis is down.
        ssd_path: Folder of the ssd tier, on a local disk, of this process alone; none without it.
        ssd_bytes: Bound of the ssd tier.
        object_url: ``s3://``, ``gs://``, ``az://`` or ``file://`` of the object tier; none without
            it. Credentials are the environment's.
        object_bytes: Bound of the object tier; give every process that shares the URL the same.
        object_timeout_s: Time limit of one request to the object store.
        representative_bytes: Bound on the memory of what Retrieve remembers of blocks.
        drain_s: How long stopping waits for running calls.
        limits: What one request may ask for.
        tls: Of every port; plaintext without it.
        tenants: File of tenants; without it everybody is one tenant and needs no token.
        key_file: Master keys for encryption at rest, see ``key_ring``; without it
            ``KVSTRATA_KEYS`` of the environment, or those of tenants, or no encryption.
        admin_listen: ``host:port`` of Admin; the same port as all else without it.
        metrics_listen: ``host:port`` for Prometheus; none without it.
    """

    listen: str = "127.0.0.1:0"
    dram_bytes: int = GIB
    redis_url: str | None = None
    redis_bytes: int = 4 * GIB
    ttl_s: float = 86_400.0
    redis_timeout_s: float = 1.0
    redis_connections: int = 16
    redis_probe_s: float = 1.0
    ssd_path: str | None = None
    ssd_bytes: int = 16 * GIB
    object_url: str | None = None
    object_bytes: int = 64 * GIB
    object_timeout_s: float = 10.0
    representative_bytes: int = 256 * MIB
    drain_s: float = 10.0
    limits: StoreLimits = StoreLimits()
    tls: ServerTls | None = None
    tenants: str = ""
    key_file: str = ""
    admin_listen: str = ""
    metrics_listen: str = ""

    def validate(self) -> None:
        """Raise ``ConfigurationError`` that names every bad value."""
        positive = (
            "dram_bytes",
            "redis_bytes",
            "ttl_s",
            "redis_timeout_s",
            "redis_connections",
            "redis_probe_s",
            "ssd_bytes",
            "object_bytes",
            "object_timeout_s",
            "representative_bytes",
        )
        bad = [f"{name}={getattr(self, name)}" for name in positive if getattr(self, name) <= 0]
        bad += [
            f"limits.{name}={getattr(self.limits, name)}"
            for name in StoreLimits.__slots__
            if getattr(self.limits, name) <= 0
        ]
        listens = ("listen", "admin_listen", "metrics_listen")
        for name in [name for name in listens if name == "listen" or getattr(self, name)]:
            host, colon, port = getattr(self, name).rpartition(":")
            if not colon or not host or not port.isdecimal() or int(port) > 65_535:
                bad.append(f"{name}={getattr(self, name)!r}")
        if self.drain_s < 0:
            bad.append(f"drain_s={self.drain_s}")
        if self.limits.max_in_flight_bytes < self.limits.max_block_bytes:
            bad.append("limits.max_in_flight_bytes below limits.max_block_bytes")
        if bad:
            raise ConfigurationError(
                f"bad store settings: {', '.join(bad)}",
                "sizes and times must be positive, listen must be host:port",
            )
