"""Reading the fields that requests share, with the error that names what is wrong."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvstrata.kvstore_service.block_run import BlockRun
from kvstrata.kvstore_service.wire import key_of
from kvstrata.protos import kvstore_pb2 as pb
from kvstrata.protos import retention
from kvstrata.protos.errors import InvalidRequestError, LimitError
from kvstrata.protos.frame_pb2 import Stratum
from kvstrata.protos.identity import (
    HASH_BYTES,
    BlockKey,
    ScopeDigest,
)
from kvstrata.protos.retention_pb2 import Retention


def parse_key(message: pb.BlockKey) -> BlockKey:
    """Return the key; ``InvalidRequestError`` if its parts are not 16 bytes each."""
    try:
        return key_of(message)
    except ValueError as error:
        raise InvalidRequestError(
            str(error), "send scope and block hash as 16 bytes each"
        ) from error


def parse_keys(messages: Sequence[pb.BlockKey], max_keys: int) -> list[BlockKey]:
    """Return the keys; ``LimitError`` if there are more than ``max_keys``."""
    _check_count(len(messages), max_keys)
    return [parse_key(message) for message in messages]


def parse_hashes(scope: bytes, joined: bytes, max_keys: int) -> BlockRun:
    """Return the keys of a scope and concatenated block hashes.

    Raises:
        InvalidRequestError: The scope is not 16 bytes, or the hashes are no multiple of that.
        LimitError: More than ``max_keys``.
    """
    _check_count(len(joined) // HASH_BYTES, max_keys)
    try:
        return BlockRun(ScopeDigest(scope), joined)
    except ValueError as error:
        raise InvalidRequestError(str(error), "send scope and hashes as 16 bytes each") from error


def parse_strata(strata: Iterable[int]) -> list[int]:
    """Return the wanted strata, each once; ``InvalidRequestError`` for none or an unknown one."""
    wanted = list(dict.fromkeys(int(stratum) for stratum in strata))
    known = set(Stratum.values()) - {Stratum.STRATUM_UNSPECIFIED}
    if not wanted or not known.issuperset(wanted):
        raise InvalidRequestError(
            f"strata must be some of BASE, MID, FINE, EXACT, got {wanted[:8]}", "name at least one"
        )
    return wanted


def parse_retention(message: Retention, max_keep_ms: int) -> retention.Retention:
    """Return the hint, which holds for ``max_keep_ms`` at most; see ``read_retention``."""
    hint = retention.read_retention(message)
    return replace(hint, keep_s=min(message.keep_ms or max_keep_ms, max_keep_ms) / 1000)


def _check_count(count: int, max_keys: int) -> None:
    if count > max_keys:
        raise LimitError(
            f"{count} blocks in one request exceed the limit of {max_keys}", "send several requests"
        )
