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

import errno
import os
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Final

from criu_glue.core.fill_journal import Kind
from criu_glue.core.fill_map import Run
from criu_glue.errors import CriuGlueError, TaskGoneError
from criu_glue.kernel import (
    PAGE_BYTES,
    UFFDIO_COPY,
    UFFDIO_WAKE,
    UFFDIO_ZEROPAGE,
    UffdioCopy,
    UffdioRange,
    UffdioZeropage,
    ioctl,
)

if TYPE_CHECKING:
    from criu_glue.core.fill_journal import Space
    from criu_glue.fill_source import Buffer, StoreFile
    from criu_glue.pager_journal import Journal
    from criu_glue.pager_state import PagerState

# Filled with a faulting page when they follow it: costs 15 µs more, and saves most faults of a
# task that walks through its memory.
FAULT_AROUND_PAGES: Final = 16
# Fresh pages given to a task that walks through memory it never used.
ZERO_AROUND_PAGES: Final = 64
# Ranges of userfaultfd's ioctls are within vm.mmap_min_addr and the end of user space.
_LOWEST_ADDRESS: Final = 1 << 16
_ADDRESS_END: Final = 0x7FFF_FFFF_F000


class UffdError(CriuGlueError):
    """The kernel refused to fill a page for a reason that should not occur."""


class Filled(Enum):
    """How an attempt to fill ended."""

    DONE = "done"
    # The mappings are changing: read the events, then try again.
    AGAIN = "again"
    # The task's cgroup has no memory left: try again after a while, it may get some.
    NO_MEMORY = "no memory"


@dataclass(slots=True)
class Events:
    """What one read of a userfaultfd brought, mappings already taken account of."""

    faults: list[int] = field(default_factory=list)
    children: list[UffdMemory] = field(default_factory=list)


def _copy(uffd: int, address: int, source: int, bytes_: int) -> tuple[int, int]:
    """UFFDIO_COPY once: bytes copied (0 if none) and the errno when that is not all."""
    # `copy` is not written by kernels before 6.16 when mappings change: it must begin as 0.
    argument = UffdioCopy(address, source, bytes_, 0, 0)
    try:
        ioctl(uffd, UFFDIO_COPY, argument)
    except OSError as error:
        return max(int(argument.copy), 0), error.errno or 0
    return bytes_, 0


def is_gone(uffd: int) -> bool:
    """Whether the address space of a userfaultfd has ended; changes nothing."""
    # Nothing can be copied from address 0. How it fails tells whether there is anybody.
    return _copy(uffd, _LOWEST_ADDRESS, 0, PAGE_BYTES)[1] == errno.ESRCH


def close_uffd(space: Space, journal: Journal, state: PagerState) -> None:
    """Close an address space's userfaultfd for both processes, and say so in the journal; `closing`
    tells a worker that comes in between that it has been left open."""
    state.closing = space.uffd + 1
    journal.closed(space.number)
    os.close(space.uffd)
    state.closing = 0


class UffdMemory:
    """The memory of one address space that is being filled. Owns `uffd`.

    Methods raise TaskGoneError when the address space does not exist any more, and UffdError for
    what should not occur.
    """

    def __init__(self, space: Space, store: StoreFile, journal: Journal, state: PagerState) -> None:
        """`space`: as the journal knows it; `state` counts what is filled."""
        self.space = space
        self.uffd = space.uffd
        self.task = space.task
        self.missing = space.missing
        self.store = store
        self.journal = journal
        self.state = state
        # Where the background fill goes on: behind the last page fault.
        self.cursor = 0
        store.users.append(self)

    def close(self) -> None:
        """Give the userfaultfd back to the kernel. Whatever is still missing becomes zeros, so
        only when nothing is, or when the task is gone."""
        close_uffd(self.space, self.journal, self.state)
        self.store.leave(self)

    def read_events(self) -> Events:
        """Read what the kernel has to tell and apply it; empty when there is nothing."""
        found = Events()
        for kind, first, second, third in self.journal.read(self.space.number, self.uffd):
            if kind == Kind.PAGEFAULT:
                found.faults.append(second & -PAGE_BYTES)
            elif kind == Kind.FORK:
                child = self.space.forked(self.journal.next_number(), first)
                found.children.append(UffdMemory(child, self.store, self.journal, self.state))
            else:
                self.space.apply(kind, first, second, third)
        return found

    def wake_all(self) -> None:
        """Have everybody fault again who waits for a page that another pager was to bring."""
        everything = UffdioRange(_LOWEST_ADDRESS, _ADDRESS_END - _LOWEST_ADDRESS)
        ioctl(self.uffd, UFFDIO_WAKE, everything)

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
            self.state.zero_bytes += data - run.start
            self.cursor = data
            return Filled.DONE
        window = Run(run.start, run.start + len(buffer.view), run.shift)
        result = self._fill_window(window, buffer, give_up=True)
        if result is Filled.DONE:
            self.cursor = window.end
        return result

    def is_gone(self) -> bool:
        """Whether the address space has ended; changes nothing."""
        return is_gone(self.uffd)

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
                    self.state.zero_bytes += bytes_
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
            copied, number = _copy(
                self.uffd, address + done, source + done, min(attempt, bytes_ - done)
            )
            if copied > 0:
                done += copied
                self.state.filled_bytes += copied
            elif number == errno.EEXIST:
                done += PAGE_BYTES
                self.state.present_bytes += PAGE_BYTES
            elif number == errno.ENOENT:
                # Not inside one registered mapping: find out by halves where it ends.
                if attempt > PAGE_BYTES:
                    attempt = max(attempt // 2 & -PAGE_BYTES, PAGE_BYTES)
                elif give_up:
                    done += PAGE_BYTES
                    self.state.unplaced_bytes += PAGE_BYTES
                else:
                    return done, Filled.DONE
            elif number == errno.EAGAIN:
                return done, Filled.AGAIN
            elif number == errno.ENOMEM:
                return done, Filled.NO_MEMORY
            else:
                self._raise(number, "copy", address + done)
        return done, Filled.DONE

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
