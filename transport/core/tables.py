"""The tables of frames: which pages a body holds, or which part of which file.

Pure. Layouts are drawn in `transport.core.frames`. Everything that a peer may say in a table is
checked here, before anybody acts upon it: an address is used as a place in a file, a name becomes
part of a path.
"""

from __future__ import annotations

import enum
import re
import struct
from typing import TYPE_CHECKING

import numpy as np

from transport.core.frames import (
    FRAME_PAGES_MAX,
    OFFSET_BYTES,
    PAGE_BYTES,
    exactly,
)
from transport.errors import FrameMalformedError, FrameTooLargeError

if TYPE_CHECKING:
    import numpy.typing as npt

    from transport.core.frames import Data, FrameHeader

ADDRESS_END = 1 << 57
"""End of user space with five-level page tables, x86-64's largest."""
FILE_END = 1 << 44
"""Largest file: ext4's 16 TiB."""
RUN_DTYPE = np.dtype([("address", "<u8"), ("pages", "<u4"), ("kind", "<u4")])

_RUN = struct.Struct("<QII")
_FILE_OFFSET = struct.Struct("<Q")
_NAME = re.compile(rb"[a-z0-9-][a-z0-9.-]{0,63}")


class RunKind(enum.IntEnum):
    DATA = 1
    ZERO = 2


def parse_runs(header: FrameHeader, table: Data) -> npt.NDArray[np.void]:
    """The runs of a PAGES frame: RUN_DTYPE, ascending, disjoint, adding up to the body."""
    exactly(table, header.table_bytes, "run table")
    runs = np.frombuffer(table, dtype=RUN_DTYPE)
    address, pages, kind = runs["address"], runs["pages"].astype(np.uint64), runs["kind"]
    if (
        int(pages.min()) == 0
        or int(pages.max()) > FRAME_PAGES_MAX
        or int(pages.sum()) > FRAME_PAGES_MAX
    ):
        raise FrameMalformedError("a run without pages, or more pages than a frame may have")
    is_data = kind == RunKind.DATA
    if not bool(np.all(is_data | (kind == RunKind.ZERO))):
        raise FrameMalformedError("unknown kind of run")
    # Compared before anything is added to it: an address near 2**64 would wrap around.
    if int(address.max()) >= ADDRESS_END or bool(np.any(address % PAGE_BYTES)):
        raise FrameMalformedError("an address beyond user space, or not of a page")
    end = address + pages * np.uint64(PAGE_BYTES)
    if int(end[-1]) > ADDRESS_END or bool(np.any(address[1:] < end[:-1])):
        raise FrameMalformedError("runs out of order, overlapping, or beyond user space")
    if int(pages[is_data].sum()) * PAGE_BYTES != header.raw_bytes:
        raise FrameMalformedError("the data runs' pages are not the body's size")
    return runs


def encode_runs(addresses: npt.NDArray[np.uint64], kinds: npt.NDArray[np.uint8]) -> bytes:
    """The run table of single pages: their addresses (n > 0, ascending) and RunKinds, gathered."""
    if int(addresses[-1] - addresses[0]) == (len(addresses) - 1) * PAGE_BYTES and bool(
        (kinds == kinds[0]).all()
    ):  # Most frames of a first round: not worth the machinery below.
        return _RUN.pack(int(addresses[0]), len(addresses), int(kinds[0]))
    breaks = np.flatnonzero(
        (addresses[1:] != addresses[:-1] + np.uint64(PAGE_BYTES)) | (kinds[1:] != kinds[:-1])
    )
    starts = np.concatenate((np.zeros(1, dtype=np.intp), breaks + 1))
    runs = np.empty(len(starts), dtype=RUN_DTYPE)
    runs["address"] = addresses[starts]
    runs["pages"] = np.diff(starts, append=len(addresses))
    runs["kind"] = kinds[starts]
    return runs.tobytes()


def parse_file(header: FrameHeader, table: Data) -> tuple[str, int]:
    """Name and offset of a FILE frame."""
    exactly(table, header.table_bytes, "file table")
    (offset,) = _FILE_OFFSET.unpack_from(table)
    name = bytes(memoryview(table)[OFFSET_BYTES:])
    if _NAME.fullmatch(name) is None:
        raise FrameMalformedError("a file name outside [a-z0-9.-]{1,64}, or hidden")
    if offset + header.raw_bytes > FILE_END:
        raise FrameTooLargeError(f"a file beyond {FILE_END} bytes")
    return name.decode("ascii"), offset


def encode_file(name: str, offset: int) -> bytes:
    """The table of a FILE frame. Raises FrameMalformedError for a name that may not travel."""
    encoded = name.encode("utf-8", "replace")
    if _NAME.fullmatch(encoded) is None:
        raise FrameMalformedError(
            f"{name!r} is not a name that may travel: [a-z0-9.-]{{1,64}}, not hidden"
        )
    return _FILE_OFFSET.pack(offset) + encoded
