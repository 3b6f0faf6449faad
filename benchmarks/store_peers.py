"""LMCache and Mooncake for ``bench_store.py``: each a child process in their own environment.

``make peers`` installs them in ``.venv-peers``; their versions of other packages are not ours. A
child (``peer_lmcache.py``, ``peer_mooncake.py``) knows nothing of ours. It is told "put 4" or "get
4", four being the threads to use, does it with all KV of the blocks once, and answers seconds.
"""

import os
from pathlib import Path

from child_peer import version_of

ENVIRONMENT = Path(os.environ.get("KVSTRATA_PEERS", Path(__file__).parent.parent / ".venv-peers"))
PACKAGES = {"lmcache": "lmcache", "mooncake": "mooncake_transfer_engine_non_cuda"}


def versions() -> dict[str, str | None]:
    """Return the versions of the peers that are installed; None for those that are not."""
    return {name: version_of(ENVIRONMENT, package) for name, package in PACKAGES.items()}
