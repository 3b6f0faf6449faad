"""The command ``kvstrata warmup``: what images and installations run once after installing."""

import json
import time
from typing import Annotated

import typer


def warmup(
    head_dim: Annotated[
        list[int] | None, typer.Option(help="Of the models to be served; default: 64 and 128.")
    ] = None,
) -> None:
    """Compile the CPU kernels, or load them: later processes start without compiling.

    NUMBA_CACHE_DIR says where machine code is kept; default: beside the package, else the user's
    cache folder.
    """
    from kvstrata.kernels.warmup import warm_up

    start = time.perf_counter()
    done = warm_up(tuple(head_dim or (64, 128)))
    print(
        json.dumps(
            {
                "compiled": done.num_compiled,
                "loaded": done.num_loaded,
                "took_s": round(time.perf_counter() - start, 3),
                "ops_s": {name: round(seconds, 3) for name, seconds in done.seconds.items()},
            }
        )
    )
