"""Reading the memory of a task that runs or is frozen. Knows no tracker and keeps no copy.

The fast way is process_vm_readv(2): up to 1,024 runs in one call, the GIL released. It honours
the mapping's protection, so it stops at a page without read permission; such a run is finished
through /proc/PID/mem, which reads those too (FOLL_FORCE; a kernel built with
CONFIG_PROC_MEM_NO_FORCE refuses, and the pages are then reported as unreadable).
"""

from __future__ import annotations

import bisect
import errno
import os
from typing import TYPE_CHECKING, Final

import numpy as np

from criu_glue import kernel
from criu_glue.errors import CriuGlueError, TaskGoneError
from criu_glue.mappings import Task, parse_maps

if TYPE_CHECKING:
    import numpy.typing as npt

PAGE_BYTES: Final = kernel.PAGE_BYTES
# A read of more would be split by the kernel anyway (MAX_RW_COUNT, 2 GiB less a page), and a
# caller with a buffer of that size has lost count.
READ_BYTES_MAX: Final = 1 << 30


class TaskMemory:
    """The memory of one task (thread group), by its host pid.

    `read` may be called by several threads at once. Raises TaskGoneError at construction when
    there is no such task; a task that exits later is not an error, its pages are unreadable.
    """

    def __init__(self, pid: int) -> None:
        self._task = Task(pid)
        # Whose name reaches the memory: the main thread, until it has exited before the others.
        self._thread = pid

    def read(self, runs: npt.NDArray[np.uint64], out: memoryview) -> npt.NDArray[np.bool_]:
        """Read pages into a buffer.

        runs: shape (n, 2), columns [address, pages], page aligned, at most 1 GiB in all.
        out: writable and contiguous, PAGE_BYTES for each page. The caller keeps owning it.

        Page i of the runs, counted in their order, lies at out[i * PAGE_BYTES :] whatever happens
        to the others. Returns a mask with one entry per page, False for a page that could not be
        read (unmapped meanwhile, a guard page, the task has exited): its bytes in `out` are
        undefined. A page that is written while it is read may be torn; the next collect of a
        tracker reports it.
        """
        pages = int(runs[:, 1].sum())
        total_bytes = pages * PAGE_BYTES
        buffer = np.frombuffer(out, dtype=np.uint8)
        if total_bytes > min(len(buffer), READ_BYTES_MAX) or not buffer.flags.writeable:
            raise ValueError(f"{total_bytes} bytes do not fit a buffer of {len(buffer)}")
        remote = np.empty((len(runs), 2), dtype=np.uint64)
        remote[:, 0] = runs[:, 0]
        remote[:, 1] = runs[:, 1] * PAGE_BYTES
        ends = np.cumsum(remote[:, 1], dtype=np.int64)
        mask = np.ones(pages, dtype=np.bool_)

        row, position = 0, 0
        while row < len(remote):
            batch = remote[row : row + kernel.IOV_MAX]
            expected = int(ends[row + len(batch) - 1]) - position
            got = self._read_fast(buffer.ctypes.data + position, expected, batch)
            if got == expected:
                row += len(batch)
                position += got
                continue
            position += got // PAGE_BYTES * PAGE_BYTES
            row = int(np.searchsorted(ends, position, side="right"))
            end = int(ends[row])
            address = int(remote[row].sum()) - (end - position)
            self._read_forced(
                address, buffer[position:end], mask[position // PAGE_BYTES : end // PAGE_BYTES]
            )
            row, position = row + 1, end
        if not self._task.alive():
            # Its pid may have been given to another task, and what was read may be that one's.
            mask[:] = False
        return mask

    def close(self) -> None:
        """Idempotent. Not while another thread reads."""
        self._task.close()

    def _read_fast(self, local_address: int, expected: int, batch: npt.NDArray[np.uint64]) -> int:
        """Bytes read; fewer than expected: the page behind them can't be read this way."""
        try:
            return kernel.process_vm_readv(self._thread, local_address, expected, batch)
        except OSError as error:
            if error.errno not in (errno.EFAULT, errno.ESRCH):
                raise CriuGlueError(f"reading task {self._task.pid}: {error}") from error
            if error.errno == errno.ESRCH:
                self._thread = self._living_thread()
            return 0

    def _living_thread(self) -> int:
        try:
            return self._task.living_thread()
        except TaskGoneError:
            return self._thread

    def _read_forced(
        self, address: int, out: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]
    ) -> None:
        """Read one run through /proc/PID/mem; what can't be read is False in `mask`."""
        try:
            thread = self._task.living_thread()
            fd = self._task.open(f"task/{thread}/mem")
        except TaskGoneError:
            mask[:] = False
            return
        try:
            starts_ends: tuple[list[int], list[int]] | None = None
            page = 0
            while page < len(mask):
                got = _pread(fd, address + page * PAGE_BYTES, out[page * PAGE_BYTES :])
                page += got // PAGE_BYTES
                if page == len(mask):
                    break
                if starts_ends is None:
                    starts_ends = self._mapped(thread)
                skipped = _unreadable_pages(address + page * PAGE_BYTES, *starts_ends)
                mask[page : page + skipped] = False
                page += skipped
        finally:
            os.close(fd)

    def _mapped(self, thread: int) -> tuple[list[int], list[int]]:
        try:
            mappings = parse_maps(self._task.read(f"task/{thread}/maps"))
        except TaskGoneError:
            return [], []
        return [mapping.start for mapping in mappings], [mapping.end for mapping in mappings]


def _pread(fd: int, address: int, out: npt.NDArray[np.uint8]) -> int:
    try:
        return os.preadv(fd, [out.data], address)
    except OSError as error:
        if error.errno in (errno.EIO, errno.EFAULT, errno.ESRCH):
            return 0
        raise CriuGlueError(f"reading memory at {address:#x}: {error}") from error


def _unreadable_pages(address: int, starts: list[int], ends: list[int]) -> int:
    """How many pages to give up from a page on that can't be read: one inside a mapping, all up
    to the next mapping outside of one (what was unmapped may have been gigabytes)."""
    following = bisect.bisect_right(starts, address)
    if following and address < ends[following - 1]:
        return 1
    if following == len(starts):
        return 1 << 52
    return (starts[following] - address) // PAGE_BYTES
