"""The action for SIGTRAP in a core image, put back in place."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_glue.core.sigaction import ACTION
from criu_glue.core.trap_action import CORE_MAGIC, padded_varint, with_trap_action
from criu_glue.core.wire import IMG_COMMON_MAGIC, ImageFormatError, decode_varint, iterate_fields

ALL = (1 << 64) - 1
SHIELD = (0x5555_5555_4000, 0x0C00_0000, 0x5555_5555_4000, ALL)
MAGIC = struct.pack("<II", IMG_COMMON_MAGIC, CORE_MAGIC)
# core_entry.mtype, and a field behind the task's.
BEFORE, BEHIND = b"\x08\x01", b"\x22\x02\x08\x07"


def varint(value: int) -> bytes:
    size = max(1, -(-value.bit_length() // 7))
    return padded_varint(value, size)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def action(values: tuple[int, ...]) -> bytes:
    return b"".join(varint(at << 3) + varint(value) for at, value in enumerate(values, start=1))


def image(actions: Sequence[tuple[int, ...]]) -> bytes:
    task = b"\x08\x01" + b"".join(message(15, action(one)) for one in actions)
    entry = BEFORE + message(3, task) + BEHIND
    return MAGIC + struct.pack("<I", len(entry)) + entry


def actions_of(data: bytes) -> list[tuple[int, ...]]:
    ((_, _, at, size),) = [one for one in iterate_fields(data, 12, len(data)) if one[0] == 3]
    return [
        tuple(value for _, _, value, _ in iterate_fields(data, begin, begin + length))
        for field, _, begin, length in iterate_fields(data, at, at + size)
        if field == 15
    ]


OTHERS = [(0, 0, 0, 0), (1, 0, 0, 0), (0x4000_1000, 0x1400_0000, 0x4000_2000, 4)]


@pytest.mark.parametrize("old", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0x0400_0000, 0x7F12_3456, 1)])
def test_only_that_of_sigtrap_is_put_back(old: tuple[int, ...]) -> None:
    before = [OTHERS[at % 3] for at in range(62)]
    before[4] = SHIELD
    data = image(before)
    cleaned = with_trap_action(data, ACTION.pack(*old))
    assert len(cleaned) == len(data)
    assert actions_of(cleaned) == [*before[:4], old, *before[5:]]
    assert cleaned.endswith(BEHIND)


@given(st.integers(0, ALL), st.integers(0, 10))
def test_a_number_in_as_many_bytes_as_there_are(value: int, more: int) -> None:
    size = min(10, len(varint(value)) + more)
    padded = padded_varint(value, size)
    assert len(padded) == size
    assert decode_varint(padded, 0, size) == (value, size)


def test_a_number_that_does_not_fit() -> None:
    with pytest.raises(ImageFormatError, match="does not fit"):
        with_trap_action(image([(0, 0, 0, 0)] * 62), ACTION.pack(*SHIELD))


def test_an_image_that_is_none() -> None:
    for data in (b"", MAGIC, MAGIC[::-1], image([SHIELD] * 4), image([SHIELD] * 62)[:-3]):
        with pytest.raises(ImageFormatError):
            with_trap_action(data, bytes(ACTION.size))
