"""What a listener does with peers that break the rules: one line in the log, and it serves on."""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import xxhash

from tests.identities import Fleet
from tests.transport.transfer_parts import (
    DEADLINE_S,
    TARGET_NAME,
    Memory,
    RawClient,
    Recorder,
    Target,
    page_frame,
    wait_until,
)
from transport import tls
from transport.core import frames
from transport.core.frames import HEADER_BYTES, PAGE_BYTES, Hello, Status, StreamKind
from transport.door import Door
from transport.fan import Outlet
from transport.identity import HostIdentity
from transport.sender import PageSender

OLD, NEW = b"\x01" * PAGE_BYTES, b"\x02" * PAGE_BYTES


@pytest.fixture
def others(target: Target, source: ssl.SSLContext) -> Callable[[], None]:
    """Checks that another stream of the listener works all the same."""
    memory = Memory(300)
    numbers = iter(range(100))

    def opened(_index: int) -> ssl.SSLSocket:
        return tls.connect("127.0.0.1", target.port, source, server_name=TARGET_NAME)

    def check() -> None:
        memory.rewrite(*range(300))
        with PageSender([Outlet(opened, target.ticket)], read=memory.read, streams=2) as sender:
            sender.send_round(next(numbers), [(42, memory.runs)])
        assert target.sink.memory(42, memory.base, 300) == memory.content.tobytes()

    return check


def resealed(frame: bytes) -> bytes:
    """`frame` with the checksum that its content has."""
    content = frame[: HEADER_BYTES - 8] + frame[HEADER_BYTES:]
    checksum = struct.pack("<Q", xxhash.xxh3_64_intdigest(content))
    return frame[: HEADER_BYTES - 8] + checksum + frame[HEADER_BYTES:]


def changed(frame: bytes, place: int, value: int) -> bytes:
    data = bytearray(frame)
    data[place] = value
    return bytes(data)


@pytest.mark.parametrize(
    "noise",
    [b"", b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"\x16\x03\x01\xff\xff" + bytes(100)],
    ids=["nothing", "http", "zeros", "half-a-handshake"],
)
def test_what_is_not_tls(
    target: Target, log: Recorder, others: Callable[[], None], noise: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", target.port)) as plain:
        plain.sendall(noise)
        plain.shutdown(socket.SHUT_WR)
        plain.settimeout(DEADLINE_S)
        try:
            while plain.recv(4096):
                pass
        except ConnectionError:
            pass
    wait_until(lambda: len(log.complaints) == 1, "it is logged")
    others()
    assert len(log.complaints) == 1
    assert log.complaints[0][1]["peer"] == "?"


@pytest.mark.parametrize(
    "greeting",
    [
        b"x" * frames.HELLO_BYTES,
        bytes(frames.HELLO_BYTES),
        frames.encode_hello(Hello(StreamKind.PAGES, 0, bytes(32)))[:-1] + b"!",
        frames.encode_hello(Hello(StreamKind.PAGES, 0, bytes(32)))[:20],
    ],
    ids=["noise", "zeros", "checksum", "cut"],
)
def test_greetings_that_are_none(
    target: Target,
    log: Recorder,
    others: Callable[[], None],
    source: ssl.SSLContext,
    greeting: bytes,
) -> None:
    with RawClient(target.port, source) as client:
        client.stream.sendall(greeting)
        tls.cut(client.stream) if len(greeting) < frames.HELLO_BYTES else client.closed()
    wait_until(lambda: len(log.complaints) == 1, "it is logged")
    assert target.asked == []
    others()
    assert len(log.complaints) == 1


GOOD = page_frame(1, 1, NEW)


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(os.urandom(HEADER_BYTES), id="noise"),
        pytest.param(bytes(HEADER_BYTES), id="zeros"),
        pytest.param(changed(GOOD, HEADER_BYTES - 1, GOOD[HEADER_BYTES - 1] ^ 1), id="checksum"),
        pytest.param(changed(GOOD, len(GOOD) - 1, 7), id="body"),
        pytest.param(resealed(changed(GOOD, HEADER_BYTES, 1)), id="address-not-aligned"),
        pytest.param(resealed(changed(GOOD, HEADER_BYTES + 7, 0xFF)), id="kernel-address"),
        pytest.param(resealed(changed(GOOD, HEADER_BYTES + 8, 2)), id="more-pages-than-body"),
        pytest.param(resealed(changed(GOOD, 1, frames.Codec.ZSTD)), id="not-compressed"),
        pytest.param(changed(GOOD, 31, 0xFF), id="4-GiB"),
        pytest.param(page_frame(2, 1, NEW), id="sequence-ahead"),
    ],
)
def test_frames_that_are_wrong(
    target: Target,
    log: Recorder,
    source: ssl.SSLContext,
    frame: bytes,
) -> None:
    """The sink hears of none of it, the sender is told, and the session does not go on."""
    with RawClient(target.port, source) as client:
        assert client.greet(target.ticket).status == Status.ACCEPTED
        client.stream.sendall(frame)
        assert client.answer().status == Status.BAD_FRAME
        assert client.closed()
    wait_until(lambda: len(log.complaints) == 1, "it is logged")
    event, fields = log.complaints[0]
    assert (event, fields["peer"], fields["stream"]) == ("stream ended early", "source.test", 0)
    assert target.sink.writes == 0
    with RawClient(target.port, source) as client:
        assert client.greet(target.ticket).status == Status.BAD_FRAME


