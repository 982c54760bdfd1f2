"""Data streams: greetings, answers, and whole streams of frames as the receiver reads them.

    first byte  0 greeting | 1 answer | 2 frames as they are | 3 frames, made plausible

A checksum is a wall that a fuzzer does not climb, and behind it is what matters. So in 3 each frame
gets the checksum that its content has, and the sequence number that is next, before it is read.
"""

from __future__ import annotations

import re
import ssl
import struct
from collections.abc import Iterator
from contextlib import suppress
from typing import cast

import numpy as np
import xxhash
import zstandard

from transport.core import frames, tables
from transport.core.frames import (
    FRAME_RAW_BYTES_MAX,
    HEADER_BYTES,
    PAGE_BYTES,
    TICKET_BYTES,
    USE_BYTES,
    Answer,
    Codec,
    FrameHeader,
    FrameType,
    Hello,
    Status,
    StreamKind,
)
from transport.core.tables import ADDRESS_END, FILE_END, RunKind
from transport.errors import FrameError, StreamBrokenError
from transport.inbound import InboundStream, Session

MAX_BYTES = 16 << 10
IS_JSON = False

USE = bytes(range(USE_BYTES))

_TABLE_BYTES_AT = 20
_ENCODED_BYTES_AT = 28
_SEQUENCE_AT = 8
_CHECKSUM_AT = 32
_NAME = re.compile(r"[a-z0-9-][a-z0-9.-]{0,63}")


def one_input(data: bytes) -> None:
    """Nothing but FrameError, and StreamBrokenError at the end of the bytes, may come of it."""
    if not data:
        return
    content = data[1:]
    match data[0] % 4:
        case 0:
            _greeting(content)
        case 1:
            _answer(content)
        case 2:
            _stream(content)
        case _:
            _stream(plausible(content))


def _greeting(data: bytes) -> None:
    for candidate in (data, _sealed(data)):
        try:
            hello = frames.parse_hello(candidate)
        except FrameError:
            continue
        assert frames.encode_hello(hello) == candidate
        assert hello.ticket.hex() not in repr(hello)


def _answer(data: bytes) -> None:
    for candidate in (data, _sealed(data)):
        try:
            answer = frames.parse_answer(candidate)
        except FrameError:
            continue
        assert frames.encode_answer(answer) == candidate


def _sealed(data: bytes) -> bytes:
    content = data[:-8]
    return content + struct.pack("<Q", xxhash.xxh3_64_intdigest(content))


def _stream(data: bytes) -> None:
    wire, session = Wire(data), Session()
    stream = cast("ssl.SSLSocket", wire)
    inbound = InboundStream(stream, sink=Sink(), session=session, index=0, use=USE)
    with suppress(FrameError, StreamBrokenError):
        inbound.run()
    assert session.inbox(0).applied == inbound.frames == wire.answers


