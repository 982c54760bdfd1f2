"""The RESP codec: whatever is encoded comes back, however the bytes are cut."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workloads.resp import (
    ARRAY_ITEMS_MAX,
    BULK_BYTES_MAX,
    DEPTH_MAX,
    LINE_BYTES_MAX,
    Decoder,
    ErrorReply,
    RespError,
    encode,
)

if TYPE_CHECKING:
    from bench.workloads.resp import Reply

LINE_TEXT = st.text(
    st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=30
)
LEAVES = st.one_of(
    st.none(),
    st.integers(-(2**63), 2**63 - 1),
    st.binary(max_size=200),
    LINE_TEXT,
    LINE_TEXT.map(ErrorReply),
)
REPLIES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4), max_leaves=10)


def wire(reply: Reply) -> bytes:
    """What a server would send: written from the specification, independent of the codec."""
    if reply is None:
        return b"$-1\r\n"
    if isinstance(reply, ErrorReply):
        return b"-" + reply.message.encode() + b"\r\n"
    if isinstance(reply, int):
        return b":" + str(reply).encode() + b"\r\n"
    if isinstance(reply, str):
        return b"+" + reply.encode() + b"\r\n"
    if isinstance(reply, bytes):
        return b"$" + str(len(reply)).encode() + b"\r\n" + reply + b"\r\n"
    return b"*" + str(len(reply)).encode() + b"\r\n" + b"".join(map(wire, reply))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(edges)]


@given(st.lists(REPLIES, max_size=5), st.lists(st.integers(0), max_size=8))
def test_replies_come_back_however_they_are_cut(replies: list[Reply], cuts: list[int]) -> None:
    decoder = Decoder()
    decoded = [
        reply
        for piece in pieces(b"".join(map(wire, replies)), cuts)
        for reply in decoder.feed(piece)
    ]
    assert decoded == replies
    assert decoder.pending_bytes == 0


@given(st.lists(st.one_of(st.binary(max_size=50), st.text(max_size=20), st.integers()), min_size=1))
def test_requests_are_arrays_of_bulk_strings(words: list[bytes | str | int]) -> None:
    try:
        expected: Reply = [
            word if isinstance(word, bytes) else str(word).encode() for word in words
        ]
    except UnicodeEncodeError:
        return  # a lone surrogate is no text
    assert Decoder().feed(encode(*words)) == [expected]


def test_request_on_the_wire() -> None:
    assert encode("SET", b"k\r\n", 42) == b"*3\r\n$3\r\nSET\r\n$3\r\nk\r\n\r\n$2\r\n42\r\n"


def test_long_bulk_string_byte_by_byte() -> None:
    value = bytes(range(256)) * 8
    decoder = Decoder()
    fed = [decoder.feed(bytes([byte])) for byte in wire(value)]
    assert [replies for replies in fed if replies] == [[value]]


@pytest.mark.parametrize(
    "garbage",
    [
        b"hello\r\n",
        b":12a\r\n",
        b":1_0\r\n",
        b": 1\r\n",
        b":\r\n",
        b"$-2\r\n",
        b"$3\r\nabcd\r\n",
        b"$%d\r\n" % (BULK_BYTES_MAX + 1),
        b"*%d\r\n" % (ARRAY_ITEMS_MAX + 1),
        b"*1\r\n" * (DEPTH_MAX + 1),
        b"+" + b"x" * (LINE_BYTES_MAX + 1),
    ],
    ids=lambda garbage: repr(garbage[:12]),
)
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(RespError):
        Decoder().feed(garbage)


@given(st.binary(max_size=100))
def test_any_bytes_give_replies_or_an_error(data: bytes) -> None:
    with contextlib.suppress(RespError):
        Decoder().feed(data)
