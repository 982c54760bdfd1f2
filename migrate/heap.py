"""What the C library keeps of freed memory, given back to the system.

An agent's sessions leave holes behind: their large buffers lie in one heap with the little that
stays. Without this an agent grows by 50 KiB with each migration, of which a fifth is in use.
"""

from __future__ import annotations

import ctypes

_libc = ctypes.CDLL(None)

# malloc.h
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8


def keep_small() -> None:
    """For a process that lives long, at its start: few heaps, large buffers outside of them.

    glibc makes a heap for each thread that allocates, eight for each core, and moves the size from
    which on a buffer is mapped for itself up to whatever was freed last (mallopt(3)). Both leave a
    process with threads that come and go with holes in many places.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 2)
        mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def give_back() -> None:
    """malloc_trim(3), of glibc; nothing where the C library has none. Some milliseconds for 30 MiB;
    other threads run meanwhile, but wait when they allocate."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)
