"""Sizes as people write them."""

import re

from kvstrata.protos.errors import ConfigurationError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Return the bytes of a size such as ``2GiB``, ``512M`` or ``1048576``, in powers of 1024.

    >>> parse_size("2GiB")
    2147483648

    Raises:
        ConfigurationError: Not a size.
    """
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ConfigurationError(f"not a size: {text[:40]!r}", "write it like 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
