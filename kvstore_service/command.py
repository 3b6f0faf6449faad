"""The ``store`` command: one store process, until it is told to stop."""

import asyncio
import json
import logging
import os
import signal
import sys
from typing import Annotated

import typer

from kvstrata.kvstore_service.config import StoreConfig
from kvstrata.kvstore_service.server import start_store
from kvstrata.protos.credentials import server_tls
from kvstrata.protos.errors import KVStrataError
from kvstrata.protos.heap import keep_freed_memory
from kvstrata.protos.logs import configure_logging
from kvstrata.protos.sizes import parse_size
from kvstrata.protos.tracing import configure_tracing, flush_tracing

CLOSE_S = 30.0  # what closing the tiers may take after draining

logger = logging.getLogger(__name__)

LogLevel = Annotated[
    str,
    typer.Option(envvar="KVSTRATA_LOG_LEVEL", help="DEBUG, INFO, WARNING or ERROR; default INFO."),
]
LogFormat = Annotated[
    str, typer.Option(envvar="KVSTRATA_LOG_FORMAT", help="text or json: an object a line.")
]


def main(
    listen: Annotated[
        str, typer.Option(help="host:port; port 0 takes a free one.")
    ] = "127.0.0.1:0",
    dram: Annotated[str, typer.Option(help="Bound of the dram tier, such as 2GiB.")] = "1GiB",
    redis_url: Annotated[
        str,
        typer.Option(
            envvar="KVSTRATA_REDIS_URL",
            show_envvar=True,
            help="Shared tier. Prefer the environment variable: command lines are visible.",
        ),
    ] = "",
    redis_bytes: Annotated[str, typer.Option(help="Bound of the shared tier.")] = "4GiB",
    ttl_s: Annotated[
        float, typer.Option(help="How long an unused block stays in Redis.")
    ] = 86_400.0,
    ssd_path: Annotated[
        str, typer.Option(help="Folder of the ssd tier: empty, or one that a store has made.")
    ] = "",
    ssd: Annotated[str, typer.Option(help="Bound of the ssd tier, such as 100GiB.")] = "16GiB",
    object_url: Annotated[
        str,
        typer.Option(
            help="Object tier: s3://bucket/prefix, gs://, az:// or file:///folder. "
            "Credentials come from the environment only."
        ),
    ] = "",
    object_: Annotated[
        str, typer.Option("--object", help="Bound of the object tier, such as 1TiB.")
    ] = "64GiB",
    drain_s: Annotated[
        float, typer.Option(help="How long stopping waits for running calls.")
    ] = 10.0,
    tls_cert: Annotated[str, typer.Option(help="The port's certificate, PEM: TLS.")] = "",
    tls_key: Annotated[str, typer.Option(help="Its private key, PEM.")] = "",
    tls_client_ca: Annotated[
        str, typer.Option(help="Admit only clients with a certificate of this CA: mutual TLS.")
    ] = "",
    tenants: Annotated[
        str, typer.Option(help="File of tenants, TOML; SIGHUP reads it again. See the README.")
    ] = "",
    key_file: Annotated[
        str,
        typer.Option(
            help="Master keys, TOML: blocks outside this process's memory are encrypted. SIGHUP "
            "reads it again. Or KVSTRATA_KEYS, as name:hex."
        ),
    ] = "",
    admin_listen: Annotated[
        str, typer.Option(help="host:port of Admin alone; default: beside all else.")
    ] = "",
    metrics_listen: Annotated[
        str, typer.Option(help="host:port of Prometheus metrics; default: none.")
    ] = "",
    log_level: LogLevel = "",
    log_format: LogFormat = "",
) -> None:
    """Run a store until SIGTERM or SIGINT. One JSON line says when it serves; logs go to stderr."""
    keep_freed_memory()
    try:
        configure_logging(log_level, log_format)
        configure_tracing("kvstrata-store")
        config = StoreConfig(
            listen=listen,
            dram_bytes=parse_size(dram),
            redis_url=redis_url or None,
            redis_bytes=parse_size(redis_bytes),
            ttl_s=ttl_s,
            ssd_path=ssd_path or None,
            ssd_bytes=parse_size(ssd),
            object_url=object_url or None,
            object_bytes=parse_size(object_),
            drain_s=drain_s,
            tls=server_tls(tls_cert, tls_key, tls_client_ca),
            tenants=tenants,
            key_file=key_file,
            admin_listen=admin_listen,
            metrics_listen=metrics_listen,
        )
        asyncio.run(serve_until_stopped(config))
        flush_tracing()
    except KVStrataError as error:
        print(error.describe(), file=sys.stderr)
        raise typer.Exit(2) from None


async def serve_until_stopped(config: StoreConfig) -> None:
    """Serve until a signal, then stop gracefully; a second signal does not hurry it."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    running = await start_store(config)
    loop.add_signal_handler(signal.SIGHUP, running.reload)
    ready = {"event": "ready", "address": running.address}
    if config.admin_listen:
        ready["admin_address"] = running.admin_address
    if config.metrics_listen:
        ready["metrics_address"] = running.metrics_address
    print(json.dumps(ready), flush=True)
    await stopping.wait()
    try:
        async with asyncio.timeout(config.drain_s + CLOSE_S):
            await running.stop(config.drain_s)
    except TimeoutError:
        logger.error("store did not close in time", extra={"after_s": config.drain_s + CLOSE_S})
        sys.stderr.flush()
        os._exit(1)  # a thread that hangs in a system call would hold the exit up for ever
