"""Tenants: who may call, told by the bearer token alone, and what each may use.

The file is TOML, one table a tenant::

    [tenants.alice]
    token_sha256 = "5e88...": sha256 of the token, in hex; the token itself is nowhere
    salt_seed = "9f86...": a secret that the tenant's cache scopes are derived from
    admin = false              # may call Admin
    key_file = "/etc/alice.keys"    # master keys of its own, see key_ring.py
    encrypt = true             # false: its blocks lie in plaintext although the store has keys
    quota_bytes = 10_000_000_000    # 0, the default of each limit: none
    requests_per_s = 100
    in_flight_bytes = 200_000_000
"""

import hashlib
import hmac
import logging
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kvstrata.kvstore_service.namespace import Namespace, ScopeOwners
from kvstrata.protos.call_context import DEFAULT_TENANT
from kvstrata.protos.credentials import TOKEN_KEY, TOKEN_SCHEME
from kvstrata.protos.errors import (
    ConfigurationError,
    KVStrataError,
    LimitError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from kvstrata.protos.service import Metadata

ADMIN_PREFIX = "/kvstrata.v1.Admin/"
MAX_FILE_BYTES = 1 << 20
MIN_SEED_CHARS = 16
LIMITS = ("quota_bytes", "requests_per_s", "in_flight_bytes")
_FIELDS = {"token_sha256", "salt_seed", "admin", "key_file", "encrypt", *LIMITS}
_SALT_DOMAIN = b"kvstrata/scope-salt/1"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tenant:
    """One party whose blocks nobody else can name.

    Attributes:
        name: For counters and logs.
        token_hash: SHA-256 of its token.
        salt_seed: Secret that its scope salt is derived from.
        is_admin: Whether it may call Admin.
        quota_bytes: Bytes of its blocks that this process may keep; 0 is no limit, as below.
        requests_per_s: Calls a second, blocks of a Put stream counted one by one.
        in_flight_bytes: Bytes being received for it and sent to it at once.
        key_file: Of its own master keys for encryption at rest; the store's without it.
        encrypt: Whether its blocks are encrypted at rest, where there are keys.
        owners: Told of every stored scope of its requests.
    """

    name: str
    token_hash: bytes = field(default=b"", repr=False)
    salt_seed: bytes = field(default=b"", repr=False)
    is_admin: bool = False
    quota_bytes: int = 0
    requests_per_s: float = 0.0
    in_flight_bytes: int = 0
    key_file: str = ""
    encrypt: bool = True
    owners: ScopeOwners | None = field(default=None, repr=False, compare=False)

    @property
    def namespace(self) -> Namespace:
        """How its keys are stored: plainly for the default tenant alone."""
        return Namespace(self.name if self.token_hash else "", self.owners)

    def scope_salt(self, deployment: bytes) -> bytes:
        """Return the secret part of its cache scopes; the deployment's own without a seed."""
        if not self.salt_seed:
            return deployment
        return hmac.digest(self.salt_seed, _SALT_DOMAIN + deployment, "sha256")


DEFAULT = Tenant(DEFAULT_TENANT, is_admin=True)
"""Everybody, where no tenants are configured: stores under plain keys and needs no token."""


class Tenants:
    """Who calls, and whether they may. Without a file everybody is the default tenant."""

    def __init__(self, path: str = "") -> None:
        self._path = path
        self._owners: ScopeOwners | None = None
        self._tenants = self._read()

    def _read(self) -> tuple[Tenant, ...]:
        tenants = read_tenants(self._path) if self._path else (DEFAULT,)
        if self._owners is None:
            return tenants
        return tuple(replace(tenant, owners=self._owners) for tenant in tenants)

    def tell_owners(self, owners: ScopeOwners) -> None:
        """Let ``owners`` know every stored scope of the requests to come."""
        self._owners = owners
        self._tenants = tuple(replace(tenant, owners=owners) for tenant in self._tenants)

    def identify(self, metadata: Metadata) -> Tenant:
        """Return the tenant whose token is in ``metadata``; nothing else of a call names one.

        Raises:
            UnauthenticatedError: No token, several, or one that belongs to nobody.
        """
        if not self._path:
            return self._tenants[0]
        offered = [value for key, value in metadata if key == TOKEN_KEY]
        header = offered[0] if len(offered) == 1 else ""
        if not isinstance(header, str) or not header.startswith(TOKEN_SCHEME):
            raise UnauthenticatedError(
                "the call has no bearer token" if not offered else "the call has no readable token",
                "set KVSTRATA_TOKEN to the tenant's token",
            )
        offered_hash = hashlib.sha256(header.removeprefix(TOKEN_SCHEME).encode()).digest()
        found = None
        for tenant in self._tenants:  # all of them, so that the time tells nothing
            if hmac.compare_digest(offered_hash, tenant.token_hash):
                found = tenant
        if found is None:
            raise UnauthenticatedError(
                "the token belongs to no tenant", "check KVSTRATA_TOKEN, or ask the operator"
            )
        return found

    def authorize(self, method: str, metadata: Metadata) -> str:
        """Return the caller's name if it has a token, and for Admin one of an admin tenant.

        Raises:
            UnauthenticatedError: See ``identify``.
            PermissionDeniedError: Admin, called by another tenant.
        """
        tenant = self.identify(metadata)
        if method.startswith(ADMIN_PREFIX) and not tenant.is_admin:
            raise PermissionDeniedError(
                f"tenant {tenant.name!r} is no admin", "use the token of an admin tenant"
            )
        return tenant.name

    @property
    def has_file(self) -> bool:
        """Whether callers need a token."""
        return bool(self._path)

    def all(self) -> tuple[Tenant, ...]:
        """Return every tenant."""
        return self._tenants

    def named(self, name: str) -> Tenant:
        """Return the tenant of that name; ``NotFoundError`` if there is none."""
        for tenant in self._tenants:
            if tenant.name == name:
                return tenant
        raise NotFoundError(
            f"no tenant {name[:64]!r}",
            f"use one of {', '.join(tenant.name for tenant in self._tenants[:16])}",
        )

    def limit(self, name: str, limits: Mapping[str, float]) -> None:
        """Set limits of a tenant, by their names in the file, until the file is read again.

        Raises:
            NotFoundError: No such tenant.
            LimitError: Names a limit that is out of range.
        """
        old = self.named(name)
        for limit, value in limits.items():
            if not is_limit(value):
                raise LimitError(f"{limit} is no number of at least 0", "give one, 0 for no limit")
        new = replace(old, **limits)  # type: ignore[arg-type]
        self._tenants = tuple(new if tenant is old else tenant for tenant in self._tenants)
        logger.info("limits set", extra={"of_tenant": name, **limits})

    def reload(self) -> bool:
        """Read the file again; a bad one is logged and changes nothing. Return whether it held."""
        try:
            self._tenants = self._read()
        except KVStrataError as error:
            logger.error("tenants not read again, the old ones stay", extra={"error": str(error)})
            return False
        logger.info("tenants read again", extra={"count": len(self._tenants)})
        return True


def read_tenants(path: str) -> tuple[Tenant, ...]:
    """Return the tenants of a file.

    Raises:
        ConfigurationError: Names what is wrong with it, and no secret.
    """
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise ConfigurationError(
                f"the tenants file {path} is larger than {MAX_FILE_BYTES} bytes", "shorten it"
            )
        content = tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the tenants file {path}: {error.strerror}", "name a file to read"
        ) from None
    except tomllib.TOMLDecodeError as error:
        where = re.search(r"\(at [^)]*\)", str(error))  # the rest may quote a secret
        raise ConfigurationError(
            f"the tenants file {path} is no TOML {where[0] if where else ''}".rstrip(),
            "correct it",
        ) from None
    except UnicodeDecodeError:
        raise ConfigurationError(
            f"the tenants file {path} is no UTF-8", "save it as UTF-8"
        ) from None
    tables = content.get("tenants")
    if not isinstance(tables, dict) or not tables or set(content) != {"tenants"}:
        raise ConfigurationError(
            f"the tenants file {path} must have tables [tenants.NAME] and nothing else",
            "name at least one tenant",
        )
    tenants = tuple(_parse(name, table) for name, table in tables.items())
    _check_distinct(tenants)
    return tenants


