"""Authorities and certificates for tests, made when they are asked for."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kvstrata.protos.credentials import ClientCredentials, ServerTls

DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates for 127.0.0.1; everything lies in one folder.

    Attributes:
        ca: Its own certificate.
    """

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.ca = str(folder / f"{name}.pem")
        extension = x509.BasicConstraints(ca=True, path_length=None)
        self._write(self.ca, self._certificate(self._name, self._key, extension))

    def issue(self, name: str, password: bytes = b"") -> tuple[str, str]:
        """Return the files of a new certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = self._certificate(subject, key, x509.SubjectAlternativeName([address]))
        cert_file, key_file = (str(self._folder / f"{name}.{kind}") for kind in ("crt", "key"))
        self._write(cert_file, certificate)
        encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
        if password:
            encryption = serialization.BestAvailableEncryption(password)
        Path(key_file).write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption
            )
        )
        return cert_file, key_file

    def server(self, *, mutual: bool = False) -> ServerTls:
        """Return the setting of a new server."""
        return ServerTls(*self.issue("server"), self.ca if mutual else "")

    def client(self, *, mutual: bool = False) -> ClientCredentials:
        """Return what a new client shows."""
        return ClientCredentials(self.ca, *(self.issue("client") if mutual else ("", "")))

    def _certificate(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        extension: x509.ExtensionType,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(self._key, hashes.SHA256())
        )

    @staticmethod
    def _write(path: str, certificate: x509.Certificate) -> None:
        Path(path).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
