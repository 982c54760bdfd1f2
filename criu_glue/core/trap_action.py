"""What a task does on SIGTRAP, in CRIU's image of it: put back to what it was without our handler.

While CRIU dumps it, a task has a handler for SIGTRAP that is not its own (`trap_shield.py`), and
CRIU writes it down with the others. The image keeps its length: a number in it may have more bytes
than it needs (protobuf.dev/programming-guides/encoding, "varints").

Source: images/core.proto, images/sa.proto, criu/sigact.c. Pure: bytes in, bytes out.
"""

from __future__ import annotations

from typing import Final

from criu_glue.core.sigaction import ACTION
from criu_glue.core.wire import (
    IMG_COMMON_MAGIC,
    WIRE_BYTES,
    WIRE_VARINT,
    ImageFormatError,
    check_magic,
    decode_varint,
    iterate_fields,
    split_entries,
)

CORE_MAGIC: Final = 0x55053847
# Registers, timers, limits and 62 actions of one thread take some KiB.
CORE_BYTES_MAX: Final = 1 << 20

_SIGTRAP: Final = 5
_TASK: Final = 3  # core_entry.tc
_ACTIONS: Final = 15  # task_core_entry.sigactions, from signal 1 on


def with_trap_action(data: bytes, action: bytes, what: str = "core") -> bytes:
    """`core-N.img` with this action (`ACTION`) for SIGTRAP. Raises ImageFormatError, also when the
    image has no room for its numbers."""
    if len(data) > CORE_BYTES_MAX:
        raise ImageFormatError(f"{what}: {len(data)} bytes are more than {CORE_BYTES_MAX}")
    check_magic(data, IMG_COMMON_MAGIC, CORE_MAGIC, what)
    starts, ends = split_entries(data, what, entries_max=1)
    if not len(starts):
        raise ImageFormatError(f"{what}: is empty")
    task = _messages(data, int(starts[0]), int(ends[0]), _TASK)
    actions = [one for start, end in task for one in _messages(data, start, end, _ACTIONS)]
    if len(actions) < _SIGTRAP:
        raise ImageFormatError(f"{what}: has no action for SIGTRAP")
    out = bytearray(data)
    position, end = actions[_SIGTRAP - 1]
    values = dict(enumerate(ACTION.unpack(action), start=1))
    while position < end:
        tag, begin = decode_varint(data, position, end)
        if tag & 7 != WIRE_VARINT:
            raise ImageFormatError(f"{what}: an action has a field that is no number")
        _, position = decode_varint(data, begin, end)
        if tag >> 3 in values:
            out[begin:position] = padded_varint(values[tag >> 3], position - begin)
    return bytes(out)


def padded_varint(value: int, size: int) -> bytes:
    """A number in exactly so many bytes. Raises ImageFormatError when it needs more."""
    if value >> (7 * size):
        raise ImageFormatError(f"{value:#x} does not fit into {size} bytes")
    groups = [(value >> (7 * at)) & 0x7F for at in range(size)]
    return bytes([group | 0x80 for group in groups[:-1]] + groups[-1:])


def _messages(data: bytes, start: int, end: int, number: int) -> list[tuple[int, int]]:
    """[start, end) of every message in that field."""
    return [
        (position, position + size)
        for field, kind, position, size in iterate_fields(data, start, end)
        if field == number and kind == WIRE_BYTES
    ]
