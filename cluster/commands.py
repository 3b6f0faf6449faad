"""The subcommands ``kvstrata up`` and ``kvstrata gateway``."""

import os
from typing import Annotated

import typer

from kvstrata.cluster.stack_config import MIB, StackConfig
from kvstrata.cluster.supervisor import die_with_parent, supervise
from kvstrata.protos.credentials import (
    CA_VARIABLE,
    CERT_VARIABLE,
    KEY_VARIABLE,
    TOKEN_VARIABLE,
    ClientCredentials,
    ServerTls,
    server_tls,
)
from kvstrata.protos.logs import FORMAT_VARIABLE, LEVEL_VARIABLE, configure_logging
from kvstrata.protos.sizes import parse_size

TlsCert = Annotated[str, typer.Option(help="The gateway's certificate, PEM: TLS.")]
TlsKey = Annotated[str, typer.Option(help="Its private key, PEM.")]
TlsClientCa = Annotated[
    str, typer.Option(help="Admit only clients with a certificate of this CA: mutual TLS.")
]
TenantsFile = Annotated[
    str, typer.Option("--tenants", help="File of tenants, TOML; SIGHUP reads it again.")
]
MetricsListen = Annotated[
    str, typer.Option(help="host:port of the gateway's Prometheus metrics; default: none.")
]
LogLevel = Annotated[
    str,
    typer.Option(envvar=LEVEL_VARIABLE, help="DEBUG, INFO, WARNING or ERROR."),
]
LogFormat = Annotated[
    str, typer.Option(envvar=FORMAT_VARIABLE, help="text or json: an object a line.")
]
UpTenants = Annotated[
    str, typer.Option("--tenants", help="File of the gateway's tenants, TOML; see its README.")
]
Adapter = Annotated[
    str, typer.Option(help="Folder of a LoRA to serve the model with, of `kvstrata tune`.")
]
REDIS_VARIABLE = "KVSTRATA_REDIS_URL"
PARENT_VARIABLE = "KVSTRATA_PARENT"  # pid of a process that `up` shall not outlive


