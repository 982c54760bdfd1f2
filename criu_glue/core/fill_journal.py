"""What a pager keeps of the mappings that it fills, so that another worker can go on.

What has been filled need not be kept: the kernel answers a second copy with EEXIST, and the page
store has holes where content was given back. But the kernel tells only once that memory was moved,
dropped or forked, so the journal consists of the kernel's own messages, read right into it, between
units of ours. All have 32 bytes, little-endian, and the first byte says which; 0 is the end.

    kind u8 | 3 unused | number u32 | first u64 | second u64 | third u64

    OPENED    number = a new address space    first = task, second = its userfaultfd
    READING   the messages behind it came from the userfaultfd of address space `number`
    CLOSED    nothing is missing, or the task has ended
    FINISHED  CRIU has finished the restore (number 0)

    struct uffd_msg (userfaultfd(2)); number is 0
    PAGEFAULT                                 says nothing about mappings
    FORK      first = the child's userfaultfd in the lower 32 bits
    REMAP     first = from, second = to, third = bytes
    REMOVE, UNMAP    first = start, second = end

Address spaces have numbers from 1 on, in the order of their OPENED and FORK. Pure: units in, maps
out.
"""

from __future__ import annotations

import struct
from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from criu_glue.core.fill_map import FillMap
from criu_glue.errors import CriuGlueError

if TYPE_CHECKING:
    from collections.abc import Callable

UNIT: Final = struct.Struct("<B3xIQQQ")
UNIT_BYTES: Final = UNIT.size
# Threads that move memory at the same time; each waits for its own notes to be read.
_LATE_UNMAPS_MAX: Final = 16
_DESCRIPTOR_MASK: Final = 0xFFFF_FFFF


class FillJournalError(CriuGlueError):
    """The journal contradicts itself, is of another version, or is not complete."""


class Kind(IntEnum):
    """What a unit is. From 0x10 on the kernel's numbers (linux/userfaultfd.h, UFFD_EVENT_*)."""

    END = 0
    OPENED = 1
    READING = 2
    CLOSED = 3
    FINISHED = 4
    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


# They change nothing that was known, so they may be overwritten, and left behind the last unit.
TRANSIENT: Final = frozenset({Kind.READING, Kind.PAGEFAULT})


def encode(kind: Kind, number: int, first: int = 0, second: int = 0, third: int = 0) -> bytes:
    """One unit."""
    return UNIT.pack(kind, number, first, second, third)


@dataclass(slots=True)
class Space:
    """An address space that is being filled. `root` is the number of the restored task that it
    was forked from, or its own; `missing` may name pages that were filled meanwhile."""

    number: int
    task: int
    root: int
    uffd: int
    missing: FillMap
    # Moved away, and not yet told to be unmapped; never told with MREMAP_DONTUNMAP.
    late_unmaps: deque[tuple[int, int]] = field(
        default_factory=lambda: deque(maxlen=_LATE_UNMAPS_MAX)
    )

    def apply(self, kind: int, first: int, second: int, third: int) -> None:
        """Take account of a message about mappings.

        mremap tells the end of the old place only when its move has been read (mm/mremap.c), and
        another thread may have moved something there in between: that late note is left out.
        """
        if kind == Kind.UNMAP and (first, second) in self.late_unmaps:
            self.late_unmaps.remove((first, second))
        elif kind in (Kind.REMOVE, Kind.UNMAP):
            self.missing.remove(first, second)
        elif kind == Kind.REMAP:
            self.missing.move(first, second, third)
            self.late_unmaps.append((first, first + third))
        else:
            raise FillJournalError(f"unknown event {kind:#x} of a userfaultfd")

    def forked(self, number: int, first: int) -> Space:
        """The child misses what its parent missed at that moment, not after later events."""
        uffd = first & _DESCRIPTOR_MASK
        return Space(number, self.task, self.root, uffd, self.missing.copy())


@dataclass(slots=True)
class Replayed:
    """Where the pager was. `tasks` were ever announced, `spaces` are still open, the next unit
    belongs at `end`."""

    spaces: dict[int, Space] = field(default_factory=dict)
    tasks: set[int] = field(default_factory=set)
    finished: bool = False
    numbers: int = 0
    end: int = 0


def replay(data: bytes, initial: Callable[[int], FillMap]) -> Replayed:
    """Read a journal; `initial(task)` is what was missing of a task at the restore.

    A last unit that is not whole is left out. Raises FillJournalError when the journal contradicts
    itself.
    """
    found = Replayed()
    spaces = found.spaces
    reading = 0
    whole = len(data) // UNIT_BYTES * UNIT_BYTES
    for index, (kind, number, first, second, third) in enumerate(UNIT.iter_unpack(data[:whole])):
        if kind == Kind.END:
            break
        try:
            if kind == Kind.READING:
                reading = number
            elif kind == Kind.OPENED:
                found.numbers += 1
                if number != found.numbers:
                    raise FillJournalError(f"address space {number} is not the next one")
                spaces[number] = Space(number, first, number, second, initial(first))
                found.tasks.add(first)
            elif kind == Kind.FORK:
                found.numbers += 1
                spaces[found.numbers] = spaces[reading].forked(found.numbers, first)
            elif kind == Kind.CLOSED:
                del spaces[number]
            elif kind == Kind.FINISHED:
                found.finished = True
            elif kind != Kind.PAGEFAULT:
                spaces[reading].apply(kind, first, second, third)
        except KeyError as error:
            raise FillJournalError(f"the pager's journal misses address space {error}") from error
        if kind not in TRANSIENT:
            found.end = (index + 1) * UNIT_BYTES
    return found
