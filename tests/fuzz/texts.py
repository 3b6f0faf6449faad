"""Names, URLs, sizes and settings that come from outside: read, or refused by the right error."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvstrata.kvstore_service.command import parse_size
from kvstrata.kvstore_service.object_name import ObjectName
from kvstrata.kvstore_service.redis_client import parse_place
from kvstrata.kvstore_service.redis_url import mask_url
from kvstrata.kvstore_service.ssd_file import SsdFile
from kvstrata.kvstore_service.tenants import read_tenants
from kvstrata.methods.representatives import parse_choice
from kvstrata.protos.errors import ConfigurationError, LimitError
from kvstrata.protos.identity import BlockKey, split_hashes
from tests.fuzz.campaign import Target
from tests.fuzz.mutation import mutate

KEY = BlockKey(b"s" * 16, b"h" * 16)  # type: ignore[arg-type]
FILE = SsdFile.of(KEY, 42, {1: b"x" * 4096, 2: b"y" * 2048})
SECRET = "s3cr3t-p4ss"
TENANT_SECRETS = ("a long enough", "also long", "ab" * 32, "cd" * 32)
TENANTS = f"""
[tenants.alice]
token_sha256 = "{"ab" * 32}"
salt_seed = "a long enough secret"
quota_bytes = 1000
requests_per_s = 5
[tenants.bob]
token_sha256 = "{"cd" * 32}"
salt_seed = "another secret, also long"
admin = true
"""
TEXTS = [
    KEY.encode(),
    FILE.name,
    ObjectName.of(KEY, 42, "9c41d2aa", {1: b"x" * 4096, 2: b"y" * 2048}).path,
    f"redis://:{SECRET}@127.0.0.1:6379/0",
    f"redis+cluster://user:{SECRET}@h1:1,h2:2",
    f"redis+sentinel://:{SECRET}@h1:1,h2:2/service/3?ssl_ca_certs=ca.pem",
    "2.5GiB",
    "5,14",
]


def _text(source: random.Random) -> str:
    corpus = [text.encode() for text in TEXTS]
    return mutate(source.choice(corpus), source, corpus).decode("latin-1")


def check_text(text: str) -> str:
    """Whatever reads a name writes the same name; everything else is refused by its own error."""
    read = 0
    file, place = SsdFile.parse(text), ObjectName.parse(text)
    assert file is None or file.name == text
    assert place is None or place.path == text
    read += (file is not None) + (place is not None)
    for parse, error in _PARSERS:
        try:
            parse(text)
            read += 1
        except error:
            continue
    try:
        assert BlockKey.decode(text).encode() == text.lower()
        read += 1
    except ValueError:
        pass
    if text.startswith("redis") and text.count(SECRET) == 1 and f":{SECRET}@" in text:
        assert SECRET not in mask_url(text)
    return "read" if read else "refused"


_PARSERS: list[tuple[Callable[[str], Any], type[Exception]]] = [
    (parse_size, ConfigurationError),
    (parse_choice, LimitError),
    (parse_place, ValueError),
    (lambda text: split_hashes(text.encode("latin-1")), ValueError),
]


def make_tenants(folder: Path) -> Target:
    """Return the target of the tenants' file, which is written to ``folder``."""
    path = folder / "tenants.toml"
    corpus = [TENANTS.encode()]

    def check(data: bytes) -> str:
        path.write_bytes(data)
        try:
            tenants = read_tenants(str(path))
        except ConfigurationError as error:
            told = str(error)
        else:
            assert {tenant.name for tenant in tenants}
            return "read"
        assert not any(secret in told for secret in TENANT_SECRETS), told
        return "refused"

    return Target(
        "tenants",
        15,
        lambda source: mutate(corpus[0], source, corpus),
        check,
        wanted=["refused", "read"],
    )


TARGETS = [Target("texts", 100, _text, check_text, wanted=["refused", "read"])]
