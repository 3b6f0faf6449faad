"""Tenants for tests: their file, their tokens, and clients that show them."""

import hashlib
from pathlib import Path

from kvstrata.protos.credentials import ClientCredentials


def token(name: str) -> str:
    return f"token-of-{name}"


def credentials(name: str) -> ClientCredentials:
    return ClientCredentials(token=token(name))


def tenants_file(folder: Path, **tenants: str) -> str:
    """Write a file of tenants, name to further lines of its table, and return its path."""
    tables = [
        f'[tenants.{name}]\ntoken_sha256 = "{hashlib.sha256(token(name).encode()).hexdigest()}"\n'
        f'salt_seed = "the secret seed of {name}"\n{lines}\n'
        for name, lines in tenants.items()
    ]
    path = folder / "tenants.toml"
    path.write_text("\n".join(tables))
    return str(path)
