"""A gateway on its own: joins a Ray cluster and a store that others run."""

import asyncio
import json
import os
import signal
import tempfile
from dataclasses import dataclass

from kvstrata.cluster.gateway_server import salt_from_environment, start_gateway
from kvstrata.cluster.model_check import load_served_model
from kvstrata.cluster.workers import RayWorkers, Replicas, connect, deploy, is_deployed
from kvstrata.engine.model import Model
from kvstrata.prefill_node.worker import WorkerConfig
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials, ServerTls
from kvstrata.protos.errors import ConfigurationError
from kvstrata.protos.logs import configure_logging
from kvstrata.protos.tracing import configure_tracing, flush_tracing

STOP_GRACE_S = 30.0
INFO_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What ``kvstrata gateway`` is told; fields as its options."""

    store_address: str
    ray_address: str
    listen: str
    model: str | None
    dtype: str
    prefill_workers: int
    decode_workers: int
    tls: ServerTls | None = None
    store_credentials: ClientCredentials = ANONYMOUS
    store_admin_address: str = ""
    tenants: str = ""
    metrics_listen: str = ""
    adapter: str | None = None


def run_gateway(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT; prints one JSON line when it serves.

    Raises:
        ConfigurationError: The Ray cluster cannot be joined, the model cannot be served, or the
            port is taken.
    """
    configure_logging()
    configure_tracing("kvstrata-gateway")
    model = load_served_model(config.model, config.dtype, config.adapter)
    # Ray puts the driver's folder on its workers' paths: an empty one shadows nothing.
    with tempfile.TemporaryDirectory(prefix="kvs-") as folder:
        os.chdir(folder)
        try:
            connect(config.ray_address)
        except ConnectionError as error:
            raise ConfigurationError(
                f"cannot join the Ray cluster at {config.ray_address!r}: {error}",
                "start one with `ray start --head`, or use `kvstrata up`",
            ) from error
        workers = RayWorkers() if is_deployed() else _deploy(config)
        asyncio.run(_serve(config, workers, model))
        flush_tracing()
        os.chdir("/")


def _deploy(config: GatewayConfig) -> RayWorkers:
    return deploy(
        WorkerConfig(
            config.store_address,
            config.model,
            config.dtype,
            warm_up=True,
            credentials=config.store_credentials,
            adapter=config.adapter,
        ),
        Replicas(config.prefill_workers, config.decode_workers),
    )


async def _serve(config: GatewayConfig, workers: RayWorkers, model: Model) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    info = (await asyncio.wait_for(workers.info(), INFO_TIMEOUT_S))["decode"]
    if info.fingerprint != model.fingerprint:
        raise ConfigurationError(
            f"the workers serve {info.model}, not {model.name} in {config.dtype}",
            "name their model and dtype, or stop them first",
        )
    gateway = await start_gateway(
        config.listen,
        store_address=config.store_address,
        workers=workers,
        info=info,
        tokenizer=model.tokenizer,
        salt=salt_from_environment(),
        tls=config.tls,
        store_credentials=config.store_credentials,
        store_admin_address=config.store_admin_address,
        tenants=config.tenants,
        metrics_listen=config.metrics_listen,
    )
    if config.tenants:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, gateway.tenants.reload)
    ready = {"event": "ready", "address": gateway.address}
    if gateway.metrics_address:
        ready["metrics_address"] = gateway.metrics_address
    print(json.dumps(ready), flush=True)
    await stopping.wait()
    await gateway.stop(STOP_GRACE_S)
