"""Sender and receiver come to the same account of what was carried, or one of them lied."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.transport.transfer_parts import (
    TARGET_NAME,
    CuttingProxy,
    Memory,
    RawClient,
    Target,
    page_frame,
)
from transport import tls
from transport.core import frames, tables
from transport.core.frames import PAGE_BYTES, Codec, FrameHeader, FrameType, Status
from transport.core.transcript import PIECE_BYTES, Carried, file_digest, piece_digest
from transport.fan import Outlet
from transport.identity import Peer
from transport.inbound import PageSink
from transport.sender import PageSender

TASK = 42


@pytest.fixture
def sender_for(source: ssl.SSLContext, target: Target) -> Callable[..., PageSender]:
    def make(memory: Memory, port: int = target.port, **options: Any) -> PageSender:
        def opened(_index: int) -> ssl.SSLSocket:
            return tls.connect("127.0.0.1", port, source, server_name=TARGET_NAME)

        return PageSender([Outlet(opened, target.ticket)], read=memory.read, **options)

    return make


def file_frame(sequence: int, name: str, offset: int, content: bytes) -> bytes:
    header = FrameHeader(FrameType.FILE, Codec.RAW, 1, sequence, 0, 0, len(content), 0)
    return frames.encode_prefix(header, tables.encode_file(name, offset), content) + content


@pytest.mark.parametrize("cuts", [0, 20])
def test_both_ends_agree(
    target: Target, sender_for: Callable[..., PageSender], tmp_path: Path, cuts: int
) -> None:
    """Also when the link breaks in the midst of frames, which are sent again then."""
    memory = Memory(4000)
    memory.content[:2000] = 7  # these are compressed
    memory.content[100:200] = 0
    images = {"empty.img": b"", "core-1.img": b"x" * 77, "pages-1.img": os.urandom(2_500_000)}
    for name, content in images.items():
        (tmp_path / name).write_bytes(content)
    with ExitStack() as stack:
        proxy = stack.enter_context(
            CuttingProxy(target.port, seed=4, cuts=cuts, up=2 << 20, down=8 << 10)
        )
        sender = stack.enter_context(sender_for(memory, proxy.port, streams=3))
        for number in range(3):
            sender.send_round(number, [(TASK, memory.runs)])
            memory.rewrite(*range(number, 4000, 3))
        sender.send_files([(name, tmp_path / name) for name in images])
        assert sender.progress.reopened >= cuts / 4
        said = sender.carried()
        heard = target.listener.revoke(target.ticket)
    assert said == heard
    assert sum(stream.frames for stream in said.streams) >= 3 * 4000 / 256
    assert [one.name for one in said.files] == sorted(images)
    for one in said.files:
        content = images[one.name]
        pieces = [content[at : at + PIECE_BYTES] for at in range(0, len(content) or 1, PIECE_BYTES)]
        assert one.size_bytes == len(content)
        assert one.digest == file_digest(piece_digest(piece) for piece in pieces)


def test_a_stream_that_carried_nothing_is_not_named(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    with sender_for(Memory(1), streams=3) as sender:
        sender.connect()
        assert sender.carried() == target.listener.revoke(target.ticket) == Carried()


def test_a_session_that_is_not_known_has_carried_nothing(target: Target) -> None:
    assert target.listener.revoke(os.urandom(32)) == Carried()


def carried_by(target: Target, context: ssl.SSLContext, *pages: bytes) -> Carried:
    with RawClient(target.port, context) as client:
        client.greet(target.ticket)
        for number, page in enumerate(pages, start=1):
            client.page(number, 1, page, number * PAGE_BYTES)
            assert client.answer().status == Status.APPLIED
    return target.listener.revoke(target.ticket)


def test_a_bit_that_flips_behind_the_checksum_is_seen(
    target: Target, source: ssl.SSLContext
) -> None:
    """The frame is whole for TLS and for its checksum: a sender that lies made it."""
    page, other = bytes(PAGE_BYTES), b"\1" + bytes(PAGE_BYTES - 1)
    honest = carried_by(target, source, page, page)
    assert honest == carried_by(target, source, page, page)
    for lies in ([other, page], [page, other], [page], [page, page, page]):
        assert carried_by(target, source, *lies) != honest


@pytest.mark.parametrize("offset", [0, 5, PIECE_BYTES // 2])
def test_no_part_of_a_file_is_written_over(
    target: Target, source: ssl.SSLContext, offset: int
) -> None:
    with RawClient(target.port, source) as client:
        client.greet(target.ticket)
        client.stream.sendall(file_frame(1, "core-1.img", 0, b"content"))
        assert client.answer().status == Status.APPLIED
        client.stream.sendall(file_frame(2, "core-1.img", offset, b"another"))
        assert client.answer().status == Status.BAD_FRAME
    assert target.sink.file("core-1.img") == b"content"


def test_a_frame_is_in_the_account_once_however_often_it_is_sent(
    target: Target, source: ssl.SSLContext
) -> None:
    frame = page_frame(1, 1, bytes(PAGE_BYTES))
    greet = partial(RawClient.greet, ticket=target.ticket)
    with RawClient(target.port, source) as client:
        greet(client)
        client.stream.sendall(frame)
        assert client.answer().status == Status.APPLIED
    with RawClient(target.port, source) as client:
        assert greet(client).sequence == 1
        client.stream.sendall(frame)
        assert client.answer().status == Status.BAD_FRAME
    (stream,) = target.listener.revoke(target.ticket).streams
    assert stream.frames == 1


def test_each_connection_of_a_stream_shows_the_same_use(
    target: Target, sender_for: Callable[..., PageSender], tmp_path: Path
) -> None:
    """That is how a ticket that is used again is told from a stream that comes back."""
    uses: dict[int, set[bytes]] = {}
    connections = 0
    authorise = target._authorise

    def recorded(hello: frames.Hello, peer: Peer) -> PageSink | None:
        nonlocal connections
        connections += 1
        uses.setdefault(hello.stream, set()).add(hello.use)
        return authorise(hello, peer)

    target.listener._authorise = recorded
    memory = Memory(2000)
    with (
        CuttingProxy(target.port, seed=2, cuts=6, up=1 << 20, down=8 << 10) as proxy,
        sender_for(memory, proxy.port, streams=2) as sender,
    ):
        sender.send_round(1, [(TASK, memory.runs)])
        assert sender.progress.reopened
    assert connections > 2
    first = {stream: use for stream, (use,) in uses.items()}
    assert len(set(first.values())) == len(first) == 2
    with sender_for(memory, streams=2) as another:
        another.connect()
    assert all(len(shown) == 2 for shown in uses.values())
