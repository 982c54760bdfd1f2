"""CRIU's pagemap images: which pages of a task exist, and where each page's content is.

    entry.flags   PE_PARENT 1   content is in the parent image (the page store)
                  PE_LAZY 2     may be filled after the restore (private anonymous memory)
                  PE_PRESENT 4  content is in this image's own pages file

A `--lazy-pages` dump writes PE_LAZY alone for what it left to its page server, PE_PRESENT for
the rest (stacks, private file mappings). This module computes what such an image becomes on the
target, and the parent's pagemap: entries that touch, from address 0 over the whole address space,
so that an offset in the page store is simply the address (criu/pagemap.c: seek_pagemap and
skip_pagemap_pages add to the offset in the pages file exactly what they add to the address).
One entry would do for CRIU 4.2; earlier ones count pages in 32 bits, and in places in an int.

Pure: bytes in, arrays out. Sources: images/pagemap.proto, criu/include/pagemap.h,
criu/page-xfer.c (ppb_xfer_flags, write_pagemap_loc), criu/include/vma.h.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from criu_glue.core.wire import (
    IMG_COMMON_MAGIC,
    SIZE_BYTES,
    ImageFormatError,
    check_magic,
    decode_flat_messages,
    put_varints,
    split_entries,
    varint_sizes,
)

PAGE_BYTES: Final = 4096
PAGEMAP_MAGIC: Final = 0x56084025

PE_PARENT: Final = 1
PE_LAZY: Final = 2
PE_PRESENT: Final = 4

# Above every user space address of x86-64 (2^56 with five page-table levels), below 2^63, which
# ends a tmpfs file.
ADDRESS_END: Final = 1 << 57
# 4 Mi runs are 16 GiB in which every second page is missing; no real task comes near.
ENTRIES_MAX: Final = 4 << 20
# An entry of five fields takes at most 4 + 5 x 11 bytes, and CRIU's take 17 to 24.
PAGEMAP_BYTES_MAX: Final = ENTRIES_MAX * 24

# User space of x86-64 with four page-table levels ends here; nothing is above, unless asked for.
_USUAL_END: Final = 1 << 47
_PARENT_ENTRY_PAGES: Final = 1 << 30
_COMPAT_PAGES_MAX: Final = (1 << 32) - 1

_FIELDS: Final = 5  # vaddr, compat_nr_pages, in_parent, flags, nr_pages

PageRuns = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Pagemap:
    """One pagemap image. `entries` has shape (n, 3), dtype uint64, columns [address, pages, flags],
    sorted by address, not overlapping, page aligned. `pages_id` k names its file pages-<k>.img."""

    pages_id: int
    entries: npt.NDArray[np.uint64]

    def runs(self, *, having: int = 0, lacking: int = 0) -> PageRuns:
        """Page runs of the entries that have all flags of `having` and none of `lacking`,
        adjacent ones joined: shape (n, 2), columns [address, pages]."""
        flags = self.entries[:, 2]
        wanted = (flags & np.uint64(having)) == having
        wanted &= (flags & np.uint64(lacking)) == 0
        return join_runs(self.entries[wanted, :2])


def join_runs(runs: PageRuns) -> PageRuns:
    """The same pages in as few runs as possible; `runs` sorted, not overlapping."""
    if len(runs) < 2:
        return runs.copy()
    ends = runs[:, 0] + runs[:, 1] * np.uint64(PAGE_BYTES)
    first = np.append(True, runs[1:, 0] != ends[:-1])
    last = np.append(first[1:], True)
    addresses = runs[first, 0]
    return np.column_stack((addresses, (ends[last] - addresses) // np.uint64(PAGE_BYTES)))


def pages_in(runs: PageRuns) -> int:
    """Pages of all runs together."""
    return int(runs[:, 1].sum())


def decode_pagemap(data: bytes, what: str = "pagemap") -> Pagemap:
    """Decode pagemap-<vpid>.img. `what` names the file in errors.

    Accepts what CRIU up to 4.0 wrote (compat_nr_pages, in_parent instead of flags) as CRIU itself
    does (criu/pagemap.c: init_compat_pagemap_entry). Raises ImageFormatError.
    """
    if len(data) > PAGEMAP_BYTES_MAX:
        raise ImageFormatError(f"{what}: {len(data)} bytes are more than {PAGEMAP_BYTES_MAX}")
    check_magic(data, IMG_COMMON_MAGIC, PAGEMAP_MAGIC, what)
    starts, ends = split_entries(data, what, entries_max=ENTRIES_MAX)
    if not len(starts):
        raise ImageFormatError(f"{what}: has no head")
    head, _ = decode_flat_messages(data, starts[:1], ends[:1], fields=1)
    fields, present = decode_flat_messages(data, starts[1:], ends[1:], fields=_FIELDS)
    if not present[:, 1].all():
        raise ImageFormatError(f"{what}: an entry without an address")
    flags = np.where(present[:, 4], fields[:, 4], np.uint64(0))
    in_parent = fields[:, 3] != 0
    flags[in_parent] |= np.uint64(PE_PARENT)
    flags[~in_parent & ~present[:, 4]] = PE_PRESENT
    pages = np.where(present[:, 5], fields[:, 5], fields[:, 2])
    entries = np.column_stack((fields[:, 1], pages, flags))
    check_entries(entries, what)
    return Pagemap(int(head[0, 1]), entries)


def check_entries(entries: npt.NDArray[np.uint64], what: str) -> None:
    """Raise ImageFormatError unless sorted, disjoint, aligned, not empty, within ADDRESS_END and
    with known flags only."""
    address, pages, flags = entries[:, 0], entries[:, 1], entries[:, 2]
    if (flags > PE_PARENT | PE_LAZY | PE_PRESENT).any():
        raise ImageFormatError(f"{what}: an entry has flags that are unknown here")
    if (address % np.uint64(PAGE_BYTES)).any():
        raise ImageFormatError(f"{what}: an entry is not page aligned")
    # Both bounds first: their sum then cannot overflow.
    if (pages == 0).any() or (pages > ADDRESS_END // PAGE_BYTES).any():
        raise ImageFormatError(f"{what}: an entry of no or of too many pages")
    ends = address + pages * np.uint64(PAGE_BYTES)
    if (address >= ADDRESS_END).any() or (ends > ADDRESS_END).any():
        raise ImageFormatError(f"{what}: an entry is outside user space")
    if (address[1:] < ends[:-1]).any():
        raise ImageFormatError(f"{what}: entries overlap or are not sorted")


def encode_pagemap(pagemap: Pagemap) -> bytes:
    """The image file as every CRIU reads it: up to 4.1 by compat_nr_pages, later by nr_pages,
    which the older ones do not know. No in_parent, which flags say."""
    head = b"\x08" + _one_varint(pagemap.pages_id)
    prefix = struct.pack("<III", IMG_COMMON_MAGIC, PAGEMAP_MAGIC, len(head)) + head
    address, pages, flags = pagemap.entries.T
    columns = (
        (0x08, address),
        (0x10, np.minimum(pages, np.uint64(_COMPAT_PAGES_MAX))),
        (0x20, flags),
        (0x28, pages),
    )
    sizes = [varint_sizes(column) for _, column in columns]
    messages = sum((1 + size for size in sizes), start=np.zeros(len(pages), dtype=np.int64))
    ends = np.cumsum(messages + SIZE_BYTES)
    position = ends - messages - SIZE_BYTES
    out = np.zeros(int(ends[-1]) if len(ends) else 0, dtype=np.uint8)
    for index in range(SIZE_BYTES):
        out[position + index] = (messages >> (8 * index)) & 0xFF
    position = position + SIZE_BYTES
    for (tag, column), size in zip(columns, sizes, strict=True):
        out[position] = tag
        put_varints(out, position + 1, column, size)
        position = position + 1 + size
    return prefix + out.tobytes()


def _one_varint(value: int) -> bytes:
    values = np.array([value], dtype=np.uint64)
    sizes = varint_sizes(values)
    out = np.zeros(int(sizes[0]), dtype=np.uint8)
    put_varints(out, np.zeros(1, dtype=np.int64), values, sizes)
    return out.tobytes()


def whole_space_pagemap(pages_id: int, highest: int = 0) -> Pagemap:
    """The parent's pagemap: says of every address of user space, and up to `highest`, that it is
    in the pages file at the offset equal to the address."""
    entry_bytes = _PARENT_ENTRY_PAGES * PAGE_BYTES
    count = -(-max(highest, _USUAL_END) // entry_bytes)
    address = np.arange(count, dtype=np.uint64) * np.uint64(entry_bytes)
    pages = np.full(count, _PARENT_ENTRY_PAGES, dtype=np.uint64)
    return Pagemap(
        pages_id, np.column_stack((address, pages, np.full_like(pages, PE_LAZY | PE_PRESENT)))
    )
