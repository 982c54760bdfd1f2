"""The wire format: golden bytes, round trips, and bytes that are not quite right."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from transport.codec import Decoder
from transport.core import frames, tables
from transport.core.frames import (
    FRAME_PAGES_MAX,
    FRAME_RAW_BYTES_MAX,
    HEADER_BYTES,
    PAGE_BYTES,
    Answer,
    Codec,
    FrameHeader,
    FrameType,
    Hello,
    Status,
    StreamKind,
)
from transport.core.tables import ADDRESS_END, RunKind
from transport.errors import (
    FrameCorruptError,
    FrameError,
    FrameMalformedError,
    FrameTooLargeError,
)

TICKET = bytes(range(32))
USE = bytes(range(0xA0, 0xB0))

GOLDEN_HELLO = bytes.fromhex(
    "444c5948"  # "DLYH"
    "0300"  # version 3
    "01"  # kind PAGES
    "00"  # reserved
    "03000000"  # stream 3
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # ticket
    "a0a1a2a3a4a5a6a7a8a9aaabacadaeaf"  # use
)
GOLDEN_ANSWER = bytes.fromhex(
    "444c5941"  # "DLYA"
    "0300"  # version 3
    "0200"  # APPLIED
    "0807060504030201"  # sequence
)
GOLDEN_FRAME_HEAD = bytes.fromhex(
    "01"  # PAGES
    "01"  # RAW
    "0000"  # reserved
    "07000000"  # round 7
    "0900000000000000"  # sequence 9
    "2a000000"  # task 42
    "20000000"  # table of 32 bytes
    "00100000"  # 4096 bytes raw
    "00100000"  # 4096 bytes encoded
)
GOLDEN_TABLE = bytes.fromhex(
    "00100000ff7f0000"  # address 0x7fff00001000
    "01000000"  # 1 page
    "01000000"  # DATA
    "00200000ff7f0000"  # address 0x7fff00002000
    "02000000"  # 2 pages
    "02000000"  # ZERO
)


def sealed(content: bytes) -> bytes:
    return content + struct.pack("<Q", xxhash.xxh3_64_intdigest(content))


def pages_frame(
    runs: Sequence[tuple[int, int, int]],
    body: bytes,
    *,
    codec: Codec = Codec.RAW,
    raw_bytes: int | None = None,
    **fields: int,
) -> bytes:
    """A frame with a right checksum, whatever else is wrong with it."""
    table = b"".join(struct.pack("<QII", *run) for run in runs)
    size = len(body) if raw_bytes is None else raw_bytes
    header = FrameHeader(FrameType.PAGES, codec, 1, 1, 1, 0, size, 0)
    header = dataclasses.replace(header, **fields)  # type: ignore[arg-type]
    return frames.encode_prefix(header, table, body) + body


def accept(data: bytes) -> FrameHeader:
    """Everything that a receiver does with one frame, as a pure function."""
    head, rest = data[:HEADER_BYTES], data[HEADER_BYTES:]
    header = frames.parse_header(head)
    if len(rest) != header.table_bytes + header.encoded_bytes:
        raise FrameMalformedError("not the declared size")
    table, body = rest[: header.table_bytes], rest[header.table_bytes :]
    frames.verify(header, head, table, body)
    if header.type == FrameType.PAGES:
        tables.parse_runs(header, table)
    else:
        tables.parse_file(header, table)
    assert (
        len(Decoder().decode(header.codec, memoryview(body), header.raw_bytes)) == header.raw_bytes
    )
    return header


def test_golden_hello() -> None:
    hello = Hello(StreamKind.PAGES, 3, TICKET, USE)
    assert frames.encode_hello(hello) == sealed(GOLDEN_HELLO)
    assert frames.parse_hello(sealed(GOLDEN_HELLO)) == hello
    assert len(sealed(GOLDEN_HELLO)) == frames.HELLO_BYTES


def test_a_ticket_does_not_get_into_logs() -> None:
    text = repr(Hello(StreamKind.PAGES, 3, TICKET, USE))
    assert not [part for part in ("0102", "x01", "a1a2", "xa1") if part in text]


def test_golden_answer() -> None:
    answer = Answer(Status.APPLIED, 0x0102030405060708)
    assert frames.encode_answer(answer) == sealed(GOLDEN_ANSWER)
    assert frames.parse_answer(sealed(GOLDEN_ANSWER)) == answer
    assert len(sealed(GOLDEN_ANSWER)) == frames.ANSWER_BYTES


def test_golden_frame() -> None:
    body = b"\xa5" * PAGE_BYTES
    checksum = xxhash.xxh3_64_intdigest(GOLDEN_FRAME_HEAD + GOLDEN_TABLE + body)
    golden = GOLDEN_FRAME_HEAD + struct.pack("<Q", checksum) + GOLDEN_TABLE
    header = FrameHeader(FrameType.PAGES, Codec.RAW, 7, 9, 42, 32, PAGE_BYTES, PAGE_BYTES)
    addresses = np.array([0x7FFF00001000, 0x7FFF00002000, 0x7FFF00003000], dtype=np.uint64)
    kinds = np.array([RunKind.DATA, RunKind.ZERO, RunKind.ZERO], dtype=np.uint8)
    table = tables.encode_runs(addresses, kinds)
    assert table == GOLDEN_TABLE
    assert frames.encode_prefix(header, table, body) == golden
    assert accept(golden + body) == dataclasses.replace(header, checksum=checksum)


def test_golden_file_table() -> None:
    assert (
        tables.encode_file("core-1.img", 0x100000) == b"\x00\x00\x10\x00\x00\x00\x00\x00core-1.img"
    )


@pytest.mark.parametrize("value", [0, 3, 255])
def test_unknown_types_and_codecs_are_refused(value: int) -> None:
    frame = bytearray(pages_frame([(0, 1, RunKind.ZERO)], b""))
    for place in (0, 1):
        changed = bytearray(frame)
        changed[place] = value
        with pytest.raises(FrameMalformedError):
            frames.parse_header(changed[:HEADER_BYTES])


def test_a_block_of_zeros_is_no_message() -> None:
    for parse, size in (
        (frames.parse_hello, frames.HELLO_BYTES),
        (frames.parse_answer, frames.ANSWER_BYTES),
        (frames.parse_header, frames.HEADER_BYTES),
    ):
        with pytest.raises(FrameError):
            parse(bytes(size))


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"table_bytes": frames.TABLE_BYTES_MAX + 16}, FrameTooLargeError),
        ({"table_bytes": 0xFFFFFFFF}, FrameTooLargeError),
        ({"table_bytes": 0}, FrameMalformedError),
        ({"table_bytes": 24}, FrameMalformedError),
        ({"raw_bytes": FRAME_RAW_BYTES_MAX + PAGE_BYTES}, FrameTooLargeError),
        ({"raw_bytes": 0xFFFFFFFF, "encoded_bytes": 0xFFFFFFFF}, FrameTooLargeError),
        ({"encoded_bytes": PAGE_BYTES + 1}, FrameTooLargeError),
        ({"encoded_bytes": PAGE_BYTES - 1}, FrameMalformedError),
        ({"raw_bytes": 100, "encoded_bytes": 100}, FrameMalformedError),
        ({"codec": Codec.ZSTD, "encoded_bytes": 0}, FrameMalformedError),
        ({"task": 0}, FrameMalformedError),
        ({"task": frames.TASK_MAX + 1}, FrameMalformedError),
        ({"sequence": 0}, FrameMalformedError),
        ({"type": FrameType.FILE}, FrameMalformedError),
        ({"type": FrameType.FILE, "task": 0, "table_bytes": 8}, FrameMalformedError),
        ({"type": FrameType.FILE, "task": 0, "table_bytes": 8 + 65}, FrameMalformedError),
    ],
)
def test_lengths_are_held_against_their_limits_before_anything_is_read(
    fields: dict[str, int], error: type[FrameError]
) -> None:
    values: dict[str, int] = {
        "type": FrameType.PAGES,
        "codec": Codec.RAW,
        "round": 1,
        "sequence": 1,
        "task": 1,
        "table_bytes": 16,
        "raw_bytes": PAGE_BYTES,
        "encoded_bytes": PAGE_BYTES,
    } | fields
    data = struct.pack(
        "<BBHIQIIIIQ",
        *(values[name] for name in ("type", "codec")),
        0,
        *(
            values[name]
            for name in ("round", "sequence", "task", "table_bytes", "raw_bytes", "encoded_bytes")
        ),
        0,
    )
    with pytest.raises(error):
        frames.parse_header(data)


def test_the_largest_header_passes() -> None:
    runs = [(at * 2 * PAGE_BYTES, 1, RunKind.DATA) for at in range(FRAME_PAGES_MAX)]
    assert accept(pages_frame(runs, bytes(FRAME_RAW_BYTES_MAX))).table_bytes == 4096


PAGE = bytes(PAGE_BYTES)


@pytest.mark.parametrize(
    ("runs", "body"),
    [
        pytest.param([(1, 1, 1)], PAGE, id="not-aligned"),
        pytest.param([(0, 0, 1)], b"", id="run-of-no-pages"),
        pytest.param([(0, 1, 0)], PAGE, id="kind-0"),
        pytest.param([(0, 1, 3)], PAGE, id="kind-3"),
        pytest.param([(0, 1, 1)], PAGE * 2, id="body-too-long"),
        pytest.param([(0, 2, 1)], PAGE, id="body-too-short"),
        pytest.param([(0, 1, 2)], PAGE, id="zero-run-with-body"),
        pytest.param([(PAGE_BYTES, 1, 1), (0, 1, 1)], PAGE * 2, id="out-of-order"),
        pytest.param([(0, 2, 1), (PAGE_BYTES, 1, 1)], PAGE * 3, id="overlapping"),
        pytest.param([(0, 1, 2), (0, 1, 2)], b"", id="twice"),
        pytest.param([(ADDRESS_END, 1, 2)], b"", id="beyond-user-space"),
        pytest.param([(ADDRESS_END - PAGE_BYTES, 2, 2)], b"", id="out-of-user-space"),
        pytest.param([(2**64 - PAGE_BYTES, 1, 2)], b"", id="wrapping-to-0"),
        pytest.param([(2**64 - PAGE_BYTES, 2, 2), (8192, 1, 2)], b"", id="wrapping-past-0"),
        pytest.param([(0, FRAME_PAGES_MAX + 1, 2)], b"", id="too-many-pages"),
        pytest.param([(0, 0xFFFFFFFF, 2)], b"", id="far-too-many-pages"),
        pytest.param([(0, 200, 2), (PAGE_BYTES * 200, 57, 2)], b"", id="too-many-in-sum"),
    ],
)
def test_run_tables_that_are_not_right(runs: list[tuple[int, int, int]], body: bytes) -> None:
    with pytest.raises(FrameMalformedError):
        accept(pages_frame(runs, body))


def test_the_last_page_of_user_space_may_travel() -> None:
    accept(pages_frame([(ADDRESS_END - PAGE_BYTES, 1, 1)], PAGE))


@pytest.mark.parametrize("name", ["core-1.img", "descriptors.json", "a", "0" * 64, "-", "a..b"])
def test_file_names_that_travel(name: str) -> None:
    table = tables.encode_file(name, 5)
    header = FrameHeader(FrameType.FILE, Codec.RAW, 1, 1, 0, len(table), 0, 0)
    assert tables.parse_file(header, table) == (name, 5)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "/a", "A", "a_b", "a b", "a\0", "a\n", "ä", "0" * 65]
)
def test_file_names_that_do_not(name: str) -> None:
    with pytest.raises(FrameMalformedError):
        tables.encode_file(name, 0)
    table = struct.pack("<Q", 0) + name.encode()
    header = FrameHeader(FrameType.FILE, Codec.RAW, 1, 1, 0, len(table), 0, 0)
    with pytest.raises(FrameMalformedError):
        tables.parse_file(header, table)


def test_a_file_ends_before_its_limit() -> None:
    table = tables.encode_file("a", tables.FILE_END - 1)
    header = FrameHeader(FrameType.FILE, Codec.RAW, 1, 1, 0, len(table), 2, 2)
    with pytest.raises(FrameTooLargeError):
        tables.parse_file(header, table)
    tables.parse_file(dataclasses.replace(header, raw_bytes=1), table)


def test_another_version_is_refused_by_name() -> None:
    other = bytearray(GOLDEN_HELLO)
    other[4] = frames.VERSION + 1
    with pytest.raises(FrameMalformedError, match=f"version {frames.VERSION + 1}"):
        frames.parse_hello(sealed(bytes(other)))


def test_stream_indexes_are_limited() -> None:
    other = bytearray(GOLDEN_HELLO)
    other[8] = frames.STREAMS_MAX
    with pytest.raises(FrameTooLargeError):
        frames.parse_hello(sealed(bytes(other)))


@pytest.mark.parametrize(
    "message",
    [
        pytest.param((frames.parse_hello, sealed(GOLDEN_HELLO)), id="hello"),
        pytest.param((frames.parse_answer, sealed(GOLDEN_ANSWER)), id="answer"),
        pytest.param((accept, pages_frame([(0, 3, 2), (1 << 20, 5, 2)], b"")), id="pages"),
        pytest.param(
            (
                accept,
                frames.encode_prefix(
                    FrameHeader(FrameType.FILE, Codec.RAW, 1, 1, 0, 0, 5, 0),
                    tables.encode_file("a.img", 0),
                    b"bytes",
                )
                + b"bytes",
            ),
            id="file",
        ),
    ],
)
def test_no_flipped_bit_and_no_other_length_is_accepted(message: tuple[object, bytes]) -> None:
    parse, data = message
    assert callable(parse)
    parse(data)
    for bit in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << (bit % 8)
        with pytest.raises(FrameError):
            parse(bytes(flipped))
    for length in range(len(data)):
        with pytest.raises(FrameError):
            parse(data[:length])
    with pytest.raises(FrameError):
        parse(data + b"\0")


@st.composite
def run_lists(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    runs = []
    address, remaining = draw(st.integers(0, 1 << 40)) * PAGE_BYTES, FRAME_PAGES_MAX
    for _ in range(draw(st.integers(1, 8))):
        pages = draw(st.integers(1, min(16, remaining)))
        runs.append((address, pages, draw(st.sampled_from([1, 2]))))
        address += (pages + draw(st.integers(1, 1000))) * PAGE_BYTES
        remaining -= pages
    return runs


@given(run_lists(), st.integers(0, 2**32 - 1), st.integers(1, 2**64 - 1), st.integers(1, 1 << 22))
def test_frames_round_trip(
    runs: list[tuple[int, int, int]], number: int, sequence: int, task: int
) -> None:
    addresses = np.array(
        [address + at * PAGE_BYTES for address, pages, _ in runs for at in range(pages)],
        dtype=np.uint64,
    )
    kinds = np.array([kind for _, pages, kind in runs for _ in range(pages)], dtype=np.uint8)
    table = tables.encode_runs(addresses, kinds)
    body = bytes(sum(pages for _, pages, kind in runs if kind == RunKind.DATA) * PAGE_BYTES)
    header = FrameHeader(FrameType.PAGES, Codec.RAW, number, sequence, task, 0, len(body), 0)
    data = frames.encode_prefix(header, table, body) + body
    parsed = accept(data)
    assert (parsed.round, parsed.sequence, parsed.task) == (number, sequence, task)
    assert tables.parse_runs(parsed, table).tolist() == runs


@given(st.binary(max_size=200))
def test_noise_is_a_frame_error(noise: bytes) -> None:
    for parse in (frames.parse_hello, frames.parse_answer, accept):
        with pytest.raises(FrameError):
            parse(noise)


@given(run_lists(), st.lists(st.tuples(st.integers(0, 500), st.integers(1, 255)), min_size=1))
def test_mutations_with_a_right_checksum_are_judged_by_their_content(
    runs: list[tuple[int, int, int]], changes: list[tuple[int, int]]
) -> None:
    """A hostile peer can compute checksums: then FrameError, or a frame that keeps the rules."""
    body = bytes(sum(pages for _, pages, kind in runs if kind == RunKind.DATA) * PAGE_BYTES)
    data = bytearray(pages_frame(runs, body))
    for place, flip in changes:
        data[place % min(len(data), HEADER_BYTES + 128)] ^= flip
    content = bytes(data[: HEADER_BYTES - 8]) + bytes(data[HEADER_BYTES:])
    data[HEADER_BYTES - 8 : HEADER_BYTES] = struct.pack("<Q", xxhash.xxh3_64_intdigest(content))
    try:
        header = accept(bytes(data))
    except FrameError:
        return
    if header.type == FrameType.PAGES:
        end = 0
        table = bytes(data[HEADER_BYTES : HEADER_BYTES + header.table_bytes])
        for address, pages, kind in tables.parse_runs(header, table).tolist():
            assert address >= end
            assert address % PAGE_BYTES == 0
            assert kind in (RunKind.DATA, RunKind.ZERO)
            end = address + pages * PAGE_BYTES
        assert end <= ADDRESS_END


def test_a_flipped_bit_in_a_large_body_is_found() -> None:
    data = bytearray(pages_frame([(0, 256, 1)], bytes(FRAME_RAW_BYTES_MAX)))
    data[-1] ^= 1
    with pytest.raises(FrameCorruptError):
        accept(bytes(data))
