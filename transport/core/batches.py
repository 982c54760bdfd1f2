"""Cutting page runs into frames' worth of work: long runs are split, short ones gathered.

Pure. Page runs are numpy arrays (n, 2) of uint64, columns [address in bytes, pages], ascending,
disjoint.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from transport.core.frames import PAGE_BYTES
from transport.core.tables import ADDRESS_END

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    Runs = npt.NDArray[np.uint64]

_PAGE = np.uint64(PAGE_BYTES)


def checked_runs(runs: Runs) -> Runs:
    """`runs` as uint64. ValueError when out of order: then versions of a page could be, too."""
    runs = np.asarray(runs, dtype=np.uint64)
    if runs.ndim != 2 or runs.shape[1] != 2:
        raise ValueError(f"page runs of shape {runs.shape} instead of (n, 2)")
    if len(runs) == 0:
        return runs
    address, pages = runs[:, 0], runs[:, 1]
    if bool(np.any(address % _PAGE)) or bool(np.any(pages == 0)):
        raise ValueError("a run without pages, or not at a page's address")
    limit = np.uint64(ADDRESS_END)
    if bool(np.any(address >= limit)) or bool(np.any(pages > (limit - address) // _PAGE)):
        raise ValueError("a run beyond user space")
    if bool(np.any(address[1:] < address[:-1] + pages[:-1] * _PAGE)):
        raise ValueError("page runs out of order or overlapping")
    return runs


def batches(runs: Runs, pages_max: int) -> Iterator[Runs]:
    """`runs` cut into pieces of `pages_max` pages each, the last one shorter, in order."""
    ends = np.cumsum(runs[:, 1], dtype=np.uint64)
    total = int(ends[-1]) if len(ends) else 0
    for first in range(0, total, pages_max):
        last = min(first + pages_max, total)
        low = int(np.searchsorted(ends, first, side="right"))
        high = int(np.searchsorted(ends, last, side="left"))
        piece = runs[low : high + 1].copy()
        piece[-1, 1] -= ends[high] - np.uint64(last)
        skipped = np.uint64(first) - (ends[low] - runs[low, 1])
        piece[0, 0] += skipped * _PAGE
        piece[0, 1] -= skipped
        yield piece


def page_addresses(runs: Runs) -> npt.NDArray[np.uint64]:
    """The address of every page of `runs`, in order."""
    if len(runs) == 1:  # Most batches of a first round are one piece of a long run.
        first, count = int(runs[0, 0]), int(runs[0, 1])
        return np.arange(first, first + count * PAGE_BYTES, PAGE_BYTES, dtype=np.uint64)
    pages = runs[:, 1].astype(np.intp)
    before = np.cumsum(pages) - pages
    within = np.arange(int(pages.sum()), dtype=np.uint64) - np.repeat(before, pages).astype(
        np.uint64
    )
    return np.repeat(runs[:, 0], pages) + within * _PAGE


def gathered(addresses: npt.NDArray[np.uint64]) -> Runs:
    """The runs that consist of exactly the pages at `addresses` (ascending)."""
    if len(addresses) == 0:
        return np.empty((0, 2), dtype=np.uint64)
    breaks = np.flatnonzero(addresses[1:] != addresses[:-1] + _PAGE)
    starts = np.concatenate((np.zeros(1, dtype=np.intp), breaks + 1))
    runs = np.empty((len(starts), 2), dtype=np.uint64)
    runs[:, 0] = addresses[starts]
    runs[:, 1] = np.diff(starts, append=len(addresses))
    return runs
