"""Periodic timerfds that had gone off and were not read when they were dumped: armed again.

Such a timer has no time left, only ticks to be read; the kernel starts it anew when they are. CRIU
restores "no time left" as "off" (criu/timerfd.c), so the program would wait for ever. Here it gets
one nanosecond: it goes off at once, keeps its ticks, and its period goes on from there. A freeze
that is longer than a period does this to every periodic timerfd that nobody reads meanwhile.

A timer that was switched off with its period left set has no ticks, and stays off.

Source: images/fdinfo.proto, images/timerfd.proto, fs/timerfd.c (timerfd_tmrproc, timerfd_setup).
Pure: bytes in, bytes out.
"""

from __future__ import annotations

from typing import Final

from criu_glue.core.wire import (
    IMG_COMMON_MAGIC,
    WIRE_BYTES,
    WIRE_VARINT,
    ImageFormatError,
    check_magic,
    iterate_fields,
    split_entries,
)

FILES_MAGIC: Final = 0x56303138
# Open files of a container; fs.nr_open allows as many to one task.
FILES_MAX: Final = 1 << 20
FILES_BYTES_MAX: Final = FILES_MAX * 128

# file_entry: type = 1, tfd = 12; fd_types: TIMERFD = 17
_TYPE_TIMERFD: Final = bytes((1 << 3, 17))
_FILE_TIMER: Final = 12
_TICKS, _SECONDS, _NANOSECONDS, _PERIOD_SECONDS, _PERIOD_NANOSECONDS = 5, 7, 8, 9, 10
# Both as they are written when they are 0. These bytes can't be in what comes before them: a number
# ends with its first byte below 128, and the 0 after it would be the tag of no field.
_NO_TIME_LEFT: Final = bytes((_SECONDS << 3, 0, _NANOSECONDS << 3, 0))


def rearm_timers(data: bytes, what: str = "files") -> bytes:
    """`files.img` with these timers armed, of the same length. Raises ImageFormatError."""
    if len(data) > FILES_BYTES_MAX:
        raise ImageFormatError(f"{what}: {len(data)} bytes are more than {FILES_BYTES_MAX}")
    check_magic(data, IMG_COMMON_MAGIC, FILES_MAGIC, what)
    starts, ends = split_entries(data, what, entries_max=FILES_MAX)
    out = bytearray(data)
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if not data.startswith(_TYPE_TIMERFD, start):
            continue
        for field, kind, position, size in iterate_fields(data, start, end):
            if field == _FILE_TIMER and kind == WIRE_BYTES:
                place = _nanoseconds_of_expired(data, position, position + size)
                if place is not None:
                    out[place] = 1
    return bytes(out)


def _nanoseconds_of_expired(data: bytes, start: int, end: int) -> int | None:
    """Where the one byte is that says how many nanoseconds a timer has left; None for a timer that
    is not one of these."""
    values: dict[int, int] = {}
    begin = start
    for field, kind, value, size in iterate_fields(data, start, end):
        if field in values or kind not in (WIRE_VARINT, WIRE_BYTES):
            raise ImageFormatError("a timer has a field twice, or of a kind that is unknown here")
        values[field] = value
        # Only between numbers the bytes below mean what they say.
        begin = value + size if kind == WIRE_BYTES else begin
    has_period = values.get(_PERIOD_SECONDS) or values.get(_PERIOD_NANOSECONDS)
    has_time = values.get(_SECONDS) or values.get(_NANOSECONDS)
    if has_time or not has_period or not values.get(_TICKS):
        return None
    place = data.find(_NO_TIME_LEFT, begin, end)
    if place < 0:
        raise ImageFormatError("a timer's fields are not in the order of their numbers")
    return place + len(_NO_TIME_LEFT) - 1