def test_one_bad_session_does_not_disturb_another(
    accepting: ssl.SSLContext,
    source: ssl.SSLContext,
    log: Recorder,
    tmp_path: Path,
    target: Target,
    others: Callable[[], None],
) -> None:
    with Target(accepting, tmp_path, log) as second:
        target._authorise, first = second._authorise, target._authorise  # type: ignore[method-assign]
        del first
        with RawClient(second.port, source) as client:
            client.greet(second.ticket)
            client.stream.sendall(bytes(HEADER_BYTES))
            assert client.answer().status == Status.BAD_FRAME
        others()


def test_a_frame_of_an_older_round_is_never_applied(
    target: Target, log: Recorder, source: ssl.SSLContext
) -> None:
    """Streams share the session's rounds: what is over for one is over for all."""
    with RawClient(target.port, source) as first, RawClient(target.port, source) as second:
        first.greet(target.ticket, 0)
        second.greet(target.ticket, 1)
        first.page(1, 5, NEW)
        assert first.answer().status == Status.APPLIED
        second.page(1, 4, OLD)
        assert second.answer().status == Status.BAD_FRAME
    assert target.sink.memory(1, 0, 1) == NEW


def test_a_frame_is_applied_once(target: Target, source: ssl.SSLContext) -> None:
    with RawClient(target.port, source) as client:
        assert client.greet(target.ticket) == frames.Answer(Status.ACCEPTED, 0)
        client.page(1, 1, NEW)
        assert client.answer() == frames.Answer(Status.APPLIED, 1)
    with RawClient(target.port, source) as client:
        assert client.greet(target.ticket) == frames.Answer(Status.ACCEPTED, 1)
        client.page(1, 1, OLD)
        assert client.answer().status == Status.BAD_FRAME
    assert target.sink.memory(1, 0, 1) == NEW


