"""What travels on a data stream: byte layouts, their limits, and the checks on what a peer sends.

Pure: bytes in, values out, and `FrameError` for everything that is not exactly right. It must not
know sockets, TLS, compression or who asked. All integers are little-endian; value 0 of every
enumeration is invalid, so that a block of zeros is never a message. Every message ends in, or
carries, an xxh3-64 over all its other bytes (against faults of memory and of this program; against
people there is TLS).

A stream's client greets, the server answers, then frames go one way and answers the other::

    client                                    server
      | HELLO (ticket, stream index)  ------->  |  who may it be? which sink?
      | <-------  ANSWER (ACCEPTED, sequence)   |  sequence = last frame of it applied
      | FRAME (sequence + 1) ---------------->  |
      | FRAME (sequence + 2) ---------------->  |
      | <-------- ANSWER (APPLIED, sequence+1)  |  after the sink has it
      | <-------- ANSWER (APPLIED, sequence+2)  |  in order, one for each frame

HELLO, 68 bytes. `use` is drawn at random by each sender for each of its streams, and is the same
on every connection of it: so a ticket that is used a second time is told from a reconnection. It
is the key of what is kept of the stream's bodies, too (`transport.core.transcript`)::

     0        4         6      7      8         12                44               60         68
     +--------+---------+------+------+---------+-----------------+----------------+----------+
     | "DLYH" | version | kind |  0   | stream  | ticket 32 bytes | use 16 bytes   | checksum |
     +--------+---------+------+------+---------+-----------------+----------------+----------+

ANSWER, 24 bytes, to a HELLO and to every frame::

     0        4         6         8                    16                 24
     +--------+---------+---------+--------------------+------------------+
     | "DLYA" | version | status  | sequence           | checksum         |
     +--------+---------+---------+--------------------+------------------+

FRAME, 40 bytes of header, then table, then body; checksum over header[0:32], table and body::

     0      1       2      4        8            16      20        24      28        32         40
     +------+-------+------+--------+------------+-------+---------+-------+---------+----------+
     | type | codec |  0   | round  | sequence   | task  | table   | raw   | encoded | checksum |
     |  u8  |  u8   | u16  |  u32   |    u64     |  u32  | bytes   | bytes | bytes   |   u64    |
     +------+-------+------+--------+------------+-------+---------+-------+---------+----------+
     | table: `table bytes`                                                                     |
     +------------------------------------------------------------------------------------------+
     | body: `encoded bytes`, which decode to `raw bytes`                                       |
     +------------------------------------------------------------------------------------------+

    PAGES table: runs, 16 bytes each, in ascending order      FILE table
     0             8         12       16                       0            8
     +-------------+---------+--------+                        +------------+---------------------+
     | address u64 | pages   | kind   |  ...                   | offset u64 | name, 1 to 64 bytes |
     +-------------+---------+--------+                        +------------+---------------------+

The tables are read and written by `transport.core.tables`. The body of a PAGES frame is the pages
of its DATA runs, concatenated; ZERO runs have no body. A FILE frame's body is the file's bytes from
`offset`; an empty file is one frame without body.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import TypeAlias

import xxhash

from transport.errors import (
    FrameCorruptError,
    FrameMalformedError,
    FrameTooLargeError,
)

Data: TypeAlias = bytes | bytearray | memoryview

VERSION = 3
PAGE_BYTES = 4096
FRAME_PAGES_MAX = 256
"""Pages of one frame: 1 MiB amortises a frame's fixed costs and keeps a re-sent frame cheap."""
FRAME_RAW_BYTES_MAX = FRAME_PAGES_MAX * PAGE_BYTES
TASK_MAX = 1 << 22
"""The kernel's PID_MAX_LIMIT (`include/linux/threads.h`)."""
STREAMS_MAX = 16
"""Streams of one session; beyond a few, more of them only divide the same link."""
NAME_BYTES_MAX = 64
TICKET_BYTES = 32
USE_BYTES = 16

_HELLO = struct.Struct("<4sHBBI32s16sQ")
_ANSWER = struct.Struct("<4sHHQQ")
_HEADER = struct.Struct("<BBHIQIIIIQ")
_CHECKSUM = struct.Struct("<Q")
_HELLO_MAGIC = b"DLYH"
_ANSWER_MAGIC = b"DLYA"