def up(
    listen: Annotated[str, typer.Option(help="Gateway's host:port; port 0 takes a free one.")] = (
        "127.0.0.1:50051"
    ),
    model: Annotated[str, typer.Option(help="Folder or hub id; default: SmolLM2-135M.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    adapter: Adapter = "",
    redis: Annotated[
        bool, typer.Option(help="Use Redis; without it the store has dram alone.")
    ] = True,
    redis_url: Annotated[
        str,
        typer.Option(
            envvar=REDIS_VARIABLE,
            help="An existing Redis; default: start one. Prefer the variable: command lines are "
            "visible.",
        ),
    ] = "",
    dram_mib: Annotated[int, typer.Option(help="Bound of the store's dram tier, MiB.")] = 1024,
    redis_mib: Annotated[int, typer.Option(help="Bound of the Redis tier, MiB.")] = 4096,
    ttl_s: Annotated[float, typer.Option(help="How long an unused block stays in Redis.")] = 86_400,
    ssd_path: Annotated[
        str, typer.Option(help="Folder of the store's ssd tier: empty, or one that a store made.")
    ] = "",
    ssd: Annotated[str, typer.Option(help="Bound of the ssd tier, such as 100GiB.")] = "16GiB",
    object_url: Annotated[
        str,
        typer.Option(
            help="The store's object tier: s3://bucket/prefix, gs://, az:// or file:///folder; "
            "credentials come from the environment."
        ),
    ] = "",
    object_: Annotated[
        str, typer.Option("--object", help="Bound of the object tier, such as 1TiB.")
    ] = "64GiB",
    prefill_workers: Annotated[int, typer.Option(help="Prefill workers.")] = 1,
    decode_workers: Annotated[int, typer.Option(help="Decode workers.")] = 1,
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    tls_client_ca: TlsClientCa = "",
    tenants: UpTenants = "",
    metrics_listen: MetricsListen = "",
    store_metrics_listen: Annotated[
        str, typer.Option(help="host:port of the store's Prometheus metrics; default: none.")
    ] = "",
    log_level: LogLevel = "",
    log_format: LogFormat = "",
) -> None:
    """Start Redis, the store, Ray and the gateway on this machine; Ctrl-C ends them all."""
    set_logging(log_level, log_format)
    config = StackConfig(
        listen=listen,
        model=model_source(model),
        dtype=dtype,
        adapter=absolute(adapter) or None,
        redis=redis,
        redis_url=redis_url or None,
        dram_bytes=dram_mib * MIB,
        redis_bytes=redis_mib * MIB,
        ttl_s=ttl_s,
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
        tls=absolute_tls(tls_cert, tls_key, tls_client_ca),
        tenants=absolute(tenants),
        metrics_listen=metrics_listen,
        store_metrics_listen=store_metrics_listen,
        ssd_path=absolute(ssd_path),
        ssd_bytes=parse_size(ssd),
        object_url=object_url,
        object_bytes=parse_size(object_),
    )
    config.validate()
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent.isdecimal():
        die_with_parent(int(parent))
    os.environ.pop(REDIS_VARIABLE, None)
    if config.redis_url:
        os.environ[REDIS_VARIABLE] = config.redis_url
    raise typer.Exit(supervise("kvstrata.cluster.local_stack", [config.encode()]))


def gateway(
    store: Annotated[str, typer.Option(help="The store's host:port.")],
    ray_address: Annotated[str, typer.Option(help="The Ray cluster to join.")] = "auto",
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = (
        "127.0.0.1:50051"
    ),
    model: Annotated[str, typer.Option(help="Folder or hub id; default: SmolLM2-135M.")] = "",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    adapter: Adapter = "",
    prefill_workers: Annotated[int, typer.Option(help="Prefill workers to deploy.")] = 1,
    decode_workers: Annotated[int, typer.Option(help="Decode workers to deploy.")] = 1,
    tls_cert: TlsCert = "",
    tls_key: TlsKey = "",
    tls_client_ca: TlsClientCa = "",
    tenants: TenantsFile = "",
    metrics_listen: MetricsListen = "",
    store_admin: Annotated[
        str, typer.Option(help="host:port of the store's Admin, where it has one of its own.")
    ] = "",
    store_tls_ca: Annotated[
        str, typer.Option(envvar=CA_VARIABLE, help="The store's CA, PEM: TLS to the store.")
    ] = "",
    store_tls_cert: Annotated[
        str, typer.Option(envvar=CERT_VARIABLE, help="Certificate to show the store.")
    ] = "",
    store_tls_key: Annotated[
        str, typer.Option(envvar=KEY_VARIABLE, help="Its private key, PEM.")
    ] = "",
    log_level: LogLevel = "",
    log_format: LogFormat = "",
) -> None:
    """Deploy the workers on a running Ray cluster, unless they are there, and serve a gateway."""
    from kvstrata.cluster.gateway_process import GatewayConfig, run_gateway

    set_logging(log_level, log_format)
    config = GatewayConfig(
        store_address=store,
        ray_address=ray_address,
        listen=listen,
        model=model_source(model),
        dtype=dtype,
        adapter=absolute(adapter) or None,
        prefill_workers=prefill_workers,
        decode_workers=decode_workers,
        tls=absolute_tls(tls_cert, tls_key, tls_client_ca),
        store_credentials=ClientCredentials(
            absolute(store_tls_ca),
            absolute(store_tls_cert),
            absolute(store_tls_key),
            os.environ.get(TOKEN_VARIABLE, ""),
        ),
        store_admin_address=store_admin,
        tenants=absolute(tenants),
        metrics_listen=metrics_listen,
    )
    run_gateway(config)


def set_logging(level: str, form: str) -> None:
    """Let every process that this one starts log so; raises where one is unknown."""
    configure_logging(level, form)
    for name, value in ((LEVEL_VARIABLE, level), (FORMAT_VARIABLE, form)):
        if value:
            os.environ[name] = value


def absolute(path: str) -> str:
    """Return an absolute path, because what reads the file runs elsewhere; empty for none."""
    return os.path.abspath(path) if path else ""


def absolute_tls(cert: str, key: str, client_ca: str) -> ServerTls | None:
    """Return the gateway's TLS setting, checked, or None without one."""
    tls = server_tls(absolute(cert), absolute(key), absolute(client_ca))
    if tls:
        tls.credentials()
    return tls


def model_source(model: str) -> str | None:
    """Return the option's value; a path as an absolute one, because the workers run elsewhere."""
    return os.path.abspath(model) if os.path.exists(model) else model or None