def test_a_stream_is_not_resumed_before_its_former_connection_has_ended(
    target: Target, source: ssl.SSLContext
) -> None:
    """The former one is still storing a frame: were the new one let in, old could overwrite new."""
    entered, gate = threading.Event(), threading.Event()
    happened: list[str] = []

    def hold() -> None:
        entered.set()
        assert gate.wait(DEADLINE_S)
        happened.append("former frame stored")

    target.sink.before_write = hold
    with RawClient(target.port, source) as former, RawClient(target.port, source) as later:
        former.greet(target.ticket)
        former.page(1, 1, OLD)
        assert entered.wait(DEADLINE_S)
        later.hello(target.ticket)
        assert former.closed(), "the target gives up the former connection"
        assert select.select([later.stream], [], [], 0)[0] == []
        target.sink.before_write = lambda: None
        gate.set()
        # Stored, though its acknowledgement could not arrive: the answer says so.
        assert later.answer() == frames.Answer(Status.ACCEPTED, 1)
        happened.append("later connection accepted")
        later.page(2, 2, NEW)
        assert later.answer() == frames.Answer(Status.APPLIED, 2)
    assert happened == ["former frame stored", "later connection accepted"]
    assert target.sink.memory(1, 0, 1) == NEW


def test_a_stranger_cannot_take_over_a_stream(
    target: Target, source: ssl.SSLContext, fleet: Fleet
) -> None:
    thief = HostIdentity.load(fleet.host("thief.test")).client_context()
    with RawClient(target.port, source) as owner, RawClient(target.port, thief) as other:
        owner.greet(target.ticket)
        assert other.greet(target.ticket).status == Status.REFUSED
        owner.page(1, 1, NEW)
        assert owner.answer().status == Status.APPLIED


@pytest.fixture
def narrow(accepting: ssl.SSLContext, tmp_path: Path, log: Recorder) -> Callable[..., Target]:
    return partial(Target, accepting, tmp_path, log)


def test_no_more_streams_than_allowed(
    narrow: Callable[..., Target], source: ssl.SSLContext, log: Recorder
) -> None:
    with narrow(streams_max=1) as target:
        with RawClient(target.port, source) as first, RawClient(target.port, source) as second:
            assert first.greet(target.ticket, 0).status == Status.ACCEPTED
            assert second.greet(target.ticket, 1).status == Status.BUSY
        wait_until(lambda: "1 streams already" in str(log.complaints), "it is logged")

        def admitted() -> bool:
            with RawClient(target.port, source) as third:
                return third.greet(target.ticket, 2).status == Status.ACCEPTED

        wait_until(admitted, "room again")


def test_a_flood_of_silent_connections_pushes_out_itself(
    narrow: Callable[..., Target], source: ssl.SSLContext, log: Recorder
) -> None:
    """Those that have waited longest go; a stream that is served stays, and others still get in."""
    with narrow(door=Door(waiting_max=2)) as target, RawClient(target.port, source) as client:
        client.greet(target.ticket)
        flood = [socket.create_connection(("127.0.0.1", target.port)) for _ in range(5)]
        wait_until(lambda: len(log.complaints) == 3, "three too many")
        assert all("too many" in fields["reason"] for _, fields in log.complaints)
        for gone in flood[:3]:
            gone.settimeout(DEADLINE_S)
            assert gone.recv(1) == b""
        client.page(1, 1, NEW)
        assert client.answer().status == Status.APPLIED
        with RawClient(target.port, source) as other:
            assert other.greet(target.ticket, 1).status == Status.ACCEPTED
        for each in flood:
            each.close()


def test_who_does_not_speak_in_time_is_left(
    narrow: Callable[..., Target], source: ssl.SSLContext, log: Recorder
) -> None:
    limits = {"handshake_deadline_s": 0.2, "idle_deadline_s": 0.2, "frame_deadline_s": 0.2}
    with narrow(**limits) as target:
        with socket.create_connection(("127.0.0.1", target.port)) as silent:
            silent.settimeout(DEADLINE_S)
            assert silent.recv(1) == b"", "no handshake"
        with RawClient(target.port, source) as client:
            assert client.closed(), "no greeting"
        with RawClient(target.port, source) as client:
            client.greet(target.ticket)
            assert client.closed(), "no frame"
        with RawClient(target.port, source) as client:
            client.greet(target.ticket)
            client.stream.sendall(page_frame(1, 1, NEW)[:100])
            assert client.closed(), "half a frame"
        wait_until(lambda: len(log.complaints) == 4, "one line for each")
        assert target.sink.writes == 0
