"""Redis URLs, shown without their secrets."""


def mask_url(url: str) -> str:
    """Return ``url`` with user, password and query hidden; safe for logs even when it is malformed.

    >>> mask_url("redis://kv:secret@10.0.0.7:6379/0")
    'redis://***@10.0.0.7:6379/0'
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not scheme.replace("+", "").isalnum():
        return "***"
    before, _, query = rest.partition("?")
    if "@" in query:  # a raw "?" or "@" in a password: nobody can tell where the secret ends
        return f"{scheme}://***"
    secret, at, place = before.rpartition("@")
    if "/" in secret:
        return f"{scheme}://***"
    return f"{scheme}://***@{place}" if at else f"{scheme}://{before}"