HELLO_BYTES = _HELLO.size
ANSWER_BYTES = _ANSWER.size
HEADER_BYTES = _HEADER.size
RUN_BYTES = 16
OFFSET_BYTES = 8
TABLE_BYTES_MAX = FRAME_PAGES_MAX * RUN_BYTES
"""Every run has a page at least, so that a frame has no more runs than pages."""
PREFIX_BYTES_MAX = HEADER_BYTES + TABLE_BYTES_MAX


class StreamKind(enum.IntEnum):
    PAGES = 1


class FrameType(enum.IntEnum):
    PAGES = 1
    FILE = 2


class Codec(enum.IntEnum):
    RAW = 1
    ZSTD = 2


class Status(enum.IntEnum):
    """What a server answers. Everything but the first two ends the stream."""

    ACCEPTED = 1
    APPLIED = 2
    REFUSED = 3
    """The ticket is unknown, or another host's, or over; the server does not say which."""
    BUSY = 4
    """No room now, or this stream's former connection is still being ended: ask again."""
    BAD_FRAME = 5
    SINK_FAILED = 6
    SINK_FULL = 7
    """There is no room for what was sent."""
    DISTRUSTED = 8
    """The caller's identity is not one that the server speaks to; it was revoked, for example."""


@dataclass(frozen=True, slots=True)
class Hello:
    """A client's greeting. `ticket` and `use` are secrets: they are kept out of `repr`."""

    kind: StreamKind
    stream: int
    ticket: bytes
    use: bytes = bytes(USE_BYTES)

    def __repr__(self) -> str:
        return f"Hello(kind={self.kind.name}, stream={self.stream})"


