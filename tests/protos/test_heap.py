"""Freed memory stays for the next message."""

import resource
import subprocess
import sys

from kvstrata.protos.heap import keep_freed_memory

MESSAGES = """
import resource
from kvstrata.protos.heap import keep_freed_memory

def page_faults_of(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        message, copy = b"m" * 1_200_000, bytearray(1_100_000)
        del message, copy
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
page_faults_of(10)
print(page_faults_of(200))
"""


def test_messages_of_a_mebibyte_cost_no_page_faults() -> None:
    if not keep_freed_memory():
        return  # no glibc: nothing to tell
    done = subprocess.run(
        [sys.executable, "-P", "-c", MESSAGES], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    pages = 200 * 2_300_000 // resource.getpagesize()
    assert int(done.stdout) < pages / 50
