"""What both clients need to reach a server: channel options, and statuses as our errors."""

from typing import Any

import grpc

from kvstrata.client.validation import check_address, check_seconds
from kvstrata.protos.credentials import ANONYMOUS, ClientCredentials
from kvstrata.protos.errors import KVStrataError, UnavailableError, from_rpc_error
from kvstrata.protos.service import CHANNEL_OPTIONS, call_metadata, open_channel

TIMEOUT_S = 120.0
CONNECT_TIMEOUT_S = 10.0
# gRPC waits between attempts to connect, by default up to two minutes after a server came back.
_FIRST_RECONNECT_MS = 200
_MAX_RECONNECT_MS = 5_000


def channel_options(connect_timeout_s: float) -> list[tuple[str, int]]:
    """Return channel options that bound one attempt to connect by ``connect_timeout_s``."""
    milliseconds = min(int(connect_timeout_s * 1000), 2**31 - 1)
    return [
        *CHANNEL_OPTIONS,
        ("grpc.min_reconnect_backoff_ms", milliseconds),  # gRPC's name for the connect time limit
        ("grpc.initial_reconnect_backoff_ms", _FIRST_RECONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
        ("grpc.use_local_subchannel_pool", 1),  # a new client does not inherit another's backoff
    ]


class Endpoint:
    """A checked address with its time limits, and what is shown there.

    Attributes:
        metadata: Headers of every call.

    Raises:
        ConfigurationError: The address can be no gRPC target, or a file of the credentials is bad.
        LimitError: A time limit is not positive and finite.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float,
        connect_timeout_s: float,
        credentials: ClientCredentials = ANONYMOUS,
    ) -> None:
        self.address = check_address(address)
        self.timeout_s = check_seconds("timeout_s", timeout_s)
        self.connect_timeout_s = check_seconds("connect_timeout_s", connect_timeout_s)
        self.metadata = call_metadata(credentials)
        self._credentials = credentials
        self._tls = credentials.channel()

    def open(self) -> Any:
        """Return a blocking channel; nothing connects before the first call."""
        options = channel_options(self.connect_timeout_s)
        if self._tls is None:
            return grpc.insecure_channel(self.address, options=options)
        return grpc.secure_channel(self.address, self._tls, options=options)

    def open_async(self) -> grpc.aio.Channel:
        """Return a channel of the running event loop; nothing connects before the first call."""
        return open_channel(
            self.address, self._credentials, channel_options(self.connect_timeout_s)
        )

    def time_limit(self, timeout_s: float | None) -> float:
        """Return one call's time limit in seconds: its own if given, else the client's."""
        return self.timeout_s if timeout_s is None else check_seconds("timeout_s", timeout_s)

    def error(self, error: grpc.RpcError) -> KVStrataError:
        """Return the error of our tree for ``error``."""
        if error.code() is grpc.StatusCode.CANCELLED:
            return self.gone(error.details() or "cancelled")
        return from_rpc_error(error, self.address)

    def gone(self, details: str) -> KVStrataError:
        """Return the error for a call that the server or a closing client ended."""
        return UnavailableError(
            f"{self.address}: the call was cancelled: {details}",
            "keep the client open while it streams, or try again",
        )
