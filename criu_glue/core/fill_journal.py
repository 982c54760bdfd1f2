"""What a pager writes down of the mappings that it fills, so that another one can go on.

What has been filled need not be written: the kernel answers a second copy with EEXIST, and the
page store has holes where content was given back. But the kernel tells only once that memory was
moved, dropped or forked. One record each:

    kind u8 | 3 unused | number u32 | first u64 | second u64 | third u64        little-endian

    OPENED    number = a new address space    first = task
    FORKED    number = the child              first = number of the parent
    REMOVED   first = start, second = end
    MOVED     first = from, second = to, third = bytes
    CLOSED    nothing is missing, or the task has ended
    FINISHED  CRIU has finished the restore (number 0)

Pure: records in, records out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from criu_glue.errors import CriuGlueError

if TYPE_CHECKING:
    from collections.abc import Callable

    from criu_glue.core.fill_map import FillMap

_RECORD: Final = struct.Struct("<B3xIQQQ")
RECORD_BYTES: Final = _RECORD.size


class FillJournalError(CriuGlueError):
    """The journal contradicts itself, or is of another version."""


class Kind(IntEnum):
    """What happened; 0 is never written."""

    OPENED = 1
    FORKED = 2
    REMOVED = 3
    MOVED = 4
    CLOSED = 5
    FINISHED = 6


def encode(kind: Kind, number: int, first: int = 0, second: int = 0, third: int = 0) -> bytes:
    """One record."""
    return _RECORD.pack(kind, number, first, second, third)


@dataclass(frozen=True, slots=True)
class Space:
    """An address space that was being filled. `root` is the number of the restored task that it
    was forked from, or its own."""

    number: int
    task: int
    root: int
    missing: FillMap


@dataclass(slots=True)
class Replayed:
    """Where the pager was. `missing` of a space may name pages that were filled meanwhile."""

    spaces: dict[int, Space] = field(default_factory=dict)
    finished: bool = False
    number_max: int = 0


def replay(data: bytes, initial: Callable[[int], FillMap]) -> Replayed:
    """Read a journal; `initial(task)` is what was missing of a task at the restore.

    A last record that is not whole is left out. Raises FillJournalError when the journal
    contradicts itself.
    """
    found = Replayed()
    spaces = found.spaces
    for kind, number, first, second, third in _RECORD.iter_unpack(
        data[: len(data) // RECORD_BYTES * RECORD_BYTES]
    ):
        found.number_max = max(found.number_max, number)
        try:
            if kind == Kind.OPENED:
                spaces[number] = Space(number, first, number, initial(first))
            elif kind == Kind.FORKED:
                parent = spaces[first]
                spaces[number] = Space(number, parent.task, parent.root, parent.missing.copy())
            elif kind == Kind.REMOVED:
                spaces[number].missing.remove(first, second)
            elif kind == Kind.MOVED:
                spaces[number].missing.move(first, second, third)
            elif kind == Kind.CLOSED:
                del spaces[number]
            elif kind == Kind.FINISHED:
                found.finished = True
            else:
                raise FillJournalError(f"the pager's journal has a record of unknown kind {kind}")
        except KeyError as error:
            raise FillJournalError(f"the pager's journal misses address space {error}") from error
    return found
