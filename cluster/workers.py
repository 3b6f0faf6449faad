"""The prefill and decode nodes as Ray Serve deployments, and how the gateway calls them.

KV never travels through Ray: a call carries token ids and settings, its answer tokens and a report.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import RayServeException

from kvstrata.decode_node.node import DecodeNode
from kvstrata.prefill_node.node import PrefillNode
from kvstrata.prefill_node.task import Task
from kvstrata.prefill_node.worker import WorkerConfig, WorkerInfo
from kvstrata.protos.errors import DeadlineError, KVStrataError
from kvstrata.protos.inference_pb2 import GenerateReply

PREFILL_APP, DECODE_APP = "kvstrata-prefill", "kvstrata-decode"
MAX_ONGOING_REQUESTS = 256


class WorkerLostError(Exception):
    """The node that worked on a request died or cannot be reached; the request itself is fine."""


class Workers(Protocol):
    """What the gateway needs of the nodes."""

    def prefill(self, task: Task) -> AsyncGenerator[GenerateReply]:
        """Publish the prompt's blocks: yields at most one token, and in the end the report.

        Closing the iterator cancels the work.

        Raises:
            WorkerLostError: The node died.
            KVStrataError: What the node raised.
        """
        ...

    def decode(self, task: Task) -> AsyncGenerator[GenerateReply]:
        """Stream tokens; closing the iterator cancels the work. Errors as for ``prefill``."""
        ...


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many workers of each kind to run, and what each is given."""

    prefill: int = 1
    decode: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0


def deploy(config: WorkerConfig, replicas: Replicas) -> "RayWorkers":
    """Start the deployments on the connected Ray cluster and wait until every worker is ready."""
    options: dict[str, Any] = {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "ray_actor_options": {"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        "health_check_period_s": 2,
        "health_check_timeout_s": 60,
        "graceful_shutdown_timeout_s": 5,
    }
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    serve.start(proxy_location="Disabled")
    serve.run_many(
        [
            serve.RunTarget(
                serve.deployment(node, name=name, num_replicas=count, **options).bind(config),
                name=name,
                route_prefix=None,
            )
            for node, name, count in (
                (PrefillNode, PREFILL_APP, replicas.prefill),
                (DecodeNode, DECODE_APP, replicas.decode),
            )
        ]
    )
    return RayWorkers()


def is_deployed() -> bool:
    """Return whether the connected Ray cluster already runs the deployments."""
    return {PREFILL_APP, DECODE_APP} <= set(serve.status().applications)


class RayWorkers:
    """Calls the deployments of the connected Ray cluster."""

    def __init__(self) -> None:
        self._prefill = serve.get_app_handle(PREFILL_APP)
        self._decode = serve.get_app_handle(DECODE_APP)

    async def info(self) -> dict[str, WorkerInfo]:
        """Return what a node of each kind serves."""
        return {
            "prefill": await self._prefill.info.remote(),
            "decode": await self._decode.info.remote(),
        }

    def prefill(self, task: Task) -> AsyncGenerator[GenerateReply]:
        """See ``Workers.prefill``."""
        return _streamed(self._prefill.prefill, task)

    def decode(self, task: Task) -> AsyncGenerator[GenerateReply]:
        """See ``Workers.decode``."""
        return _streamed(self._decode.generate, task)


async def _streamed(method: Any, task: Task) -> AsyncGenerator[GenerateReply]:
    replies = method.options(stream=True).remote(task)
    try:
        while True:
            with translated(task):
                try:
                    reply = await asyncio.wait_for(anext(replies), task.remaining_s)
                except StopAsyncIteration:
                    return
            yield GenerateReply.FromString(reply)
    finally:
        replies.cancel()  # of no effect once all have come


@contextlib.contextmanager
def translated(task: Task) -> Iterator[None]:
    """Turn Ray's exceptions into ours: what the node raised, or that it is lost."""
    try:
        yield
    except KVStrataError as error:
        raise getattr(error, "cause", error) from None
    except TimeoutError as error:
        raise DeadlineError(
            "no answer within the request's deadline "
            f"({time.time() - task.deadline_unix_s:+.1f} s)",
            "raise the timeout or ask for fewer tokens",
        ) from error
    except (RayTaskError, TaskCancelledError):
        raise
    except (RayError, RayServeException) as error:
        raise WorkerLostError(f"{type(error).__name__}: {error}") from error


def connect(
    address: str | None, *, runtime_dir: str | None = None, num_cpus: int | None = None
) -> None:
    """Join the Ray cluster at ``address``, or start one of our own in ``runtime_dir``."""
    ray.init(
        address=address,
        namespace="kvstrata",
        log_to_driver=False,
        logging_level="error",
        **(
            {}
            if address
            else {
                "num_cpus": num_cpus,
                "include_dashboard": False,
                "_temp_dir": runtime_dir,
                # Loopback, but not by the name that Ray would turn into this machine's address.
                "_node_ip_address": "127.0.0.2",
                "object_store_memory": 128 << 20,
            }
        ),
    )
