"""The keys that blocks are encrypted with at rest: one a tenant, derived from master keys.

A file of master keys is TOML, made by ``openssl rand -hex 32``::

    current = "2026-11"         # new blocks are encrypted with this one
    [keys]
    2026-11 = "3f1c..."         # 64 hex digits
    2026-05 = "90ab..."         # retired: blocks that were written with it can still be read

A tenant's key is HKDF-SHA256 of a master key with the tenant's name and the key's. So keys rotate
by a new ``current``, a retired key that is taken out of the file makes its blocks misses, and one
tenant's key opens nothing of another's. A tenant may have a file of its own.
"""

import os
import re
import stat
import tomllib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import count
from logging import getLogger

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvstrata.kvstore_service.encryption import KEYS_VARIABLE
from kvstrata.kvstore_service.tenants import Tenant
from kvstrata.protos.errors import ConfigurationError

KEY_BYTES = 32
KEY_ID_BYTES = 8
SALT_BYTES = 16
MAX_FILE_BYTES = 1 << 16
_MAX_SESSIONS = 1024
_KEY_DOMAIN, _ID_DOMAIN, _SESSION_DOMAIN = (
    b"kvstrata/at-rest-key/1",
    b"kvstrata/at-rest-key-id/1",
    b"kvstrata/at-rest-session/1",
)

logger = getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MasterKeys:
    """Named master keys, of which one is current.

    Attributes:
        current: The name of the one for new blocks.
        keys: Name to 32 bytes.
    """

    current: str
    keys: Mapping[str, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True)
class TenantKey:
    """One key of one tenant.

    Attributes:
        tenant: Whose.
        key_id: Says which key it is, and nothing about it: derived as the key itself is.
        secret: 32 bytes.
    """

    tenant: str
    key_id: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Session:
    """A tenant's key within one process: no nonce is ever used twice with its cipher.

    Attributes:
        key: The tenant's key.
        salt: Random bytes that the cipher's key is derived with.
        cipher: AES-256-GCM.
        numbers: The nonces.
    """

    key: TenantKey
    salt: bytes
    cipher: AESGCM
    numbers: "count[int]"


class KeyRing:
    """Every key of every tenant. One event loop owns it.

    Args:
        tenants: Who there is.
        path: File of the master keys; without it ``KVSTRATA_KEYS`` has them as ``name:hex``, with
            commas, the current one first; without that only tenants with files of their own have
            keys.

    Raises:
        ConfigurationError: Names the bad file or variable, and no secret.
    """

    def __init__(self, tenants: Iterable[Tenant], path: str = "") -> None:
        self._path = path
        self._current: dict[str, TenantKey] = {}
        self._by_id: dict[bytes, TenantKey] = {}
        self._sessions: OrderedDict[tuple[bytes, bytes], Session] = OrderedDict()
        self._own: dict[str, Session] = {}
        self.load(tenants)

    def load(self, tenants: Iterable[Tenant]) -> None:
        """Read every file anew; raises as the constructor does, and then nothing has changed."""
        shared = read_keys(self._path) if self._path else keys_from_environment()
        current: dict[str, TenantKey] = {}
        by_id: dict[bytes, TenantKey] = {}
        for tenant in tenants:
            masters = read_keys(tenant.key_file) if tenant.key_file else shared
            if masters is None:
                continue
            for name, master in masters.keys.items():
                key = _derive(tenant.name, name, master)
                by_id[key.key_id] = key
                if name == masters.current and tenant.encrypt:
                    current[tenant.name] = key
        self._current, self._by_id = current, by_id
        self._sessions.clear()
        self._own.clear()

    def __bool__(self) -> bool:
        return bool(self._by_id)

    def encrypts(self, tenant: str) -> bool:
        """Whether new blocks of the tenant are encrypted."""
        return tenant in self._current

    def sealing(self, tenant: str) -> Session | None:
        """Return what a tenant's new blocks are encrypted with; None if they are not."""
        key = self._current.get(tenant)
        if key is None:
            return None
        if tenant not in self._own:
            self._own[tenant] = _open_session(key, os.urandom(SALT_BYTES))
        return self._own[tenant]

    def opening(self, key_id: bytes, salt: bytes) -> Session | None:
        """Return what opens a block of that key and session; None without the key."""
        session = self._sessions.get((key_id, salt))
        if session is not None:
            self._sessions.move_to_end((key_id, salt))
            return session
        key = self._by_id.get(key_id)
        if key is None:
            return None
        session = self._sessions[key_id, salt] = _open_session(key, salt)
        if len(self._sessions) > _MAX_SESSIONS:
            self._sessions.popitem(last=False)
        return session


def _open_session(key: TenantKey, salt: bytes) -> Session:
    return Session(key, salt, AESGCM(_hkdf(key.secret, salt, _SESSION_DOMAIN)), count())


def _derive(tenant: str, name: str, master: bytes) -> TenantKey:
    info = b"\0".join((b"", tenant.encode(), name.encode()))
    return TenantKey(
        tenant,
        _hkdf(master, b"", _ID_DOMAIN + info, KEY_ID_BYTES),
        _hkdf(master, b"", _KEY_DOMAIN + info),
    )


def _hkdf(secret: bytes, salt: bytes, info: bytes, length: int = KEY_BYTES) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt or None, info=info).derive(secret)


def read_keys(path: str) -> MasterKeys:
    """Return the master keys of a file.

    Raises:
        ConfigurationError: Names what is wrong with it, and no secret.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the key file {path}: {error.strerror}", "name a file to read"
        ) from None
    if stat.S_ISREG(mode) and mode & stat.S_IROTH:
        logger.warning("key file can be read by everybody", extra={"path": path})
    try:
        if len(text) > MAX_FILE_BYTES:
            raise ValueError
        content = tomllib.loads(text.decode())
    except ValueError:  # tomllib's and Unicode's too; their words may quote a secret
        raise ConfigurationError(
            f"the key file {path} is no TOML of at most {MAX_FILE_BYTES} bytes", "correct it"
        ) from None
    keys, current = content.get("keys"), content.get("current")
    if not isinstance(keys, dict) or not keys or set(content) != {"keys", "current"}:
        raise ConfigurationError(
            f"the key file {path} must have `current` and a table [keys] and nothing else",
            "name at least one key",
        )
    parsed = {name: _parse_key(f"the key file {path}", name, key) for name, key in keys.items()}
    if not isinstance(current, str) or current not in parsed:
        raise ConfigurationError(
            f"the key file {path} has no key of the name that `current` says",
            f"name one of {', '.join(sorted(parsed))[:200]}",
        )
    return MasterKeys(current, parsed)


def keys_from_environment() -> MasterKeys | None:
    """Return the master keys of ``KVSTRATA_KEYS``; None if it is not set."""
    text = os.environ.get(KEYS_VARIABLE, "").strip()
    if not text:
        return None
    pairs = [pair.strip().partition(":") for pair in text.split(",")]
    keys = {name: _parse_key(KEYS_VARIABLE, name, key) for name, _, key in pairs}
    return MasterKeys(pairs[0][0], keys)


def _parse_key(where: str, name: str, key: object) -> bytes:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigurationError(
            f"{where}: a key's name is not up to 64 letters, digits and ._-", "rename the key"
        )
    if not isinstance(key, str) or not re.fullmatch(r"[0-9a-fA-F]{64}", key):
        raise ConfigurationError(
            f"{where}: key {name} is not 64 hex digits", "make one with `openssl rand -hex 32`"
        )
    return bytes.fromhex(key)