@dataclass(frozen=True, slots=True)
class Answer:
    status: Status
    sequence: int


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The fixed part of a frame; lengths in bytes, already within their limits."""

    type: FrameType
    codec: Codec
    round: int
    sequence: int
    task: int
    table_bytes: int
    raw_bytes: int
    encoded_bytes: int
    checksum: int = 0


def encode_hello(hello: Hello) -> bytes:
    if len(hello.ticket) != TICKET_BYTES:
        raise FrameMalformedError(f"a ticket has {TICKET_BYTES} bytes, not {len(hello.ticket)}")
    if len(hello.use) != USE_BYTES:
        raise FrameMalformedError(f"a use has {USE_BYTES} bytes, not {len(hello.use)}")
    content = (VERSION, hello.kind, 0, hello.stream, hello.ticket, hello.use)
    return _sealed(_HELLO.pack(_HELLO_MAGIC, *content, 0))


def parse_hello(data: Data) -> Hello:
    """The greeting in `data`, exactly HELLO_BYTES. Raises FrameError."""
    exactly(data, HELLO_BYTES, "greeting")
    magic, version, kind, reserved, stream, ticket, use, checksum = _HELLO.unpack(data)
    _magic(magic, _HELLO_MAGIC, version)
    _sealed_right(data, checksum, "greeting")
    if reserved != 0:
        raise FrameMalformedError("reserved bits set in the greeting")
    if kind not in StreamKind.__members__.values():
        raise FrameMalformedError(f"unknown stream kind {kind}")
    if stream >= STREAMS_MAX:
        raise FrameTooLargeError(f"stream index {stream}, the largest is {STREAMS_MAX - 1}")
    return Hello(StreamKind(kind), stream, ticket, use)


def encode_answer(answer: Answer) -> bytes:
    return _sealed(_ANSWER.pack(_ANSWER_MAGIC, VERSION, answer.status, answer.sequence, 0))


def parse_answer(data: Data) -> Answer:
    """The answer in `data`, exactly ANSWER_BYTES. Raises FrameError."""
    exactly(data, ANSWER_BYTES, "answer")
    magic, version, status, sequence, checksum = _ANSWER.unpack(data)
    _magic(magic, _ANSWER_MAGIC, version)
    _sealed_right(data, checksum, "answer")
    if status not in Status.__members__.values():
        raise FrameMalformedError(f"unknown status {status}")
    return Answer(Status(status), sequence)


def encode_prefix(header: FrameHeader, table: bytes, body: Data) -> bytes:
    """A frame's header and table, to be sent before `body`; sizes are taken from the arguments.

    `header.table_bytes`, `encoded_bytes` and `checksum` need not be filled in.
    """
    head = _HEADER.pack(
        header.type,
        header.codec,
        0,
        header.round,
        header.sequence,
        header.task,
        len(table),
        header.raw_bytes,
        len(body),
        0,
    )[: -_CHECKSUM.size]
    return b"".join((head, _CHECKSUM.pack(_frame_checksum(head, table, body)), table))


def parse_header(data: Data) -> FrameHeader:
    """The header in `data`, exactly HEADER_BYTES, with every length within its limit.

    What the table must be is checked by `transport.core.tables`, after `verify`. Raises
    FrameError.
    """
    exactly(data, HEADER_BYTES, "frame header")
    (
        kind,
        codec,
        reserved,
        number,
        sequence,
        task,
        table_bytes,
        raw_bytes,
        encoded_bytes,
        checksum,
    ) = _HEADER.unpack(data)
    if kind not in FrameType.__members__.values():
        raise FrameMalformedError(f"unknown frame type {kind}")
    if codec not in Codec.__members__.values():
        raise FrameMalformedError(f"unknown codec {codec}")
    if reserved != 0 or sequence == 0:
        raise FrameMalformedError("reserved bits set, or sequence number 0")
    if table_bytes > TABLE_BYTES_MAX:
        raise FrameTooLargeError(f"table of {table_bytes} bytes, at most {TABLE_BYTES_MAX}")
    if raw_bytes > FRAME_RAW_BYTES_MAX or encoded_bytes > raw_bytes:
        raise FrameTooLargeError(
            f"body of {encoded_bytes} bytes for {raw_bytes}, at most {FRAME_RAW_BYTES_MAX}"
        )
    if codec == Codec.RAW and encoded_bytes != raw_bytes:
        raise FrameMalformedError(f"raw body of {encoded_bytes} bytes declares {raw_bytes}")
    if codec == Codec.ZSTD and encoded_bytes == 0:
        raise FrameMalformedError("compressed body of no bytes")
    header = FrameHeader(
        FrameType(kind),
        Codec(codec),
        number,
        sequence,
        task,
        table_bytes,
        raw_bytes,
        encoded_bytes,
        checksum,
    )
    _check_shape(header)
    return header


def verify(header: FrameHeader, header_data: Data, table: Data, body: Data) -> None:
    """Raise FrameCorruptError unless the checksum matches; `body` is still encoded."""
    found = _frame_checksum(memoryview(header_data)[: -_CHECKSUM.size], table, body)
    if found != header.checksum:
        raise FrameCorruptError(
            f"frame {header.sequence} of round {header.round} fails its checksum"
        )


def _check_shape(header: FrameHeader) -> None:
    if header.type == FrameType.PAGES:
        if not 1 <= header.task <= TASK_MAX:
            raise FrameMalformedError(f"task {header.task}")
        if header.table_bytes == 0 or header.table_bytes % RUN_BYTES:
            raise FrameMalformedError(f"run table of {header.table_bytes} bytes")
        if header.raw_bytes % PAGE_BYTES:
            raise FrameMalformedError(f"pages of {header.raw_bytes} bytes")
        return
    if header.task != 0:
        raise FrameMalformedError("a file of a task")
    if not 1 <= header.table_bytes - OFFSET_BYTES <= NAME_BYTES_MAX:
        raise FrameMalformedError(f"file table of {header.table_bytes} bytes")


def _frame_checksum(head: Data, table: Data, body: Data) -> int:
    state = xxhash.xxh3_64(head)
    state.update(table)
    state.update(body)
    return int(state.intdigest())


def _sealed(data: bytes) -> bytes:
    content = data[: -_CHECKSUM.size]
    return content + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(content))


def _sealed_right(data: Data, checksum: int, what: str) -> None:
    if xxhash.xxh3_64_intdigest(memoryview(data)[: -_CHECKSUM.size]) != checksum:
        raise FrameCorruptError(f"a {what} fails its checksum")


def exactly(data: Data, size: int, what: str) -> None:
    if len(data) != size:
        raise FrameMalformedError(f"{what} of {len(data)} bytes instead of {size}")


def _magic(found: bytes, expected: bytes, version: int) -> None:
    if found != expected:
        raise FrameMalformedError("not a data stream of this protocol")
    if version != VERSION:
        raise FrameMalformedError(f"protocol version {version}, this side speaks {VERSION}")
