"""Filling one address space through its userfaultfd.

    page store file --pread--> buffer --UFFDIO_COPY--> task's memory

One object per address space: a restored task, or a child that it forked while parts were still
missing. It holds the map of what is missing, keeps it true to what the task does to its mappings
(the events of the userfaultfd), and copies pages. It decides nothing about order or time, starts
no thread, and never blocks.

Rules that keep content right, all from fs/userfaultfd.c and mm/userfaultfd.c:
- While a mapping changes the kernel refuses copies (EAGAIN) until the event was read and whoever
  caused it ran on. One thread reads events, decides and copies, so a decision is never older than
  the events read, and a copy never lands after a later change.
- Events are applied before the page faults that were read with them: a fault may already be at
  the place that a page was moved to.
- What was removed or unmapped leaves the map: it reads as zeros from then on, also if mapped again.
- A page that exists is never overwritten (EEXIST).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from criu_glue.core.fill_map import Run
from criu_glue.errors import CriuGlueError, TaskGoneError
from criu_glue.kernel import (
    PAGE_BYTES,
    UFFD_EVENT_FORK,
    UFFD_EVENT_PAGEFAULT,
    UFFD_EVENT_REMAP,
    UFFD_EVENT_REMOVE,
    UFFD_EVENT_UNMAP,
    UFFD_MSG_BYTES,
    UFFDIO_COPY,
    UFFDIO_WAKE,
    UFFDIO_ZEROPAGE,
    UffdioCopy,
    UffdioRange,
    UffdioZeropage,
    ioctl,
)
from criu_glue.page_store import punch_hole

if TYPE_CHECKING:
    import numpy.typing as npt

    from criu_glue.core.fill_map import FillMap

# Copied between two looks at the page faults: 120 µs measured, which is what a fault may wait.
# Larger chunks fill no faster.
CHUNK_BYTES: Final = 256 << 10
# Filled with a faulting page when they follow it: costs 15 µs more, and saves most faults of a
# task that walks through its memory.
FAULT_AROUND_PAGES: Final = 16
# Fresh pages given to a task that walks through memory it never used.
ZERO_AROUND_PAGES: Final = 64
# Messages read at once. A task with more threads has its other faults read in the next turn.
_MESSAGES: Final = 64

_WORDS: Final = PAGE_BYTES // 8
_READ_BYTES: Final = _MESSAGES * UFFD_MSG_BYTES


class UffdError(CriuGlueError):
    """The kernel refused to fill a page for a reason that should not occur."""


class Filled(Enum):
    """How an attempt to fill ended."""

    DONE = "done"
    # The mappings are changing: read the events, then try again.
    AGAIN = "again"
    # The task's cgroup has no memory left: try again after a while, it may get some.
    NO_MEMORY = "no memory"


class StoreFile:
    """A task's file in the page store, shared by the task and the children it forks."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        # Everybody that may still need its content.
        self.users: list[UffdMemory] = []
        self._unpunched: list[tuple[int, int]] = []

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out`; holes read as zeros."""
        done = 0
        while done < len(out):
            count = os.preadv(self._fd, [out[done:]], offset + done)
            if not count:
                raise UffdError("the page store is shorter than the address space")
            done += count

    def next_data(self, offset: int, end: int) -> int:
        """The first offset in [offset, end) that has content, or `end`."""
        try:
            return min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return end
            raise

    def release(self, start: int, end: int, by: UffdMemory | None = None) -> None:
        """Give the memory of [start, end) back, now or as soon as nobody needs it any more; `by`
        is known not to."""
        if any(user is not by and user.missing.needs_stored(start, end) for user in self.users):
            self._unpunched.append((start, end))
        else:
            punch_hole(self._fd, start, end - start)

    def leave(self, user: UffdMemory) -> None:
        """`user` needs nothing any more; closes the file after the last one."""
        self.users.remove(user)
        if not self.users:
            os.close(self._fd)
            return
        waiting, self._unpunched = self._unpunched, []
        for start, end in waiting:
            self.release(start, end)


class Buffer:
    """Page-aligned scratch memory whose address the kernel can be given."""

    def __init__(self, bytes_: int) -> None:
        self._memory = mmap.mmap(-1, bytes_)
        self.view = memoryview(self._memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._words = np.frombuffer(self._memory, dtype=np.uint64).reshape(-1, _WORDS)
        self._zero: npt.NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._any_zero = False

    def find_zeros(self, pages: int) -> None:
        """Look which of the first `pages` pages are all zero, for `pieces` and `is_zero`."""
        words = self._words[:pages]
        # Three words of a page tell nearly always; only where they don't, all are read.
        self._zero = (words[:, 0] | words[:, _WORDS // 2] | words[:, -1]) == 0
        for page in np.flatnonzero(self._zero):
            self._zero[page] = not words[page].any()
        self._any_zero = bool(self._zero.any())

    def is_zero(self, page: int) -> bool:
        """Whether a page is all zero."""
        return bool(self._zero[page])

    def pieces(self, start: int, end: int) -> list[tuple[int, int, bool]]:
        """[start, end) cut into pieces that are all zero or have no such page: offsets in bytes,
        (start, end, is zero)."""
        if not self._any_zero:
            return [(start, end, False)]
        zero = self._zero[start // PAGE_BYTES : end // PAGE_BYTES]
        edges = (np.flatnonzero(zero[1:] != zero[:-1]) + 1).tolist()
        places = [start + page * PAGE_BYTES for page in (0, *edges, len(zero))]
        first = bool(zero[0])
        return [
            (begin, after, first == (number % 2 == 0))
            for number, (begin, after) in enumerate(pairwise(places))
        ]


@dataclass(slots=True)
class Counters:
    """What was done so far; bytes of memory."""

    faults: int = 0
    filled_bytes: int = 0
    # Content of zeros: left to the kernel, which gives zeros by itself.
    zero_bytes: int = 0
    # There already when the fill came: never overwritten.
    present_bytes: int = 0
    # In no mapping when the fill came, though no event said so.
    unplaced_bytes: int = 0


@dataclass(slots=True)
class Events:
    """What one read of a userfaultfd brought, mappings already taken account of."""

    faults: list[int] = field(default_factory=list)
    forked_uffds: list[int] = field(default_factory=list)


class UffdMemory:
    """The memory of one address space that is being filled. Owns `uffd`.

    Methods raise TaskGoneError when the address space does not exist any more, and UffdError for
    what should not occur.
    """

    def __init__(
        self, uffd: int, task: int, missing: FillMap, store: StoreFile, counters: Counters
    ) -> None:
        self.uffd = uffd
        self.task = task
        self.missing = missing
        self.store = store
        self.counters = counters
        # Where the background fill goes on: behind the last page fault.
        self.cursor = 0
        store.users.append(self)

    def forked(self, uffd: int) -> UffdMemory:
        """The child's memory: it misses what the parent missed when it forked."""
        return UffdMemory(uffd, self.task, self.missing.copy(), self.store, self.counters)

    def close(self) -> None:
        """Give the userfaultfd back to the kernel. Whatever is still missing becomes zeros, so
        only when nothing is, or when the task is gone."""
        os.close(self.uffd)
        self.store.leave(self)

    def read_events(self) -> Events:
        """Read what the kernel has to tell and apply it; empty when there is nothing."""
        found = Events()
        try:
            data = os.read(self.uffd, _READ_BYTES)
        except BlockingIOError:
            return found
        for offset in range(0, len(data), UFFD_MSG_BYTES):
            event = data[offset]
            first, second, third = struct.unpack_from("<QQQ", data, offset + 8)
            if event == UFFD_EVENT_PAGEFAULT:
                found.faults.append(second & -PAGE_BYTES)
            elif event in (UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP):
                self.missing.remove(first, second)
            elif event == UFFD_EVENT_REMAP:
                self.missing.move(first, second, third)
            elif event == UFFD_EVENT_FORK:
                found.forked_uffds.append(first & 0xFFFF_FFFF)
            else:
                raise UffdError(f"unknown event {event:#x} of a userfaultfd")
        return found

    def serve_fault(self, address: int, buffer: Buffer) -> Filled:
        """Fill the page at `address`, and some behind it, and wake whoever waits for it."""
        run = self.missing.find(address)
        if run is None:
            return self._give_zeros(address)
        end = address + FAULT_AROUND_PAGES * PAGE_BYTES
        result = self._fill_window(Run(address, end, run.shift), buffer, give_up=False)
        self.cursor = end
        if result is not Filled.DONE:
            return result
        if self.missing.find(address) is None and buffer.is_zero(0):
            return self._give_zeros(address)
        # A copy wakes; but the page may have been there, or its mapping gone.
        self._wake(address)
        return Filled.DONE

    def fill_some(self, buffer: Buffer) -> Filled:
        """Fill the next chunk behind the cursor. Only to be called when something is missing, and
        when all mappings are registered: what is in no mapping is given up."""
        run = self.missing.first_from(self.cursor)
        assert run is not None, "nothing is missing"
        data = self.store.next_data(run.start - run.shift, run.end - run.shift) + run.shift
        data &= -PAGE_BYTES
        if data > run.start:
            self._forget(run.start, data, run.shift)
            self.counters.zero_bytes += data - run.start
            self.cursor = data
            return Filled.DONE
        window = Run(run.start, run.start + len(buffer.view), run.shift)
        result = self._fill_window(window, buffer, give_up=True)
        if result is Filled.DONE:
            self.cursor = window.end
        return result

    def is_gone(self) -> bool:
        """Whether the address space has ended; changes nothing."""
        run = next(iter(self.missing), None)
        if run is None:
            return False
        # A copy from address 0 fails in every case; how, depends on whether there is anybody.
        return self._copy(run.start, 0, PAGE_BYTES)[1] == errno.ESRCH

    def _fill_window(self, window: Run, buffer: Buffer, *, give_up: bool) -> Filled:
        """Fill what is missing inside a window and comes from one piece of the store: one read of
        the store for many small runs. The buffer holds the window's content afterwards."""
        runs = self.missing.overlapping(window.start, window.end)
        end = min(runs[-1].end, window.end)
        self.store.read_into(window.start - window.shift, buffer.view[: end - window.start])
        buffer.find_zeros((end - window.start) // PAGE_BYTES)
        for run in runs:
            if run.shift != window.shift:
                continue
            low, high = max(run.start, window.start), min(run.end, end)
            offset = low - window.start
            for begin, after, is_zero in buffer.pieces(offset, high - window.start):
                start, bytes_ = window.start + begin, after - begin
                if is_zero:
                    settled, result = bytes_, Filled.DONE
                    self.counters.zero_bytes += bytes_
                else:
                    source = buffer.address + begin
                    settled, result = self._copy_all(start, source, bytes_, give_up=give_up)
                if settled:
                    self._forget(start, start + settled, run.shift)
                if result is not Filled.DONE or settled < bytes_:
                    return result
        return Filled.DONE

    def _forget(self, start: int, end: int, shift: int) -> None:
        self.missing.remove(start, end)
        self.store.release(start - shift, end - shift, by=self)

    def _copy_all(
        self, address: int, source: int, bytes_: int, *, give_up: bool
    ) -> tuple[int, Filled]:
        """Copy until all is settled or has to wait; returns the bytes settled from the front.
        Without `give_up` it also ends where there is no registered mapping."""
        done, attempt = 0, bytes_
        while done < bytes_:
            copied, number = self._copy(address + done, source + done, min(attempt, bytes_ - done))
            if copied > 0:
                done += copied
                self.counters.filled_bytes += copied
            elif number == errno.EEXIST:
                done += PAGE_BYTES
                self.counters.present_bytes += PAGE_BYTES
            elif number == errno.ENOENT:
                # Not inside one registered mapping: find out by halves where it ends.
                if attempt > PAGE_BYTES:
                    attempt = max(attempt // 2 & -PAGE_BYTES, PAGE_BYTES)
                elif give_up:
                    done += PAGE_BYTES
                    self.counters.unplaced_bytes += PAGE_BYTES
                else:
                    return done, Filled.DONE
            elif number == errno.EAGAIN:
                return done, Filled.AGAIN
            elif number == errno.ENOMEM:
                return done, Filled.NO_MEMORY
            else:
                self._raise(number, "copy", address + done)
        return done, Filled.DONE

    def _copy(self, address: int, source: int, bytes_: int) -> tuple[int, int]:
        """UFFDIO_COPY once: bytes copied (0 if none) and the errno when that is not all."""
        # `copy` is not written by kernels before 6.16 when mappings change: it must begin as 0.
        argument = UffdioCopy(address, source, bytes_, 0, 0)
        try:
            ioctl(self.uffd, UFFDIO_COPY, argument)
        except OSError as error:
            return max(int(argument.copy), 0), error.errno or 0
        return bytes_, 0

    def _give_zeros(self, address: int) -> Filled:
        """Zeros for a page that is not missing, and for those behind it until one is."""
        limit = address + ZERO_AROUND_PAGES * PAGE_BYTES
        end = min(self.missing.next_start(address) or limit, limit)
        # Several pages may reach over the end of the mapping; one page cannot.
        for bytes_ in (end - address, PAGE_BYTES):
            argument = UffdioZeropage(address, bytes_, 0, 0)
            try:
                ioctl(self.uffd, UFFDIO_ZEROPAGE, argument)
            except OSError as error:
                if argument.zeropage > 0:
                    return Filled.DONE
                number = error.errno or 0
            else:
                return Filled.DONE
            if number == errno.ENOENT and bytes_ > PAGE_BYTES:
                continue
            if number in (errno.EEXIST, errno.ENOENT):
                # Somebody else put a page there, or it is unmapped: either way go and look.
                self._wake(address)
                return Filled.DONE
            if number == errno.EAGAIN:
                return Filled.AGAIN
            if number == errno.ENOMEM:
                return Filled.NO_MEMORY
            self._raise(number, "zero", address)
        return Filled.DONE

    def _wake(self, address: int) -> None:
        ioctl(self.uffd, UFFDIO_WAKE, UffdioRange(address, PAGE_BYTES))

    def _raise(self, number: int, what: str, address: int) -> None:
        if number == errno.ESRCH:
            raise TaskGoneError(f"task {self.task} has ended")
        raise UffdError(
            f"task {self.task}: can't {what} pages at {address:#x}: {os.strerror(number)}"
        )
