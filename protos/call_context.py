"""Who is being served: what counters, logs and spans say of the call that runs.

A server sets it once per call, in the call's own asyncio task; the tasks that the call starts
inherit it. Nothing is decided by it: who may do what is decided by credentials alone.
"""

from contextvars import ContextVar

DEFAULT_TENANT = "default"

tenant: ContextVar[str] = ContextVar("kvstrata_tenant", default=DEFAULT_TENANT)
"""Name of the caller's tenant."""

request_id: ContextVar[str] = ContextVar("kvstrata_request_id", default="")
"""The request of a user that this work is part of; empty where there is none."""
