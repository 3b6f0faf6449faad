"""Object store URLs: a place and nothing secret."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvstrata.kvstore_service.redis_url import mask_url
from kvstrata.protos.errors import ConfigurationError

SCHEMES = ("s3", "gs", "az", "file", "memory")
_ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")


def check_url(url: str) -> str:
    """Return ``url`` if it names a place and carries no secret.

    Raises:
        ConfigurationError: Another scheme, no bucket, or a user, password or query in it.
    """
    remedy = "write s3://bucket/prefix, gs://..., az://... or file:///folder"
    scheme, separator, place = url.partition("://")
    if not separator or scheme not in SCHEMES or (scheme != "memory" and not place.strip("/")):
        raise ConfigurationError(f"not an object store URL: {mask_url(url)}", remedy)
    if scheme == "file":
        if not place.startswith("/"):
            raise ConfigurationError(f"not an absolute folder: {mask_url(url)}", remedy)
        return url
    if any(mark in place for mark in "@?#"):
        raise ConfigurationError(
            f"an object store URL carries no secret: {mask_url(url)}",
            "give credentials in the environment, as the cloud's own tools do",
        )
    return url


def folder_of_url(url: str) -> Path | None:
    """Return the folder of a ``file://`` URL; None for a service."""
    place = url.removeprefix("file://")
    return Path(unquote(place)) if place != url else None


def allows_http() -> bool:
    """Return whether the environment names an endpoint without TLS, as local services have."""
    return any(urlsplit(os.environ.get(name, "")).scheme == "http" for name in _ENDPOINTS)
