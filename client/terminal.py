"""What both commands share: errors as two lines of text, exit codes, and common options.

Exit codes: 0 done, 1 failed, 2 bad input.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from kvstrata.protos.credentials import (
    CA_VARIABLE,
    CERT_VARIABLE,
    KEY_VARIABLE,
    TOKEN_VARIABLE,
    ClientCredentials,
)
from kvstrata.protos.errors import (
    ConfigurationError,
    InvalidRequestError,
    KVStrataError,
    MessageTooLargeError,
    PromptTooLongError,
    UnknownModelError,
    UnknownPresetError,
    printable,
)

FAILED = 1
BAD_INPUT = 2
# What typer raises for a wrong option; it exports only the subclass.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
_INPUT_ERRORS = (
    ConfigurationError,
    InvalidRequestError,
    MessageTooLargeError,
    PromptTooLongError,
    UnknownModelError,
    UnknownPresetError,
)

Address = Annotated[
    str, typer.Option(envvar="KVSTRATA_ADDRESS", help="gRPC address of the server, host:port.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object with stable keys.")]
TlsCa = Annotated[
    str, typer.Option("--tls-ca", envvar=CA_VARIABLE, help="The server's CA, PEM: TLS.")
]
TlsCert = Annotated[
    str, typer.Option("--tls-cert", envvar=CERT_VARIABLE, help="Own certificate: mutual TLS.")
]
TlsKey = Annotated[
    str, typer.Option("--tls-key", envvar=KEY_VARIABLE, help="Its private key, PEM.")
]
DEFAULT_ADDRESS = "127.0.0.1:50051"


def credentials(tls_ca: str, tls_cert: str, tls_key: str) -> ClientCredentials:
    """Return what the options say; the token from ``KVSTRATA_TOKEN``: command lines are visible."""
    return ClientCredentials(tls_ca, tls_cert, tls_key, os.environ.get(TOKEN_VARIABLE, ""))


class ErrorReportingGroup(TyperGroup):
    """A command group that prints errors, wrong usage included, and exits with their code."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Return the context of the group's own options."""
        with _reported():
            return super().make_context(info_name, args, parent=parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the subcommand."""
        with _reported():
            return super().invoke(ctx)


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except KVStrataError as error:
        report(error)
        raise typer.Exit(BAD_INPUT if isinstance(error, _INPUT_ERRORS) else FAILED) from None
    except _USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # carries the help text, not an error
            raise
        usage: Any = error
        path = usage.ctx.command_path if usage.ctx is not None else ""
        report(InvalidRequestError(usage.format_message(), f"see {path} --help" if path else ""))
        raise typer.Exit(BAD_INPUT) from None


def report(error: KVStrataError) -> None:
    """Print ``error`` and its remedy to stderr."""
    typer.echo(error.describe(), err=True)


def run(app: typer.Typer) -> NoReturn:
    """Run ``app`` as a process: exits with its code, and prints no traceback."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end the answer
    try:
        app()
    except Exception as error:
        if os.environ.get("KVSTRATA_DEBUG"):
            raise
        typer.echo(f"error: {type(error).__name__}: {printable(str(error))}", err=True)
        typer.echo("hint: set KVSTRATA_DEBUG=1 to see where it came from", err=True)
    sys.exit(FAILED)
