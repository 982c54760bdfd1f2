"""Protocol-buffer wire format, as much of it as CRIU's small images need, without protobuf.

The distributions' protobuf is pure Python and takes 20 µs a message: a second for the pagemap of
a fragmented heap, inside the downtime. Here many messages of plain integers are decoded at once
with numpy. Knows the framing of CRIU's image files, but not what any message means.

    file    = first magic u32 | second magic u32 | entry...        (little-endian)
    entry   = size u32 | protobuf message of that size
    message = (tag varint | value)...   tag = field number << 3 | wire type

Source: criu/protobuf.c, criu/include/magic.h, protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from criu_glue.errors import CriuGlueError

if TYPE_CHECKING:
    from collections.abc import Iterator

IMG_COMMON_MAGIC: Final = 0x54564319
IMG_SERVICE_MAGIC: Final = 0x55105940
MAGIC_BYTES: Final = 8
SIZE_BYTES: Final = 4

WIRE_VARINT: Final = 0
WIRE_64BIT: Final = 1
WIRE_BYTES: Final = 2
WIRE_32BIT: Final = 5
# Ten groups of seven bits hold a u64.
VARINT_BYTES_MAX: Final = 10

Offsets = npt.NDArray[np.int64]
_Bytes = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint64]

# One varint is looked at as one little-endian word of eight bytes.
_STOP_BITS: Final = np.uint64(0x8080_8080_8080_8080)
_WORD_BYTES: Final = 8
_ONE: Final = np.uint64(1)


class ImageFormatError(CriuGlueError):
    """A CRIU image file is damaged, or of a version that this program does not know."""


def check_magic(data: bytes, first: int, second: int, what: str) -> None:
    """Raise ImageFormatError when `data` does not begin with these two magics."""
    if len(data) < MAGIC_BYTES:
        raise ImageFormatError(f"{what}: {len(data)} bytes are too few for an image file")
    found = struct.unpack_from("<II", data)
    if found != (first, second):
        raise ImageFormatError(f"{what}: magic {found[0]:#x} {found[1]:#x} is not of this image")


def split_entries(data: bytes, what: str, *, entries_max: int) -> tuple[Offsets, Offsets]:
    """Where the messages of an image file begin and end: two arrays of shape (n,).

    Raises ImageFormatError when the sizes do not add up to the file's, or there are too many.
    """
    begins = _short_entries(data, entries_max)
    if begins is None:
        begins = _any_entries(data, what, entries_max)
    ends = np.append(begins[1:], np.int64(len(data))) if len(begins) else begins
    return begins + SIZE_BYTES, ends


def _short_entries(data: bytes, entries_max: int) -> Offsets | None:
    """Positions of the entries, of which each must be below 256 bytes, as messages of plain
    integers are; None when one is not, or the sizes don't add up.

    Reading one byte of a size instead of four is what makes a decode of 100,000 entries take
    milliseconds; the other three are checked for all together.
    """
    starts: list[int] = []
    position, end = MAGIC_BYTES, len(data)
    while position < end and len(starts) < entries_max:
        starts.append(position)
        position += SIZE_BYTES + data[position]
    if position != end:
        return None
    begins = np.array(starts, dtype=np.int64)
    buffer = np.frombuffer(data, dtype=np.uint8)
    if any(buffer[begins + byte].any() for byte in range(1, SIZE_BYTES)):
        return None
    return begins


def _any_entries(data: bytes, what: str, entries_max: int) -> Offsets:
    starts: list[int] = []
    position, end = MAGIC_BYTES, len(data)
    while position + SIZE_BYTES <= end:
        if len(starts) >= entries_max:
            raise ImageFormatError(f"{what}: more than {entries_max} entries")
        starts.append(position)
        position += SIZE_BYTES + int(struct.unpack_from("<I", data, position)[0])
    if position != end:
        raise ImageFormatError(f"{what}: cut off in the middle of an entry")
    return np.array(starts, dtype=np.int64)


def decode_varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    """One varint: its value and the position after it."""
    value = 0
    for index in range(VARINT_BYTES_MAX):
        if position >= end:
            raise ImageFormatError("a number is cut off")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
    raise ImageFormatError(f"a number is longer than {VARINT_BYTES_MAX} bytes")


def encode_varint(value: int) -> bytes:
    """One number, of 64 bits at most."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def iterate_fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """The fields of one message: (field number, wire type, value, size).

    For WIRE_BYTES `value` is the position of its `size` bytes; else it is the number itself and
    size is 0. One bounded step per field: a message has at most `end - start` of them.
    """
    position = start
    while position < end:
        tag, position = decode_varint(data, position, end)
        field, kind = tag >> 3, tag & 7
        if kind == WIRE_VARINT:
            value, position = decode_varint(data, position, end)
            yield field, kind, value, 0
            continue
        if kind == WIRE_BYTES:
            size, position = decode_varint(data, position, end)
        elif kind in (WIRE_64BIT, WIRE_32BIT):
            size = 8 if kind == WIRE_64BIT else 4
        else:
            raise ImageFormatError(f"field {field} has unknown wire type {kind}")
        if size > end - position:
            raise ImageFormatError(f"field {field} is cut off")
        if kind == WIRE_BYTES:
            yield field, kind, position, size
        else:
            yield field, kind, int.from_bytes(data[position : position + size], "little"), 0
        position += size


def _words_at(buffer: _Bytes, positions: Offsets) -> _Words:
    """The eight bytes at each position as a number; `buffer` is padded with eight more."""
    windows = np.lib.stride_tricks.as_strided(
        buffer, shape=(len(buffer) - _WORD_BYTES + 1, _WORD_BYTES), strides=(1, 1)
    )
    return np.ascontiguousarray(windows[positions]).view("<u8").reshape(-1).astype(np.uint64)


def _decode_varints(
    data: bytes, buffer: _Bytes, positions: Offsets, ends: Offsets
) -> tuple[_Words, Offsets]:
    """One varint at each position: values and the positions after them."""
    words = _words_at(buffer, positions)
    stops = ~words & _STOP_BITS
    long = stops == 0
    # Bits up to the first byte without a continuation bit; all of them when there is none.
    used = words & (stops ^ (stops - _ONE))
    value = used & ~_STOP_BITS
    # Squeeze out the continuation bits: 8 x 7 -> 4 x 14 -> 2 x 28 -> 56.
    for shift, high, low in (
        (1, 0x7F00_7F00_7F00_7F00, 0x007F_007F_007F_007F),
        (2, 0x3FFF_0000_3FFF_0000, 0x0000_3FFF_0000_3FFF),
        (4, 0x0FFF_FFFF_0000_0000, 0x0000_0000_0FFF_FFFF),
    ):
        value = ((value & np.uint64(high)) >> np.uint64(shift)) | (value & np.uint64(low))
    lowest = stops & (~stops + _ONE)
    size = np.frexp(lowest.astype(np.float64))[1].astype(np.int64) // 8
    after = positions + size
    for index in np.flatnonzero(long):
        value[index], after[index] = decode_varint(data, int(positions[index]), int(ends[index]))
    if (after > ends).any():
        raise ImageFormatError("a number is cut off")
    return value, after


def decode_flat_messages(
    data: bytes, starts: Offsets, ends: Offsets, *, fields: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Messages of optional integer fields numbered 1..fields, all decoded together.

    Returns two arrays of shape (n, fields + 1): values (0 when absent) and presence; column =
    field number. A signed or zigzag number comes as its raw varint. A field that is unknown, not
    an integer, or repeated more often than there are field numbers raises ImageFormatError:
    whoever writes such a message back would lose it.
    """
    count = len(starts)
    values = np.zeros((count, fields + 1), dtype=np.uint64)
    present = np.zeros((count, fields + 1), dtype=np.bool_)
    buffer = np.frombuffer(data + bytes(_WORD_BYTES), dtype=np.uint8)
    rows = np.arange(count, dtype=np.int64)
    positions, limits = starts, ends
    for _ in range(fields):
        unfinished = positions < limits
        if not unfinished.all():
            rows, positions, limits = rows[unfinished], positions[unfinished], limits[unfinished]
        if not len(rows):
            break
        tags = buffer[positions]
        numbers = (tags >> 3).astype(np.int64)
        if (tags & 0x87).any() or not numbers.all() or (numbers > fields).any():
            raise ImageFormatError("a message has a field that is unknown here")
        value, positions = _decode_varints(data, buffer, positions + 1, limits)
        values[rows, numbers] = value
        present[rows, numbers] = True
    if (positions < limits).any():
        raise ImageFormatError("a message repeats its fields")
    return values, present


def varint_sizes(values: _Words) -> Offsets:
    """Bytes that each number takes as a varint."""
    sizes = np.ones(len(values), dtype=np.int64)
    for index in range(1, VARINT_BYTES_MAX):
        sizes += values >= np.uint64(1 << (7 * index))
    return sizes


def put_varints(out: _Bytes, positions: Offsets, values: _Words, sizes: Offsets) -> None:
    """Write each number at its position; `sizes` from varint_sizes."""
    for index in range(int(sizes.max(initial=0))):
        rows = np.flatnonzero(sizes > index)
        group = (values[rows] >> np.uint64(7 * index)) & np.uint64(0x7F)
        more = (sizes[rows] > index + 1).astype(np.uint64) << np.uint64(7)
        out[positions[rows] + index] = group | more
