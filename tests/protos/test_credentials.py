"""What certificates, keys and tokens are accepted, and what their errors tell."""

import pickle
from pathlib import Path

import pytest

from kvstrata.protos.credentials import ClientCredentials, ServerTls, server_tls
from kvstrata.protos.errors import ConfigurationError
from tests.certificates import Authority


def refusal(settings: ServerTls | ClientCredentials) -> ConfigurationError:
    load = settings.credentials if isinstance(settings, ServerTls) else settings.channel
    with pytest.raises(ConfigurationError) as caught:
        load()
    assert caught.value.remedy
    assert caught.value.__cause__ is None
    return caught.value


def test_good_files_are_taken(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    assert authority.server(mutual=True).credentials() is not None
    assert authority.client(mutual=True).channel() is not None
    assert ClientCredentials().channel() is None
    assert server_tls("", "", "") is None


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("one")
    other_cert, other_key = authority.issue("other")
    _, locked = authority.issue("locked", password=b"secret")
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    large = tmp_path / "large.pem"
    large.write_bytes(b"x" * ((1 << 20) + 1))
    for settings, told in (
        (ServerTls(str(tmp_path / "none"), key), "cannot read"),
        (ServerTls(cert, str(tmp_path)), "cannot read"),
        (ServerTls(cert, "nul\0"), "cannot read"),
        (ServerTls(str(text), key), "text.pem holds no certificate"),
        (ServerTls(key, key), "one.key holds no certificate"),
        (ServerTls(cert, str(text)), "text.pem holds no private key"),
        (ServerTls(cert, other_key), "other.key is not the key of the certificate"),
        (ServerTls(other_cert, locked), "locked.key holds no private key"),
        (ServerTls(cert, key, str(text)), "text.pem holds no certificate"),
        (ServerTls(str(large), key), "large.pem is larger"),
        (ClientCredentials(str(text)), "text.pem holds no certificate"),
        (ClientCredentials(authority.ca, cert, other_key), "other.key is not the key"),
    ):
        assert told in refusal(settings).message, settings


def test_no_error_tells_what_a_key_is(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("one")
    body = Path(key).read_text().splitlines()[1]
    broken = tmp_path / "broken.key"
    broken.write_text(f"-----BEGIN PRIVATE KEY-----\n{body}\n-----END PRIVATE KEY-----\n")
    error = refusal(ServerTls(cert, str(broken)))
    assert body[:16] not in f"{error} {error!r} {error.metadata}"


@pytest.mark.parametrize(
    ("cert", "key", "ca"), [("a", "", ""), ("", "a", ""), ("", "", "a"), ("a", "", "b")]
)
def test_half_a_server_setting_is_refused(cert: str, key: str, ca: str) -> None:
    with pytest.raises(ConfigurationError, match="--tls-cert and --tls-key"):
        server_tls(cert, key, ca)


@pytest.mark.parametrize("half", [{"cert": "a"}, {"key": "a"}, {"cert": "a", "key": "b"}])
def test_half_a_client_setting_is_refused(half: dict[str, str]) -> None:
    with pytest.raises(ConfigurationError):
        ClientCredentials(**half)


@pytest.mark.parametrize("token", ["two words", "line\nend", "ümlaut", "nul\0"])
def test_a_token_that_no_header_carries_is_refused_and_not_told(token: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        ClientCredentials(token=token)
    assert token not in str(caught.value)


def test_the_token_is_in_no_repr_but_goes_with_the_value() -> None:
    credentials = ClientCredentials(token="s3cret-token")
    assert "s3cret" not in repr(credentials)
    assert credentials.metadata == (("authorization", "Bearer s3cret-token"),)
    assert pickle.loads(pickle.dumps(credentials)) == credentials


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("TLS_CA", "a"), ("TLS_CERT", "b"), ("TLS_KEY", "c"), ("TOKEN", "t")):
        monkeypatch.setenv(f"KVSTRATA_{name}", value)
    assert ClientCredentials.from_environment() == ClientCredentials("a", "b", "c", "t")
