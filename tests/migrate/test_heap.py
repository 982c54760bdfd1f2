"""Freed memory goes back to the system."""

from __future__ import annotations

import subprocess
import sys

# Every second block is freed, and one at the end stays: the heap can't shrink by itself.
PROGRAM = """
import ctypes
from migrate import heap

def rss_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
blocks = [libc.malloc(64 << 10) for _ in range(1000)]
for block in blocks:
    ctypes.memset(ctypes.c_void_p(block), 1, 64 << 10)
for block in blocks[::2]:
    libc.free(block)
before = rss_kib()
heap.give_back()
print(before - rss_kib())
"""


def test_holes_in_the_heap_are_given_back() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 20 << 10
