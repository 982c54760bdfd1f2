"""Entries of /proc/PID/pagemap: those of this process, and rows as the kernel writes them."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from criu_glue.errors import TaskGoneError
from criu_glue.kernel import PAGE_BYTES
from criu_glue.trackers.page_entries import (
    GUARD,
    PLACE,
    PRESENT,
    SOFT_DIRTY,
    SWAPPED,
    Piece,
    entry_of,
    own_page,
    present_runs,
    read_pieces,
    written_runs,
)

START = 0x7F00_0000_0000


def piece(*entries: int, start: int = START) -> Piece:
    return Piece(start, np.array(entries, dtype=np.uint64))


def frame(number: int, *flags: int) -> int:
    """A present page."""
    return sum(flags, PRESENT | number)


def rows(runs: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> list[tuple[int, int]]:
    """Runs as [page from START, pages]."""
    return [((address - START) // PAGE_BYTES, pages) for address, pages in runs.tolist()]


def test_what_counts_as_a_page() -> None:
    entries = (
        *(frame(7), frame(8, SOFT_DIRTY), 0, SWAPPED | 7, SWAPPED | GUARD, SOFT_DIRTY),
        *(frame(zero_frame()), frame(9)),
    )
    assert rows(present_runs([piece(*entries)])) == [(0, 2), (3, 1), (7, 1)]


def zero_frame() -> int:
    with own_page() as page:
        assert page[0] == 0
        return entry_of(page) & PLACE


def test_a_page_is_written_by_its_bit_or_by_being_another() -> None:
    before = [piece(*(frame(number) for number in range(1, 8)), 0)]
    now = piece(
        *(frame(1), frame(2, SOFT_DIRTY), frame(30), SWAPPED | 4, 0, frame(6, 1 << 56)),
        *(frame(7), frame(8)),
    )
    assert rows(written_runs([now], before)) == [(1, 3), (7, 1)]
    assert rows(written_runs([now], [])) == [(0, 4), (5, 3)]
    assert rows(written_runs([], before)) == []


@pytest.mark.parametrize("shift", [-3, 0, 2])
def test_pieces_need_not_be_cut_as_before(shift: int) -> None:
    """A mapping that has grown, was split or joined: by addresses, whatever lies between."""
    frames = [frame(number) for number in range(1, 21)]
    before = [
        piece(*frames[:4]),
        piece(*frames[4:6], start=START + 4 * PAGE_BYTES),
        piece(*frames[10:20], start=START + 10 * PAGE_BYTES),
    ]
    middle = 12 + shift
    now = [
        piece(*frames[:middle]),
        piece(*frames[middle:18], start=START + middle * PAGE_BYTES),
    ]
    assert rows(written_runs(now, before)) == [(6, 4)]


def test_runs_go_on_across_pieces() -> None:
    pieces = [piece(0, frame(1)), piece(frame(2), start=START + 2 * PAGE_BYTES)]
    assert rows(present_runs(pieces)) == [(1, 2)]


def test_pages_of_this_process() -> None:
    with mmap.mmap(-1, 6 * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[PAGE_BYTES] = 1
        area[2 * PAGE_BYTES] = 1
        _ = area[4 * PAGE_BYTES]
        start = np.frombuffer(area, dtype=np.uint8).ctypes.data
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        middle = start + 2 * PAGE_BYTES
        pieces = read_pieces(fd, [(start, middle), (middle, start + 6 * PAGE_BYTES)])
        assert [(one.start, one.end) for one in pieces] == [(start, start + 6 * PAGE_BYTES)]
        assert present_runs(pieces).tolist() == [[start + PAGE_BYTES, 2]]
        area.madvise(mmap.MADV_DONTNEED)
        assert read_pieces(fd, [(start, start + 6 * PAGE_BYTES)]) == []
        os.close(fd)


def test_what_was_reserved_is_read_in_parts_and_not_kept(tmp_path: Path) -> None:
    """Rows in a file with a hole, as of a program that reserves 64 GiB and uses two pages."""
    pages = (64 << 30) // PAGE_BYTES
    path = tmp_path / "pagemap"
    with path.open("wb") as file:
        for number in (0, pages - 1):
            file.seek(number * 8)
            file.write(frame(5).to_bytes(8, "little"))
    fd = os.open(path, os.O_RDONLY)
    pieces = read_pieces(fd, [(0, pages * PAGE_BYTES)])
    assert len(pieces) == 2
    assert sum(len(one.entries) for one in pieces) <= 1 << 19
    assert present_runs(pieces).tolist() == [[0, 1], [(pages - 1) * PAGE_BYTES, 1]]
    with pytest.raises(TaskGoneError):
        read_pieces(fd, [(0, (pages + 1) * PAGE_BYTES)])
    os.close(fd)