def _parse(name: str, table: Any) -> Tenant:
    def refuse(what: str, remedy: str) -> ConfigurationError:
        return ConfigurationError(f"tenant {name[:64]!r}: {what}", remedy)

    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        raise refuse("not a name", "use up to 63 of a-z, 0-9, - and _")
    if not isinstance(table, dict) or not _FIELDS.issuperset(table):
        unknown = sorted(set(table) - _FIELDS) if isinstance(table, dict) else []
        raise refuse(f"unknown fields {unknown}", f"use {', '.join(sorted(_FIELDS))}")
    token_hash, seed = table.get("token_sha256"), table.get("salt_seed")
    if not isinstance(token_hash, str) or not re.fullmatch(r"[0-9a-f]{64}", token_hash):
        raise refuse("token_sha256 is no SHA-256", "give 64 lower-case hex digits")
    if not isinstance(seed, str) or len(seed) < MIN_SEED_CHARS:
        raise refuse(
            f"salt_seed has fewer than {MIN_SEED_CHARS} characters", "give a random secret"
        )
    for flag in ("admin", "encrypt"):
        if not isinstance(table.get(flag, False), bool):
            raise refuse(f"{flag} is neither true nor false", "give true or false")
    if not isinstance(table.get("key_file", ""), str):
        raise refuse("key_file is no text", "give the path of a file of keys")
    limits = {limit: table.get(limit, 0) for limit in LIMITS}
    for limit, value in limits.items():
        kinds = (int, float) if limit == "requests_per_s" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not is_limit(value):
            raise refuse(f"{limit} is no number of at least 0", "give one, 0 for no limit")
    return Tenant(
        name,
        bytes.fromhex(token_hash),
        seed.encode(),
        table.get("admin", False),
        **limits,
        key_file=table.get("key_file", ""),
        encrypt=table.get("encrypt", True),
    )


def is_limit(value: float) -> bool:
    """Return whether a number may be a limit; 0 is none."""
    return 0 <= value < 1 << 62


def _check_distinct(tenants: Iterable[Tenant]) -> None:
    """Refuse tenants that a token or a salt would not tell apart."""
    seen: dict[bytes, str] = {}
    for tenant in tenants:
        for secret, what in ((tenant.token_hash, "token"), (tenant.salt_seed, "salt_seed")):
            if secret in seen:
                raise ConfigurationError(
                    f"tenants {seen[secret]!r} and {tenant.name!r} have the same {what}",
                    f"give each its own {what}",
                )
            seen[secret] = tenant.name
