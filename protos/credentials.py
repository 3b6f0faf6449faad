"""Who a peer is: certificates of servers and clients, and a client's bearer token.

Everything is read and checked when it is asked for, so a process learns of a bad file before it
opens a port. Values hold paths, so they may be logged, compared and sent to other processes; the
token is in no ``repr``, and no error tells what is in a key or a token.
"""

import os
import ssl
from dataclasses import dataclass, field

import grpc

from kvstrata.protos.errors import ConfigurationError

CA_VARIABLE = "KVSTRATA_TLS_CA"
CERT_VARIABLE = "KVSTRATA_TLS_CERT"
KEY_VARIABLE = "KVSTRATA_TLS_KEY"
TOKEN_VARIABLE = "KVSTRATA_TOKEN"
TOKEN_KEY = "authorization"
TOKEN_SCHEME = "Bearer "
MAX_PEM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ServerTls:
    """What a server shows and demands.

    Attributes:
        cert: PEM file of its certificate, the intermediate ones after it.
        key: PEM file of the certificate's private key, not encrypted.
        client_ca: PEM file of the authorities of clients: mutual TLS, no other client gets in.
    """

    cert: str
    key: str
    client_ca: str = ""

    def credentials(self) -> grpc.ServerCredentials:
        """Return what a port is opened with; ``ConfigurationError`` names the bad file."""
        pair = _read_pair(self.cert, self.key)
        authorities = _read_certificates(self.client_ca) if self.client_ca else None
        return grpc.ssl_server_credentials(
            [pair], root_certificates=authorities, require_client_auth=authorities is not None
        )


def server_tls(cert: str, key: str, client_ca: str) -> ServerTls | None:
    """Return the setting of three options; None if all are empty.

    Raises:
        ConfigurationError: Some of them make no sense without the others.
    """
    if not (cert or key or client_ca):
        return None
    if not (cert and key):
        raise ConfigurationError(
            "TLS needs a certificate and its key", "give both --tls-cert and --tls-key"
        )
    return ServerTls(cert, key, client_ca)


@dataclass(frozen=True, slots=True)
class ClientCredentials:
    """How a client knows the server, and what it shows of itself.

    Attributes:
        ca: PEM file of the server's authorities; plaintext without it.
        cert: PEM file of the client's own certificate, for mutual TLS.
        key: PEM file of that certificate's private key, not encrypted.
        token: Bearer token that names the tenant.
    """

    ca: str = ""
    cert: str = ""
    key: str = ""
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        if bool(self.cert) != bool(self.key):
            raise ConfigurationError(
                "a client certificate goes with its key", "give both --tls-cert and --tls-key"
            )
        if self.cert and not self.ca:
            raise ConfigurationError(
                "a client certificate without the server's authority",
                "name the server's CA with --tls-ca",
            )
        if not self.token.isascii() or not all(c.isprintable() and c != " " for c in self.token):
            raise ConfigurationError(
                "the token has characters that no header can carry",
                "copy the token without spaces and line ends",
            )

    @classmethod
    def from_environment(cls) -> "ClientCredentials":
        """Return what ``KVSTRATA_TLS_CA``, ``_CERT``, ``_KEY`` and ``KVSTRATA_TOKEN`` say."""
        names = (CA_VARIABLE, CERT_VARIABLE, KEY_VARIABLE, TOKEN_VARIABLE)
        return cls(*(os.environ.get(name, "") for name in names))

    def channel(self) -> grpc.ChannelCredentials | None:
        """Return what a channel is opened with, None for plaintext.

        Raises:
            ConfigurationError: Names the bad file.
        """
        if not self.ca:
            return None
        authorities = _read_certificates(self.ca)
        key, cert = _read_pair(self.cert, self.key) if self.cert else (None, None)
        return grpc.ssl_channel_credentials(authorities, key, cert)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The header with the token; nothing without one."""
        return ((TOKEN_KEY, f"{TOKEN_SCHEME}{self.token}"),) if self.token else ()


ANONYMOUS = ClientCredentials()


def _read_pair(cert: str, key: str) -> tuple[bytes, bytes]:
    """Return the key and its certificate, which belong together."""
    certificate, secret = _read_certificates(cert), _read(key)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password=lambda: b"")
    except (ssl.SSLError, OSError) as error:
        mismatch = isinstance(error, ssl.SSLError) and error.reason == "KEY_VALUES_MISMATCH"
        raise ConfigurationError(
            f"{key} is not the key of the certificate in {cert}"
            if mismatch
            else f"{key} holds no private key that can be read",
            "give the certificate's own key, in PEM and not encrypted",
        ) from None
    return secret, certificate


def _read_certificates(path: str) -> bytes:
    data = _read(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=data.decode("ascii"))
    except (ssl.SSLError, ValueError):
        raise ConfigurationError(f"{path} holds no certificate", "give a file in PEM") from None
    return data


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_PEM_BYTES + 1)
    except (OSError, ValueError) as error:
        what = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigurationError(
            f"cannot read {path}: {what}", "name a PEM file that this user may read"
        ) from None
    if len(data) > MAX_PEM_BYTES:
        raise ConfigurationError(
            f"{path} is larger than {MAX_PEM_BYTES} bytes", "name a PEM file of certificates"
        )
    return data
