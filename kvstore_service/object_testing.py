"""A real S3 service on the loopback for tests."""

import http.client
import itertools
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Self

from kvstrata.kvstore_service.redis_binary import free_port
from kvstrata.protos.errors import ConfigurationError


class S3Server:
    """``moto``'s server on a free port, as a child process that forgets everything when it ends.

    Attributes:
        environment: How a store process reaches it, credentials included.
    """

    def __init__(self) -> None:
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "access-key-of-tests",
            "AWS_SECRET_ACCESS_KEY": "secret-key-of-tests",
        }

    def __enter__(self) -> Self:
        self.restart()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def kill(self) -> None:
        """End it at once, as a crash would. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Let it hang: connections stay, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Start it, empty, on the same port, and return when it answers."""
        self.kill()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                self._request("GET", "/")
                return
            except OSError:
                time.sleep(0.02)
        raise ConfigurationError(f"moto's server did not answer on port {self._port}")

    def make_bucket(self, name: str = "") -> str:
        """Make an empty bucket and return its name, a new one unless it is given."""
        name = name or f"bucket-{next(self._numbers)}"
        assert self._request("PUT", f"/{name}") == 200
        return name

    def _request(self, method: str, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request(method, path)
            return connection.getresponse().status
        finally:
            connection.close()
