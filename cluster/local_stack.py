"""The whole service on one machine: Redis, store, Ray with its workers, gateway.

Run by ``supervisor.supervise`` as ``python -m kvstrata.cluster.local_stack RUNTIME_DIR
SUPERVISOR_PID CONFIG``; it prints one JSON line on stdout when it serves, progress on stderr, and
ends on SIGTERM.
"""

import asyncio
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from kvstrata.cluster.processes import check_listen, service_tenant, start_redis, start_store
from kvstrata.cluster.stack_config import StackConfig
from kvstrata.cluster.supervisor import adopt_orphans, die_with_parent, end_descendants
from kvstrata.kvstore_service.tenants import read_tenants
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials
from kvstrata.protos.errors import ConfigurationError, KVStrataError
from kvstrata.protos.logs import LEVEL_VARIABLE, configure_logging
from kvstrata.protos.tracing import configure_tracing, flush_tracing

STOP_GRACE_S = 5.0
START_TIMEOUT_S = 600.0

logger = logging.getLogger(__name__)


class Progress:
    """Tells on stderr which step runs and how long it took."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @contextlib.contextmanager
    def step(self, text: str) -> Any:
        """Show a spinner while the body runs, then the time it took."""
        begin = time.perf_counter()
        with self._console.status(text):
            yield
        self._console.print(
            f"  {text} [dim]{time.perf_counter() - begin:.1f} s[/dim]", highlight=False
        )


async def serve(config: StackConfig, runtime: Path) -> None:
    """Start everything, announce it, and wait for SIGTERM."""
    stopping = asyncio.Event()
    listen_for_signals(stopping)
    async with contextlib.AsyncExitStack() as cleanup:
        starting = asyncio.ensure_future(_start(config, runtime, cleanup))
        stopped = asyncio.ensure_future(stopping.wait())
        await asyncio.wait([starting, stopped], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await starting
            return
        listen_for_signals(stopping)  # again: Ray has put its own handlers in their place
        print(json.dumps({"event": "ready", **starting.result()}), flush=True)
        await stopped


def listen_for_signals(stopping: asyncio.Event) -> None:
    """Set ``stopping`` on SIGTERM or SIGINT, from now on."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        loop.add_signal_handler(number, stopping.set)


async def _start(
    config: StackConfig, runtime: Path, cleanup: contextlib.AsyncExitStack
) -> dict[str, Any]:
    check_listen(config.listen)
    if config.tenants:
        read_tenants(config.tenants)  # a bad file ends it before anything is started
    progress = Progress()
    pids: dict[str, int] = {}
    redis_url = config.redis_url
    if config.redis and redis_url is None:
        with progress.step("Redis"):
            redis, redis_url = await start_redis(runtime, config.redis_bytes)
        cleanup.push_async_callback(redis.stop)
        pids["redis"] = redis.pid
    store_tenants, credentials = service_tenant(runtime) if config.tenants else ("", ANONYMOUS)
    with progress.step("store"):
        tenancy = ("--tenants", store_tenants) if store_tenants else ()
        options = [*config.store_options(), *tenancy]
        store, listens = await start_store(runtime, options, redis_url)
        store_address = listens["address"]
    cleanup.push_async_callback(store.stop)
    pids["store"] = store.pid
    with progress.step("model"):
        from kvstrata.cluster.model_check import load_served_model

        model = await asyncio.to_thread(
            load_served_model, config.model, config.dtype, config.adapter
        )
        tokenizer = model.tokenizer
    with progress.step("Ray and workers"):
        workers, infos = await _start_workers(config, runtime, store_address, credentials)
    pids |= {kind: info.pid for kind, info in infos.items()}
    from kvstrata.cluster.gateway_server import salt_from_environment, start_gateway

    with progress.step("gateway"):
        gateway = await start_gateway(
            config.listen,
            store_address=store_address,
            workers=workers,
            info=infos["decode"],
            tokenizer=tokenizer,
            salt=salt_from_environment(),
            tls=config.tls,
            store_credentials=credentials,
            tenants=config.tenants,
            metrics_listen=config.metrics_listen,
        )
    cleanup.push_async_callback(gateway.stop, STOP_GRACE_S)
    return {
        "address": gateway.address,
        "store": store_address,
        "redis_port": int(redis_url.rpartition(":")[2].partition("/")[0])
        if redis_url and "redis" in pids
        else None,
        "model": infos["decode"].model,
        "pids": pids,
        **({"metrics": gateway.metrics_address} if gateway.metrics_address else {}),
        **({"store_metrics": listens["metrics_address"]} if "metrics_address" in listens else {}),
    }


async def _start_workers(
    config: StackConfig, runtime: Path, store_address: str, credentials: ClientCredentials
) -> tuple[Any, Any]:
    from kvstrata.cluster import workers
    from kvstrata.prefill_node.worker import WorkerConfig

    replicas = workers.Replicas(config.prefill_workers, config.decode_workers)

    def deploy() -> workers.RayWorkers:
        num_cpus = max(os.cpu_count() or 1, config.prefill_workers + config.decode_workers + 1)
        workers.connect(None, runtime_dir=str(runtime / "ray"), num_cpus=num_cpus)
        worker_config = WorkerConfig(
            store_address,
            config.model,
            config.dtype,
            warm_up=True,
            credentials=credentials,
            adapter=config.adapter,
        )
        return workers.deploy(worker_config, replicas)

    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            running = await asyncio.to_thread(deploy)
            return running, await running.info()
    except TimeoutError as error:
        raise ConfigurationError(
            f"the workers were not ready after {START_TIMEOUT_S:.0f} s",
            "look at the machine's load",
        ) from error
    except RuntimeError as error:
        raise ConfigurationError(
            f"the workers did not start: {error}", "see its message"
        ) from error


def silence_stderr() -> None:
    """Send what this process still writes to stderr nowhere, native code's output too."""
    sys.stderr.flush()
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())


def main(runtime: Path, supervisor: int, config: StackConfig) -> int:
    """Serve until told to stop; return the exit status."""
    adopt_orphans()
    die_with_parent(supervisor)
    configure_logging(os.environ.get(LEVEL_VARIABLE) or "WARNING")
    configure_tracing("kvstrata-gateway")
    # Ray puts this folder on every worker's path: an empty one shadows nothing.
    (runtime / "cwd").mkdir()
    os.chdir(runtime / "cwd")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(runtime / "inductor"))
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # Ray's own ports cannot be kept to the loopback, so nobody may talk to them without this token.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    status = 0
    try:
        asyncio.run(serve(config, runtime))
    except KVStrataError as error:
        print(error.describe(), file=sys.stderr)
        status = 2
    finally:
        flush_tracing()
        silence_stderr()  # Ray's core, in this process, complains of each of its processes' end
        end_descendants()
        if os.getppid() != supervisor:
            shutil.rmtree(runtime, ignore_errors=True)
    return status


if __name__ == "__main__":
    settings = StackConfig.decode(sys.argv[3], os.environ.pop("KVSTRATA_REDIS_URL", None))
    exit_status = main(Path(sys.argv[1]), int(sys.argv[2]), settings)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_status)  # Ray's own shutdown at exit would wait for processes that are gone