class Wire:
    """What the receiver reads from and answers to, in the place of a TLS socket."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self.answers = 0

    def settimeout(self, deadline_s: float) -> None:
        """Bytes are here, or never come."""

    def recv_into(self, view: memoryview, size: int) -> int:
        count = min(size, len(self._data), len(view))
        view[:count], self._data = self._data[:count], self._data[count:]
        return count

    def sendall(self, data: bytes) -> None:
        assert frames.parse_answer(data).status == Status.APPLIED
        self.answers += 1


class Sink:
    """Holds the receiver to what it promises a sink."""

    def write(self, task: int, address: int, data: memoryview) -> None:
        assert len(data) > 0
        self._place(task, address, len(data))

    def zero(self, task: int, address: int, pages: int) -> None:
        assert pages > 0
        self._place(task, address, pages * PAGE_BYTES)

    def write_file(self, name: str, offset: int, data: memoryview) -> None:
        assert _NAME.fullmatch(name)
        assert 0 <= offset <= FILE_END - len(data)
        assert len(data) <= FRAME_RAW_BYTES_MAX

    def _place(self, task: int, address: int, size: int) -> None:
        assert 1 <= task <= frames.TASK_MAX
        assert address % PAGE_BYTES == size % PAGE_BYTES == 0
        assert size <= FRAME_RAW_BYTES_MAX
        assert 0 <= address <= ADDRESS_END - size


def plausible(data: bytes) -> bytes:
    """`data` as frames, each with the next sequence number and its own checksum."""
    out = bytearray(data)
    begin, sequence = 0, 1
    while begin + HEADER_BYTES <= len(out):
        (table,) = struct.unpack_from("<I", out, begin + _TABLE_BYTES_AT)
        (encoded,) = struct.unpack_from("<I", out, begin + _ENCODED_BYTES_AT)
        end = begin + HEADER_BYTES + table + encoded
        if end > len(out):
            break
        struct.pack_into("<Q", out, begin + _SEQUENCE_AT, sequence)
        checked = xxhash.xxh3_64(memoryview(out)[begin : begin + _CHECKSUM_AT])
        checked.update(memoryview(out)[begin + HEADER_BYTES : end])
        struct.pack_into("<Q", out, begin + _CHECKSUM_AT, checked.intdigest())
        begin, sequence = end, sequence + 1
    return bytes(out)


def seeds() -> Iterator[bytes]:
    yield b"\0" + frames.encode_hello(Hello(StreamKind.PAGES, 3, bytes(range(TICKET_BYTES))))
    for status in Status:
        yield b"\1" + frames.encode_answer(Answer(status, 7))
    one = frame(FrameType.PAGES, runs([(0x1000, 1)]), bytes(PAGE_BYTES))
    yield b"\2" + plausible(one)
    yield b"\3" + one
    yield b"\3" + frame(FrameType.PAGES, runs([(0, 1), (0x5000, 1)], RunKind.ZERO), b"")
    packed = zstandard.compress(bytes(4 * PAGE_BYTES))
    contiguous = runs([(0x2000 + at * PAGE_BYTES, 1) for at in range(4)])
    yield b"\3" + frame(FrameType.PAGES, contiguous, packed, raw=4 * PAGE_BYTES)
    # A bomb: 8 MiB in what claims to be a page.
    bomb = zstandard.ZstdCompressor(write_content_size=True).compress(bytes(8 << 20))
    yield b"\3" + frame(FrameType.PAGES, runs([(0, 1)]), bomb, raw=PAGE_BYTES)
    file = frame(FrameType.FILE, tables.encode_file("core-1.img", 4096), b"content")
    yield b"\3" + file + one + file


def runs(pages: list[tuple[int, int]], kind: RunKind = RunKind.DATA) -> bytes:
    """The run table of single pages."""
    addresses = np.array([address for address, _ in pages], dtype=np.uint64)
    return tables.encode_runs(addresses, np.full(len(pages), kind, dtype=np.uint8))


def frame(kind: FrameType, table: bytes, body: bytes, *, raw: int | None = None) -> bytes:
    """A frame; compressed if its size before that is given. Made valid by `plausible`."""
    codec = Codec.RAW if raw is None else Codec.ZSTD
    task = 1 if kind == FrameType.PAGES else 0
    header = FrameHeader(kind, codec, 1, 1, task, len(table), len(body) if raw is None else raw, 0)
    return frames.encode_prefix(header, table, body) + body


DICTIONARY = (
    b"DLYH",
    b"DLYA",
    b"core-1.img",
    b"..",
    b"/",
    struct.pack("<Q", 1 << 63),
    struct.pack("<Q", (1 << 64) - 1),
    struct.pack("<Q", ADDRESS_END - PAGE_BYTES),
    struct.pack("<Q", FILE_END),
    struct.pack("<I", PAGE_BYTES),
    struct.pack("<I", FRAME_RAW_BYTES_MAX),
    struct.pack("<I", 0xFFFFFFFF),
    struct.pack("<II", 1, RunKind.ZERO),
    b"\x28\xb5\x2f\xfd",  # zstd's magic
)
