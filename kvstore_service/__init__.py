"""The store: compressed KV blocks in tiers behind one gRPC service, and the client to reach it.

Bytes in, bytes out: this room never imports torch and never unpickles. Names are imported on first
use, so that a node that only needs the client does not load the server or Redis.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvstrata.kvstore_service.client import (
        FetchedStratum,
        LookupResult,
        PutOutcome,
        StoreClient,
    )
    from kvstrata.kvstore_service.config import StoreConfig, StoreLimits
    from kvstrata.kvstore_service.server import RunningStore, start_store

__all__ = [
    "FetchedStratum",
    "LookupResult",
    "PutOutcome",
    "RunningStore",
    "StoreClient",
    "StoreConfig",
    "StoreLimits",
    "start_store",
]

_MODULES = {
    "FetchedStratum": "client",
    "LookupResult": "client",
    "PutOutcome": "client",
    "RunningStore": "server",
    "StoreClient": "client",
    "StoreConfig": "config",
    "StoreLimits": "config",
    "start_store": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
