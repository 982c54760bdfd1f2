"""The pager's journal: memory that both of its processes share, and that the kernel writes to.

    [unit][unit][READING][message][message]...[0]      core/fill_journal.py says what is in it
                                           ^ end

A message is read from a userfaultfd right into the journal. So there is no moment in which only a
worker knows of it: it is either still in the kernel, where the task waits for somebody to read it,
or here. The same holds for the userfaultfd of a forked child, which the kernel puts into the table
of descriptors that both processes share (pager_pair.py).

Units that follow the end are page faults, which the next unit overwrites; they mean nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import TYPE_CHECKING, Final

from criu_glue.core.fill_journal import (
    TRANSIENT,
    UNIT,
    UNIT_BYTES,
    FillJournalError,
    Kind,
    encode,
    replay,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from criu_glue.core.fill_journal import Replayed
    from criu_glue.core.fill_map import FillMap
    from criu_glue.pager_state import PagerState

# No program gives memory up, moves it or forks a million times while its memory comes in, and a
# reader must not be made to read without end.
JOURNAL_BYTES_MAX: Final = UNIT_BYTES << 20
# Messages read at once. A task with more threads has its other faults read in the next turn.
_MESSAGES: Final = 64
_READ_BYTES: Final = _MESSAGES * UNIT_BYTES
# Memory is asked for in steps: where there is none, this fails and not a later write to it.
_STEP_BYTES: Final = 64 << 10

_libc = ctypes.CDLL(None)


class Journal:
    """Numbers the address spaces, and keeps what becomes of them. One process at a time writes."""

    def __init__(self, state: PagerState, bytes_max: int = JOURNAL_BYTES_MAX) -> None:
        """An empty one; processes forked from this one share it. Raises OSError."""
        self._state = state
        self._fd = os.memfd_create("pager-journal", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, bytes_max)
        self._bytes_max = bytes_max
        self._map = mmap.mmap(self._fd, bytes_max)
        os.ftruncate(self._fd, 0)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Where messages go once there is no room in the journal.
        self._scratch = memoryview(bytearray(_READ_BYTES))
        self._end = 0
        self._numbers = 0

    @property
    def is_complete(self) -> bool:
        """Whether there was room for everything so far."""
        return not self._state.journal_lost

    def resume(self, initial: Callable[[int], FillMap]) -> Replayed:
        """Read what another process has written, and go on behind it. Raises FillJournalError."""
        if not self.is_complete:
            raise FillJournalError("the pager's journal is not complete: it had no room")
        size = os.fstat(self._fd).st_size
        found = replay(bytes(self._view[:size]), initial)
        self._end, self._numbers = found.end, found.numbers
        self._pin(0, size)
        return found

    def opened(self, task: int, uffd: int) -> int:
        """A restored task; returns its number."""
        number = self.next_number()
        self._append(encode(Kind.OPENED, number, task, uffd))
        return number

    def next_number(self) -> int:
        """The number of the address space that was opened, or whose FORK was read."""
        self._numbers += 1
        return self._numbers

    def closed(self, number: int) -> None:
        """Nothing more will be filled there."""
        self._append(encode(Kind.CLOSED, number))

    def finished(self) -> None:
        """CRIU has finished the restore."""
        self._append(encode(Kind.FINISHED, 0))

    def read(self, number: int, uffd: int) -> list[tuple[int, int, int, int]]:
        """Read what the kernel has to tell of address space `number`: (kind, first, second, third)
        of each message, none when there is nothing. Raises OSError as read(2) does."""
        self._put(encode(Kind.READING, number), room=UNIT_BYTES + _READ_BYTES)
        start = self._end + UNIT_BYTES
        into = self._view[start : start + _READ_BYTES] if self.is_complete else self._scratch
        try:
            count = os.readv(uffd, [into])
        except BlockingIOError:
            return []
        units = [
            (kind, first, second, third)
            for kind, _, first, second, third in UNIT.iter_unpack(into[:count])
        ]
        if any(kind not in TRANSIENT for kind, *_ in units):
            self._end = start + count
        return units

    def _append(self, unit: bytes) -> None:
        self._put(unit, room=UNIT_BYTES)
        self._end += UNIT_BYTES

    def _put(self, unit: bytes, *, room: int) -> None:
        """Write at the end, the first byte last: this process may be killed at any instruction."""
        if self.is_complete and self._has_room(self._end + room):
            self._view[self._end + 1 : self._end + UNIT_BYTES] = unit[1:]
            self._view[self._end] = unit[0]

    def _has_room(self, size: int) -> bool:
        have = os.fstat(self._fd).st_size
        if size <= have:
            return True
        try:
            if size > self._bytes_max:
                raise FillJournalError(f"the journal is longer than {self._bytes_max} bytes")
            os.posix_fallocate(self._fd, have, min(_STEP_BYTES, self._bytes_max - have))
        except (OSError, FillJournalError):
            # No memory. This worker needs no journal, but the next one must not go by this one.
            self._state.journal_lost = 1
            return False
        self._pin(have, _STEP_BYTES)
        return True

    def _pin(self, start: int, bytes_: int) -> None:
        """Keep it in memory, and in this process's page table: so the kernel's write can't fail
        halfway for a process that is being killed. A precaution: refused, it works as well."""
        _libc.mlock(
            ctypes.c_void_p(self._address + start),
            ctypes.c_size_t(min(bytes_, self._bytes_max - start)),
        )
