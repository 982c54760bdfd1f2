"""Where the pager takes content from: a task's file in the page store, and a buffer.

Content is read into the buffer and copied from there. Mapping the store's file instead spares that
copy and is a third slower: its pages have to be mapped and unmapped (1.5 against 2.1 GiB/s).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from criu_glue.errors import CriuGlueError
from criu_glue.kernel import PAGE_BYTES
from criu_glue.page_store import punch_hole
from criu_glue.store_users import is_alone

if TYPE_CHECKING:
    import numpy.typing as npt

    from criu_glue.uffd_memory import UffdMemory

# Copied between two looks at the page faults: 120 µs measured, which is what a fault may wait.
# Larger chunks fill no faster.
CHUNK_BYTES: Final = 256 << 10

_WORDS: Final = PAGE_BYTES // 8


class FillSourceError(CriuGlueError):
    """The page store can't be read as it should."""


class StoreFile:
    """A task's file in the page store, shared by the task and the children it forks, and, where
    there are several copies of it, by their pagers; `store_user` is what this one is known by."""

    def __init__(self, path: str | os.PathLike[str], store_user: int) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._store_user = store_user
        # Everybody that may still need its content.
        self.users: list[UffdMemory] = []
        self._unpunched: list[tuple[int, int]] = []

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out`; holes read as zeros."""
        done = 0
        while done < len(out):
            count = os.preadv(self._fd, [out[done:]], offset + done)
            if not count:
                raise FillSourceError("the page store is shorter than the address space")
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
        """Give the memory of [start, end) back, now or as soon as nobody here needs it any more;
        `by` is known not to. As long as others fill from the store it stays, until all is wiped."""
        if any(user is not by and user.missing.needs_stored(start, end) for user in self.users):
            self._unpunched.append((start, end))
        elif is_alone(self._store_user):
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
        doubtful = np.flatnonzero(self._zero)
        if len(doubtful):
            self._zero[doubtful] = ~words[doubtful].any(axis=1)
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
