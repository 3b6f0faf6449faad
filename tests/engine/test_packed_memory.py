"""What products keep of each number of rows that they have seen is bounded."""

import subprocess
import sys

SCRIPT = """
import psutil, torch
from kvstrata.engine.packed_linear import PackedLinear

layers = [PackedLinear([torch.randn(n, n)], [None]) for n in (256, 320, 384, 448)]
process, before = psutil.Process(), 0
for num_rows in range(17, 257):
    for layer in layers:
        layer(torch.zeros(num_rows, layer.num_outputs))
    if num_rows == 64:
        before = process.memory_info().rss
print(process.memory_info().rss - before)
"""


def test_passes_of_ever_other_sizes_do_not_take_ever_more_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert int(done.stdout) < 64 << 20
