"""PAGEMAP_SCAN: which pages of a range are present or written, and protecting them in one step.

One `PageScanner` walks mapping by mapping and appends the kernel's regions to one vector, so that
a task costs a system call per mapping and one numpy conversion, however many pages it has:

    vector   [start, end, categories] [start, end, categories] ...      u64 each, as the kernel's
    runs     [start, (end - start) / PAGE_BYTES]                        adjacent ones merged

A page counts when it is present or swapped and neither the shared zero page nor a guard page:
what CRIU itself dumps (criu/pagemap-cache.c: pmc_fill). Asking for present or swapped also keeps
the kernel from leaving a marker on every page of a range that has no page at all.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from criu_glue import kernel
from criu_glue.errors import TaskGoneError, TrackerError, TrackerUnsupportedError

# Regions in the vector (1.5 MiB): enough for 256 MiB of which every other page is dirty.
VECTOR_REGIONS: Final = 1 << 16
# Empty it into a list of blocks when fewer are free; also bounds the calls for one mapping.
_VECTOR_RESERVE: Final = 1 << 10
_REGION_WORDS: Final = 3


class PageScanner:
    """A reusable vector for PAGEMAP_SCAN. Not for several threads at once."""

    def __init__(self) -> None:
        self._vector = np.zeros((VECTOR_REGIONS, _REGION_WORDS), dtype=np.uint64)
        self._address = self._vector.ctypes.data
        self._used = 0
        self._blocks: list[npt.NDArray[np.uint64]] = []
        self._argument = kernel.PmScanArg(size=ctypes.sizeof(kernel.PmScanArg))
        self._absent = kernel.PAGE_IS_PFNZERO | _known_guard_category()

    def walk(
        self, pagemap_fd: int, start: int, end: int, *, written: bool, tracked: bool, protect: bool
    ) -> int:
        """Append the pages of [start, end) to what `take` returns.

        pagemap_fd: an open /proc/PID/pagemap. written: only written ones, else all present.
        tracked: stop at a mapping that has no asynchronous write-protection. protect: write-protect
        (atomically with the report, page by page) every page that is appended.

        Returns the address that the walk has come to: `end`, or less when such a mapping lies
        between that address and the end. Some pages from there on may then have been protected
        without having been appended: append all present ones, or they are lost.
        """
        argument = self._argument
        argument.flags = (kernel.PM_SCAN_WP_MATCHING if protect else 0) | (
            kernel.PM_SCAN_CHECK_WPASYNC if tracked else 0
        )
        argument.end = end
        argument.category_inverted = self._absent
        argument.category_mask = self._absent | (kernel.PAGE_IS_WRITTEN if written else 0)
        argument.category_anyof_mask = kernel.PAGE_IS_PRESENT | kernel.PAGE_IS_SWAPPED
        argument.return_mask = kernel.PAGE_IS_WRITTEN
        while start < end:
            if VECTOR_REGIONS - self._used < _VECTOR_RESERVE:
                self._flush()
            argument.start = start
            argument.vec = self._address + self._used * _REGION_WORDS * 8
            argument.vec_len = VECTOR_REGIONS - self._used
            try:
                found = kernel.ioctl(pagemap_fd, kernel.PAGEMAP_SCAN, argument)
                self._used += found
            except OSError as error:
                if error.errno == errno.EPERM and tracked:
                    return start
                if error.errno == errno.ESRCH:
                    raise TaskGoneError(f"the memory at {start:#x} is gone") from error
                if error.errno in (errno.ENOTTY, errno.EINVAL):
                    raise TrackerUnsupportedError("no PAGEMAP_SCAN (Linux >= 6.7)") from error
                raise TrackerError(f"PAGEMAP_SCAN of {start:#x}-{end:#x}: {error}") from error
            # `walk_end` stays where the kernel's own buffer of 512 regions was last full, also
            # when the walk went on from there to the end (fs/proc/task_mmu.c: do_pagemap_scan).
            # What it has reported is the better witness, and must not be reported twice.
            reached = max(argument.walk_end, int(self._vector[self._used - 1, 1]) if found else 0)
            if reached <= start:
                raise TrackerError(f"PAGEMAP_SCAN makes no progress at {start:#x}")
            start = reached
        return end

    def take(self) -> npt.NDArray[np.uint64]:
        """The runs of all walks since the last `take` (ascending walks give sorted runs); the
        array is the caller's."""
        self._flush()
        regions = np.concatenate(self._blocks) if self._blocks else self._vector[:0].copy()
        self._blocks.clear()
        return merged(regions)

    def _flush(self) -> None:
        if self._used:
            self._blocks.append(self._vector[: self._used].copy())
            self._used = 0


def merged(regions: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The runs of ascending regions [start, end, …], adjacent ones joined."""
    if not len(regions):
        return np.empty((0, 2), dtype=np.uint64)
    starts, ends = regions[:, 0], regions[:, 1]
    first = np.ones(len(regions), dtype=np.bool_)
    np.not_equal(starts[1:], ends[:-1], out=first[1:])
    last = np.ones(len(regions), dtype=np.bool_)
    last[:-1] = first[1:]
    runs = np.empty((int(first.sum()), 2), dtype=np.uint64)
    runs[:, 0] = starts[first]
    runs[:, 1] = (ends[last] - starts[first]) // np.uint64(kernel.PAGE_BYTES)
    return runs


def _known_guard_category() -> int:
    """PAGE_IS_GUARD where the kernel knows it (madvise's MADV_GUARD_INSTALL is 6.13, this bit
    6.15). Without it guard pages count as swapped, and reading them fails: nothing is lost."""
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        kernel.ioctl(
            fd,
            kernel.PAGEMAP_SCAN,
            kernel.PmScanArg(
                size=ctypes.sizeof(kernel.PmScanArg),
                end=kernel.PAGE_BYTES,
                category_mask=kernel.PAGE_IS_GUARD,
            ),
        )
    except OSError:
        return 0
    finally:
        os.close(fd)
    return kernel.PAGE_IS_GUARD
