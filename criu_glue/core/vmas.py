"""The mappings of a task from CRIU's mm image, as far as lazy filling needs them.

Userfaultfd copies inside one mapping only, CRIU registers only some mappings, and some must not
be filled late. Pure: bytes in, arrays out. Sources: images/mm.proto, images/vma.proto,
criu/include/vma.h (vma_entry_can_be_lazy), criu/include/image.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from criu_glue.core.pagemap import ADDRESS_END, PAGE_BYTES, PageRuns
from criu_glue.core.wire import (
    IMG_COMMON_MAGIC,
    WIRE_BYTES,
    ImageFormatError,
    check_magic,
    decode_flat_messages,
    iterate_fields,
    split_entries,
)

MM_MAGIC: Final = 0x57492820
# Far above vm.max_map_count's default of 65530.
VMAS_MAX: Final = 1 << 20
MM_BYTES_MAX: Final = VMAS_MAX * 80

_MM_VMAS: Final = 14
_VMA_FIELDS: Final = 10  # start end pgoff shmid prot flags status fd madv fdflags

_MAP_PRIVATE: Final = 0x02
_MAP_ANONYMOUS: Final = 0x20
_MAP_LOCKED: Final = 0x2000
_MAP_HUGETLB: Final = 0x40000
_AREA_VSYSCALL: Final = 1 << 2
_AREA_VDSO: Final = 1 << 3
_AREA_VVAR: Final = 1 << 12
_AREA_GUARD: Final = 1 << 16
_MADV_WIPEONFORK: Final = 1 << 18


@dataclass(frozen=True, slots=True)
class Mappings:
    """Mappings of one task sorted by address; arrays of shape (n,).

    `can_be_lazy`: CRIU registers it with userfaultfd in a lazy restore.
    `wiped_on_fork`: madvise(MADV_WIPEONFORK); a child must find zeros there, whatever the parent
    has, and a userfaultfd cannot tell. It has to be complete before the task runs.
    """

    start: npt.NDArray[np.uint64]
    end: npt.NDArray[np.uint64]
    can_be_lazy: npt.NDArray[np.bool_]
    wiped_on_fork: npt.NDArray[np.bool_]

    def split(self, entries: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Cut `entries` (columns [address, pages, ...]) where a mapping begins or ends."""
        edges = np.union1d(self.start, self.end)
        ends = entries[:, 0] + entries[:, 1] * np.uint64(PAGE_BYTES)
        inner_first = np.searchsorted(edges, entries[:, 0], side="right")
        inner_last = np.searchsorted(edges, ends, side="left")
        pieces = inner_last - inner_first + 1
        if (pieces == 1).all():
            return entries.copy()
        out = np.repeat(entries, pieces, axis=0)
        firsts = np.cumsum(pieces) - pieces
        nth = np.arange(len(out)) - np.repeat(firsts, pieces)
        later = nth > 0
        out[later, 0] = edges[(np.repeat(inner_first, pieces) + nth - 1)[later]]
        piece_ends = np.repeat(ends, pieces)
        followed = np.append(later[1:], False)
        piece_ends[followed] = out[1:, 0][followed[:-1]]
        out[:, 1] = (piece_ends - out[:, 0]) // np.uint64(PAGE_BYTES)
        return out

    def property_of(
        self, addresses: npt.NDArray[np.uint64], which: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """For each address the value of `which` of its mapping; False outside every mapping."""
        if not len(self.start):
            return np.zeros(len(addresses), dtype=np.bool_)
        index = np.searchsorted(self.start, addresses, side="right") - 1
        inside = (index >= 0) & (addresses < self.end[index])
        return inside & which[index]


def split_runs(runs: PageRuns, mappings: Mappings) -> PageRuns:
    """Runs of which none reaches over the edge of a mapping."""
    return mappings.split(runs)


def decode_mappings(data: bytes, what: str = "mm") -> Mappings:
    """Decode mm-<vpid>.img. Raises ImageFormatError."""
    if len(data) > MM_BYTES_MAX:
        raise ImageFormatError(f"{what}: {len(data)} bytes are more than {MM_BYTES_MAX}")
    check_magic(data, IMG_COMMON_MAGIC, MM_MAGIC, what)
    starts, ends = split_entries(data, what, entries_max=1)
    if not len(starts):
        raise ImageFormatError(f"{what}: is empty")
    spans: list[tuple[int, int]] = []
    for field, kind, position, size in iterate_fields(data, int(starts[0]), int(ends[0])):
        if field == _MM_VMAS and kind == WIRE_BYTES:
            spans.append((position, position + size))
            if len(spans) > VMAS_MAX:
                raise ImageFormatError(f"{what}: more than {VMAS_MAX} mappings")
    bounds = np.array(spans, dtype=np.int64).reshape(-1, 2)
    values, _ = decode_flat_messages(data, bounds[:, 0], bounds[:, 1], fields=_VMA_FIELDS)
    # Guard regions lie inside other mappings and have no pages: not a mapping of their own here.
    values = values[(values[:, 7] & np.uint64(_AREA_GUARD)) == 0]
    start, end, flags, status, madvice = values[:, [1, 2, 6, 7, 9]].T
    # The vsyscall page is above user space.
    user = (status & np.uint64(_AREA_VSYSCALL)) == 0
    start, end, flags, status, madvice = (
        column[user] for column in (start, end, flags, status, madvice)
    )
    if (end <= start).any() or (end > ADDRESS_END).any() or (start[1:] < end[:-1]).any():
        raise ImageFormatError(f"{what}: mappings overlap, are empty or are not sorted")
    if ((start | end) % np.uint64(PAGE_BYTES)).any():
        raise ImageFormatError(f"{what}: a mapping is not page aligned")
    needed = np.uint64(_MAP_ANONYMOUS | _MAP_PRIVATE)
    lazy = (flags & needed) == needed
    lazy &= (flags & np.uint64(_MAP_LOCKED | _MAP_HUGETLB)) == 0
    lazy &= (status & np.uint64(_AREA_VDSO | _AREA_VVAR)) == 0
    wiped = (madvice & np.uint64(_MADV_WIPEONFORK)) != 0
    return Mappings(start, end, lazy, wiped)
