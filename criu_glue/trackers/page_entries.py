"""/proc/PID/pagemap as arrays: which pages a task has, which were written, and what each one is.

    bits 0-54   the page's frame, or its place in swap        bit 58   a guard page (Linux >= 6.15)
    bit 55      soft-dirty: written since the bits were       bit 62   swapped
                cleared, or in a mapping newer than that      bit 63   present
    (Documentation/admin-guide/mm/pagemap.rst)

A `Piece` is a range of addresses with an entry for each of its pages. Reading costs 8 bytes for
each page of a mapping, whether or not it is there; only pieces with a page at all are kept. It
works on every kernel; PAGEMAP_SCAN (`scan.py`) is Linux 6.7.

A page counts when it is present or swapped and neither the shared zero page nor a guard page: what
CRIU itself dumps (criu/pagemap-cache.c: pmc_fill).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from criu_glue.errors import TaskGoneError
from criu_glue.kernel import PAGE_BYTES
from criu_glue.trackers.scan import merged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_ENTRY_BYTES: Final = 8
PLACE: Final = (1 << 55) - 1
SOFT_DIRTY: Final = 1 << 55
GUARD: Final = 1 << 58
SWAPPED: Final = 1 << 62
PRESENT: Final = 1 << 63
# What a page is: another frame at the same address is another page.
_IDENTITY: Final = PLACE | SWAPPED | PRESENT
# Pages in one read: 128 MiB of memory, 256 KiB of entries, which stay in a processor's cache. What
# a program has reserved and never used is as large as it likes, and costs no more at a time.
_PIECE_PAGES_MAX: Final = 1 << 15

Entries: TypeAlias = npt.NDArray[np.uint64]


class Piece(NamedTuple):
    """Entries of the pages from an address on."""

    start: int
    entries: Entries

    @property
    def end(self) -> int:
        """The address behind its last page."""
        return self.start + len(self.entries) * PAGE_BYTES


def read_pieces(pagemap_fd: int, ranges: Iterable[tuple[int, int]]) -> list[Piece]:
    """The entries of ascending ranges [start, end) of addresses, without those where nothing is.

    pagemap_fd: an open /proc/PID/pagemap. Raises TaskGoneError when the memory that it was opened
    for is gone (exit, execve).
    """
    pieces = []
    for start, end in _split(ranges):
        entries = np.empty((end - start) // PAGE_BYTES, dtype=np.uint64)
        got = os.preadv(pagemap_fd, [entries.data], start // PAGE_BYTES * _ENTRY_BYTES)
        if got != entries.nbytes:
            raise TaskGoneError(f"the memory at {start:#x} is gone")
        # A page that is not there may be soft-dirty all the same, with its mapping.
        if int(np.bitwise_or.reduce(entries)) & (PRESENT | SWAPPED):
            pieces.append(Piece(start, entries))
    return pieces


def present_runs(pieces: Iterable[Piece]) -> npt.NDArray[np.uint64]:
    """The runs [address, pages] of all pages that count."""
    return _runs(pieces, lambda piece: _counts(piece.entries))


def written_runs(pieces: Iterable[Piece], before: list[Piece]) -> npt.NDArray[np.uint64]:
    """The runs of pages that were written since the pieces `before` were read and the bits cleared,
    all still; and of those that are not the page that was there.

    The second is what the bits alone do not tell: mremap(2) moves page tables as a whole and marks
    nothing in them (mm/mremap.c: move_normal_pmd), and a page that the kernel merges with others
    (mm/ksm.c: replace_page) loses its bit.
    """
    starts = [piece.start for piece in before]

    def is_written(piece: Piece) -> npt.NDArray[np.bool_]:
        other = (piece.entries ^ _overlaid(piece, before, starts)) & np.uint64(_IDENTITY)
        other |= piece.entries & np.uint64(SOFT_DIRTY)
        counts: npt.NDArray[np.bool_] = _counts(piece.entries) & (other != 0)
        return counts

    return _runs(pieces, is_written)


def entry_of(page: mmap.mmap) -> int:
    """The entry of a page of this process."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        entry = os.pread(fd, _ENTRY_BYTES, address // PAGE_BYTES * _ENTRY_BYTES)
    finally:
        os.close(fd)
    return int.from_bytes(entry, "little")


def own_page() -> mmap.mmap:
    """A page of private anonymous memory of this process, which nobody has touched."""
    return mmap.mmap(-1, PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@functools.cache
def _zero_page() -> int | None:
    """Entry bits of the page that stands for memory that was only read; None: frames are hidden."""
    with own_page() as page:
        _ = page[0]
        entry = entry_of(page) & _IDENTITY
    return entry if entry & PLACE else None


def _counts(entries: Entries) -> npt.NDArray[np.bool_]:
    counts: npt.NDArray[np.bool_] = (entries & np.uint64(PRESENT | SWAPPED) != 0) & (
        entries & np.uint64(GUARD) == 0
    )
    zero_page = _zero_page()
    if zero_page is not None:
        counts &= (entries & np.uint64(_IDENTITY)) != np.uint64(zero_page)
    return counts


def _overlaid(piece: Piece, before: list[Piece], starts: list[int]) -> Entries:
    """What was before at the addresses of a piece, 0 where nothing was."""
    first = max(bisect_right(starts, piece.start) - 1, 0)
    if before and before[first].start == piece.start and before[first].end == piece.end:
        return before[first].entries
    result = np.zeros_like(piece.entries)
    for old in before[first:]:
        if old.start >= piece.end:
            break
        low, high = max(old.start, piece.start), min(old.end, piece.end)
        if low < high:
            result[_at(piece, low) : _at(piece, high)] = old.entries[_at(old, low) : _at(old, high)]
    return result


def _at(piece: Piece, address: int) -> int:
    return (address - piece.start) // PAGE_BYTES


def _runs(
    pieces: Iterable[Piece], chosen: Callable[[Piece], npt.NDArray[np.bool_]]
) -> npt.NDArray[np.uint64]:
    """The runs of the pages that are chosen, adjacent ones joined, across pieces too."""
    blocks = [np.empty((0, 2), dtype=np.uint64)]
    for piece in pieces:
        padded = np.zeros(len(piece.entries) + 2, dtype=np.int8)
        padded[1:-1] = chosen(piece)
        edges = np.flatnonzero(np.diff(padded)).astype(np.uint64)
        regions = edges.reshape(-1, 2) * np.uint64(PAGE_BYTES) + np.uint64(piece.start)
        blocks.append(regions)
    return merged(np.concatenate(blocks))


def _split(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Ranges that touch are one read, and none is longer than a piece may be."""
    for start, end in _joined(ranges):
        for begin in range(start, end, _PIECE_PAGES_MAX * PAGE_BYTES):
            yield begin, min(begin + _PIECE_PAGES_MAX * PAGE_BYTES, end)


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    start = end = 0
    for next_start, next_end in ranges:
        if next_start != end:
            if start < end:
                yield start, end
            start = next_start
        end = next_end
    if start < end:
        yield start, end
