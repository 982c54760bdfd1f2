"""A page that the pager's processes and everybody else may look at: WORK/pager.state.

    u64 words, little-endian, in the order of PagerState; from word 32 on how many page faults
    waited for how long (core/latency.py); from byte 1024 on the error as UTF-8

The pager's two processes have it mapped and write to it; others read it as a file. It is allocated
when it is made, so no full disk keeps the end of a fill from being told. A word changes at once,
several do not: what belongs together is written before the word that says that it is there.

What is here outlives both processes: it is what an agent that starts later goes by.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from enum import IntEnum
from typing import TYPE_CHECKING, Final, Self

from criu_glue.core.latency import BUCKETS, bucket_of
from criu_glue.errors import CriuGlueError

if TYPE_CHECKING:
    from pathlib import Path

STATE_NAME: Final = "pager.state"
_BYTES: Final = 4096
_MAGIC: Final = int.from_bytes(b"dollypg1", "little")
_WAITS_AT: Final = 32
_ERROR_AT: Final = 1024
_ERROR_BYTES_MAX: Final = 2048


class PagerStateError(CriuGlueError):
    """There is no state of a pager here, or it is of another version."""


class Phase(IntEnum):
    """How far a pager is."""

    STARTING = 0
    LISTENING = 1
    # The tasks are about to run, or run.
    FILLING = 2
    # Everything is filled, and given back to the kernel.
    DONE = 3
    # It holds what it has until the tasks have ended.
    FAILED = 4


class _Word:
    """One word of the page, as an attribute."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __get__(self, state: PagerState, _: type[PagerState]) -> int:
        return state.words[self._index]

    def __set__(self, state: PagerState, value: int) -> None:
        state.words[self._index] = value


class PagerState:
    """The page, mapped by a pager (`create`) or as a copy of somebody else (`read`).

    Words that a pager's processes need of each other, and no one else:
    closing: a userfaultfd that is being closed, plus 1. connected: CRIU has come. overture: the
    signal to fill before the restore is finished has come. beat: turns of the worker's loop.
    deaths: of workers, since anything was filled; settled_then: bytes that were settled by then.
    """

    magic = _Word(0)
    # All processes of a pager are one process group.
    group = _Word(1)
    # Process ids, and the start times that tell them from later ones (proc_pid_stat(5), ticks).
    keeper = _Word(2)
    keeper_ticks = _Word(3)
    worker = _Word(4)
    worker_ticks = _Word(5)
    phase_word = _Word(6)
    # Left by the last process: 1 all is filled, 2 it failed and nobody waits for memory any more.
    ended = _Word(7)
    # How many of each there were.
    keepers = _Word(8)
    workers = _Word(9)
    # Restored tasks.
    tasks = _Word(10)
    # Never too few; counted anew twenty times a second.
    missing_bytes = _Word(11)
    # Pages that were needed before the fill brought them; how long they waited is in fault_waits.
    faults = _Word(12)
    filled_bytes = _Word(13)
    # Content of zeros: left to the kernel, which gives zeros by itself.
    zero_bytes = _Word(14)
    # There already when the fill came: never overwritten.
    present_bytes = _Word(15)
    # In no mapping when the fill came, though no event said so.
    unplaced_bytes = _Word(16)
    # When CRIU had finished (CLOCK_MONOTONIC), and how long the fill took from then on.
    restored_us = _Word(19)
    fill_us = _Word(20)
    # Address spaces that can't be filled.
    broken = _Word(21)
    closing = _Word(22)
    connected = _Word(23)
    overture = _Word(24)
    beat = _Word(25)
    deaths = _Word(26)
    settled_then = _Word(27)
    # There was no memory for the journal.
    journal_lost = _Word(28)
    _criu_number = 29
    _error_bytes = _Word(30)

    def __init__(self, page: memoryview) -> None:
        self._page = page
        self.words = page.cast("Q")

    @classmethod
    def create(cls, work: Path) -> Self:
        """Make and map the page; replaces what an earlier pager left. Raises OSError."""
        path = work / STATE_NAME
        path.unlink(missing_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
        try:
            os.posix_fallocate(fd, 0, _BYTES)
            state = cls(memoryview(mmap.mmap(fd, _BYTES)))
        finally:
            os.close(fd)
        state.magic = _MAGIC
        return state

    @classmethod
    def read(cls, work: Path) -> Self:
        """What a pager says now, or said last. Raises PagerStateError."""
        try:
            with (work / STATE_NAME).open("rb") as file:
                data = file.read(_BYTES)
        except OSError as error:
            raise PagerStateError(f"no pager was started in {work}: {error}") from error
        if len(data) != _BYTES or int.from_bytes(data[:8], "little") != _MAGIC:
            raise PagerStateError(f"{work / STATE_NAME} is not the state of such a pager")
        return cls(memoryview(data))

    @property
    def phase(self) -> Phase:
        """How far it is. Raises PagerStateError."""
        try:
            return Phase(self.phase_word)
        except ValueError as error:
            raise PagerStateError(f"a pager is in the unknown phase {self.phase_word}") from error

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self.phase_word = phase

    @property
    def error(self) -> str:
        """Why it failed, wholly or for some tasks; empty when it did not."""
        end = _ERROR_AT + min(self._error_bytes, _ERROR_BYTES_MAX)
        return bytes(self._page[_ERROR_AT:end]).decode(errors="replace")

    @error.setter
    def error(self, reason: str) -> None:
        data = reason.encode()[:_ERROR_BYTES_MAX]
        self._error_bytes = 0
        self._page[_ERROR_AT : _ERROR_AT + len(data)] = data
        self._error_bytes = len(data)

    @property
    def fault_waits(self) -> memoryview:
        """How many page faults waited for how long: the buckets of core/latency.py, as u64. From
        when a pager has heard of them, which may be a chunk of the fill later than they were."""
        return self.words[_WAITS_AT : _WAITS_AT + BUCKETS]

    def count_fault(self, waited_us: int) -> None:
        """A page that was needed is there."""
        self.faults += 1
        self.words[_WAITS_AT + bucket_of(waited_us)] += 1

    @property
    def criu_number(self) -> memoryview:
        """Four bytes, into which the number of CRIU's current message is received."""
        start = self._criu_number * 8
        return self._page[start : start + 4]

    @property
    def settled_bytes(self) -> int:
        """Memory that nobody has to fill any more."""
        return self.filled_bytes + self.zero_bytes + self.present_bytes + self.unplaced_bytes

    def set_phase(self, phase: Phase, alive: int) -> None:
        """Enter a phase and wake who watches (`tell`)."""
        self.phase = phase
        tell(alive)


def tell(alive: int) -> None:
    """Wake who watches the pager; `alive` is its FIFO (pager_watch.py)."""
    # Full: whoever reads it one day is woken anyway.
    with contextlib.suppress(BlockingIOError):
        os.write(alive, b".")
