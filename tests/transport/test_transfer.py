"""Whole transfers over TLS on loopback: what arrives is what was there, whatever happens."""

from __future__ import annotations

import errno
import os
import ssl
import threading
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.identities import Fleet
from tests.transport.transfer_parts import (
    SOURCE_NAME,
    TARGET_NAME,
    CuttingProxy,
    Memory,
    RawClient,
    Recorder,
    Target,
    held_by,
    quiet,
    running,
    wait_until,
)
from transport import tls
from transport.core.bucket import BURST_S
from transport.core.connection import WINDOW_BYTES, WINDOW_FRAMES
from transport.core.frames import FRAME_RAW_BYTES_MAX, PAGE_BYTES
from transport.errors import (
    AbortedError,
    FrameError,
    PeerNotTrustedError,
    SourceFailedError,
    StreamBrokenError,
    StreamRefusedError,
    TargetFullError,
    TransportError,
)
from transport.fan import Outlet
from transport.identity import HostIdentity, peer_of
from transport.link_time import LinkTime
from transport.receiver import DataListener, listen
from transport.sender import PageSender
from transport.worker import BUFFERS_MAX

TASK = 42


def connect(port: int, context: ssl.SSLContext, _index: int) -> ssl.SSLSocket:
    return tls.connect("127.0.0.1", port, context, server_name=TARGET_NAME)


@pytest.fixture
def sender_for(source: ssl.SSLContext, target: Target) -> Callable[..., PageSender]:
    def make(memory: Memory, **options: Any) -> PageSender:
        port = options.pop("port", target.port)
        ticket = options.pop("ticket", target.ticket)
        options.setdefault("read", memory.read)
        return PageSender([Outlet(partial(connect, port, source), ticket)], **options)

    return make


def arrived(target: Target, memory: Memory, task: int = TASK) -> bool:
    return target.sink.memory(task, memory.base, memory.pages) == memory.content.tobytes()


def test_all_streams_together_keep_to_a_bandwidth(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    """At least as long as the bytes take at that rate, on a machine of whatever speed."""
    memory, bytes_s = Memory(2048), 32.0 * (1 << 20)
    with sender_for(memory, rate=lambda: bytes_s, streams=4) as sender:
        stats = sender.send_round(1, [(TASK, memory.runs)])
        assert arrived(target, memory)
    # What nobody waits for: a frame, and what an idle time is made up for by.
    least_s = (stats.bytes_sent - FRAME_RAW_BYTES_MAX) / bytes_s - BURST_S
    assert least_s > 0.1
    assert stats.duration_ms >= 1000 * least_s


def test_rounds_bring_the_target_to_the_same_memory(
    target: Target, sender_for: Callable[..., PageSender], log: Recorder
) -> None:
    memory = Memory(3000)
    memory.content[500:900] = 0
    memory.content[1000] = 0
    with sender_for(memory) as sender:
        first = sender.send_round(1, [(TASK, memory.runs)])
        assert arrived(target, memory)
        assert (first.pages, first.zero_pages, first.unchanged_pages) == (2599, 401, 0)
        assert first.bytes_raw == 2599 * PAGE_BYTES

        memory.rewrite(3, 700, 2999)
        memory.content[4] = 0
        second = sender.send_round(2, [(TASK, memory.runs)])
        assert arrived(target, memory)
        assert (second.pages, second.zero_pages, second.unchanged_pages) == (3, 1, 2996)
        assert second.bytes_sent < 10 * PAGE_BYTES

        memory.rewrite(*range(0, 3000, 2))
        third = sender.send_round(3, [(TASK, memory.runs_of(*range(0, 3000, 2)))])
        assert arrived(target, memory)
        assert (third.number, third.pages, third.unchanged_pages) == (3, 1500, 0)

        total = sender.progress
        assert total.pages == 2599 + 3 + 1500
        assert total.bytes_sent == first.bytes_sent + second.bytes_sent + third.bytes_sent
        assert total.reopened == 0
    assert len(target.asked) <= 4, "streams live across rounds"
    assert log.complaints == []


def test_content_that_goes_back_and_forth_arrives(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory = Memory(300)
    early, late = memory.content.copy(), memory.content[::-1].copy()
    with sender_for(memory) as sender:
        for number, content in enumerate((early, late, early, early)):
            memory.content[:] = content
            stats = sender.send_round(number, [(TASK, memory.runs)])
            assert arrived(target, memory)
        assert stats.unchanged_pages == 300


def test_compressible_memory_travels_compressed(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory = Memory(2000)
    memory.content[:] = np.arange(2000, dtype=np.uint64).astype(np.uint8)[:, None]
    memory.content[0] = 1  # all but none are zero pages
    with sender_for(memory, streams=1) as sender:
        stats = sender.send_round(1, [(TASK, memory.runs)])
    assert arrived(target, memory)
    assert stats.bytes_sent < stats.bytes_raw


def test_a_bandwidth_is_a_slow_link_whatever_the_link_itself_takes(
    target: Target, sender_for: Callable[..., PageSender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LinkTime, "took_s", lambda *_: 0.0)
    memory, bytes_s = Memory(4096), 16.0 * (1 << 20)
    memory.content[:] = np.arange(1, 4097, dtype=np.uint64).astype(np.uint8)[:, None]
    with sender_for(memory, rate=lambda: bytes_s, streams=2) as sender:
        stats = sender.send_round(1, [(TASK, memory.runs)])
    assert arrived(target, memory)
    assert stats.bytes_sent < stats.bytes_raw / 2


def test_a_connection_that_ends_behind_its_first_answer_is_opened_again(
    target: Target, sender_for: Callable[..., PageSender], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the peer's reset, as the kernel says when it is asked for the peer's address."""
    make, ended = LinkTime.__init__, [True]

    def once(self: LinkTime, connection: ssl.SSLSocket) -> None:
        if ended:
            ended.clear()
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        make(self, connection)

    monkeypatch.setattr(LinkTime, "__init__", once)
    memory = Memory(300)
    with sender_for(memory, streams=1) as sender:
        sender.send_round(1, [(TASK, memory.runs)])
        assert arrived(target, memory)


def test_several_tasks_and_an_empty_round(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory, other = Memory(100), Memory(700, base=0x55_0000_0000, seed=2)
    memories = {TASK: memory, 7: other}

    def read(task: int, runs: np.ndarray, out: memoryview) -> np.ndarray:
        return memories[task].read(task, runs, out)

    with sender_for(memory, read=read) as sender:
        stats = sender.send_round(1, [(task, each.runs) for task, each in memories.items()])
        assert stats.pages == 800
        empty = sender.send_round(2, [])
        assert (empty.pages, empty.bytes_sent) == (0, 0)
        nothing = sender.send_round(3, [(TASK, np.empty((0, 2), dtype=np.uint64))])
        assert nothing.bytes_sent == 0
    assert arrived(target, memory)
    assert arrived(target, other, task=7)


def test_pages_that_vanish_are_skipped_and_counted(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory = Memory(600)
    memory.vanished = {5, 6, *range(256, 512)}
    with sender_for(memory) as sender:
        stats = sender.send_round(1, [(TASK, memory.runs)])
        assert (stats.pages, stats.vanished_pages) == (600 - 258, 258)
        left = sender.never_delivered(TASK, memory.runs)
        assert int(left[:, 1].sum()) == 258
    present = [page for page in range(600) if page not in memory.vanished]
    received = np.frombuffer(target.sink.memory(TASK, memory.base, 600), dtype=np.uint8)
    assert (received.reshape(600, -1)[present] == memory.content[present]).all()
    assert not received.reshape(600, -1)[sorted(memory.vanished)].any()


def test_what_was_never_delivered_is_known(sender_for: Callable[..., PageSender]) -> None:
    memory = Memory(100)
    with sender_for(memory) as sender:
        assert sender.never_delivered(TASK, memory.runs).tolist() == memory.runs.tolist()
        sender.send_round(1, [(TASK, memory.runs_of(*range(50)))])
        left = sender.never_delivered(TASK, memory.runs)
        assert left.tolist() == [[memory.base + 50 * PAGE_BYTES, 50]]
        sender.forget(TASK)
        assert sender.never_delivered(TASK, memory.runs).tolist() == memory.runs.tolist()
        assert sender.send_round(2, [(TASK, memory.runs)]).pages == 100


def test_files_arrive_whole(
    target: Target, sender_for: Callable[..., PageSender], tmp_path: Path
) -> None:
    contents = {
        "empty.img": b"",
        "small.img": b"x" * 77,
        "exact.img": os.urandom(2 << 20),
        "pages-1.img": os.urandom((5 << 20) + 12345),
    }
    directory = tmp_path / "images"
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    with sender_for(Memory(1)) as sender:
        stats = sender.send_files([(name, directory / name) for name in contents])
    assert stats.bytes_raw == sum(map(len, contents.values()))
    assert {name: target.sink.file(name) for name in contents} == contents


def test_files_that_cannot_be_sent(sender_for: Callable[..., PageSender], tmp_path: Path) -> None:
    (tmp_path / "good").write_bytes(b"content")
    with sender_for(Memory(1)) as sender:
        with pytest.raises(SourceFailedError):
            sender.send_files([("a.img", tmp_path / "missing")])
        with pytest.raises(FrameError):
            sender.send_files([("../a.img", tmp_path / "good")])
        with pytest.raises(ValueError, match="twice"):
            sender.send_files([("a.img", tmp_path / "good")] * 2)
        sender.send_files([("a.img", tmp_path / "good")])  # nothing had been begun


def test_calls_that_make_no_sense(sender_for: Callable[..., PageSender]) -> None:
    memory = Memory(4)
    with sender_for(memory) as sender:
        sender.send_round(5, [(TASK, memory.runs)])
        with pytest.raises(ValueError, match="round 4 after round 5"):
            sender.send_round(4, [(TASK, memory.runs)])
        with pytest.raises(ValueError, match="twice"):
            sender.send_round(6, [(TASK, memory.runs), (TASK, memory.runs)])
        with pytest.raises(ValueError, match="order"):
            sender.send_round(6, [(TASK, memory.runs_of(2, 1))])
        sender.send_round(6, [(TASK, memory.runs)])
    with pytest.raises(ValueError, match="streams"):
        sender_for(memory, streams=0)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_link_that_keeps_breaking(
    target: Target, sender_for: Callable[..., PageSender], seed: int, tmp_path: Path
) -> None:
    """Connections are cut in the middle of frames, and of answers; nothing is lost or stale."""
    memory = Memory(6000, seed=seed)
    image = tmp_path / "image"
    image.write_bytes(os.urandom(3 << 20))
    print("seed", seed)
    with ExitStack() as stack:
        proxy = stack.enter_context(
            CuttingProxy(target.port, seed=seed, cuts=20, up=3 << 20, down=8 << 10)
        )
        sender = stack.enter_context(sender_for(memory, port=proxy.port, streams=3))
        for number in range(4):
            stats = sender.send_round(number, [(TASK, memory.runs)])
            assert arrived(target, memory), f"after round {number}"
            assert stats.pages + stats.unchanged_pages + stats.zero_pages == 6000
            memory.rewrite(*range(number, 6000, 3))
            memory.content[number * 100 : number * 100 + 50] = 0
        sender.send_files([("pages-1.img", image)])
        assert target.sink.file("pages-1.img") == image.read_bytes()
        assert sender.progress.reopened > 3
        assert proxy.connections > 6
        assert sender.never_delivered(TASK, memory.runs).shape == (0, 2)


def test_a_target_that_is_gone_fails_the_round(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory = Memory(300)
    with sender_for(memory, patience_s=1) as sender:
        sender.send_round(1, [(TASK, memory.runs)])
        target.listener.stop()
        memory.rewrite(1)
        with pytest.raises(StreamBrokenError, match="cannot be reopened"):
            sender.send_round(2, [(TASK, memory.runs)])
        with pytest.raises(StreamBrokenError):
            sender.send_round(3, [])


def test_connect_reopens_what_broke_while_it_was_idle(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory = Memory(10)
    with ExitStack() as stack:
        proxy = stack.enter_context(CuttingProxy(target.port, seed=1, cuts=0, up=1, down=1))
        sender = stack.enter_context(sender_for(memory, port=proxy.port, streams=2))
        sender.connect()
        assert proxy.connections == 2
        sender.connect()
        assert proxy.connections == 2
        proxy.cut_all()
        sender.connect()
        assert proxy.connections == 4
        sender.send_round(1, [(TASK, memory.runs)])
        assert proxy.connections == 4
    assert arrived(target, memory)


def test_a_connection_is_renewed_before_its_keys_are_worn_out(
    target: Target, sender_for: Callable[..., PageSender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transport.stream.CONNECTION_BYTES_MAX", 300 * PAGE_BYTES)
    memory = Memory(250)
    with sender_for(memory, streams=1) as sender:
        for number, reopened in enumerate((0, 0, 1, 1, 2)):
            sender.send_round(number, [(TASK, memory.runs)])
            assert arrived(target, memory)
            assert sender.progress.reopened == reopened
            memory.rewrite(*range(250))


def test_a_second_sender_continues_a_session(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory = Memory(600)
    with sender_for(memory) as sender:
        sender.send_round(1, [(TASK, memory.runs)])
    memory.rewrite(*range(300))
    with sender_for(memory) as sender:
        assert sender.send_round(2, [(TASK, memory.runs)]).pages == 600
    assert arrived(target, memory)


def test_a_slow_target_holds_the_source_back(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    """While the sink stands still the source reads no more than its windows hold."""
    memory = Memory(256 * 60)
    gate = threading.Event()
    target.sink.before_write = partial(held_by, gate)
    outstanding_max = 0
    lock = threading.Lock()

    def read(task: int, runs: np.ndarray, out: memoryview) -> np.ndarray:
        nonlocal outstanding_max
        with lock:
            mask = memory.read(task, runs, out)
            outstanding_max = max(outstanding_max, memory.reads - target.sink.writes)
        return mask

    with sender_for(memory, read=read, streams=2) as sender:
        with running(lambda: sender.send_round(1, [(TASK, memory.runs)])) as raised:
            wait_until(quiet(lambda: memory.reads), "the source waits")
            assert 2 <= memory.reads <= 2 * BUFFERS_MAX
            assert sender.progress.bytes_sent <= 2 * WINDOW_BYTES
            gate.set()
        assert not raised
    assert outstanding_max <= 2 * BUFFERS_MAX
    assert arrived(target, memory)


def test_a_slow_target_holds_back_marks_of_zero_pages_too(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    """They need no buffer and hardly a byte; it is their number that has a limit."""
    memory = Memory(256 * 3 * WINDOW_FRAMES)
    memory.content[:] = 0
    gate = threading.Event()
    target.sink.before_write = partial(held_by, gate)
    with sender_for(memory, streams=1) as sender:
        with running(lambda: sender.send_round(1, [(TASK, memory.runs)])) as raised:
            wait_until(lambda: memory.reads >= WINDOW_FRAMES, "the window is full")
            wait_until(quiet(lambda: memory.reads), "the source waits")
            assert memory.reads <= WINDOW_FRAMES + 1
            gate.set()
        assert not raised
        assert sender.progress.zero_pages == memory.pages


def test_abort_ends_a_round_that_stands_still(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory = Memory(256 * 40)
    gate = threading.Event()
    target.sink.before_write = partial(held_by, gate)
    sender = sender_for(memory, streams=2)
    with running(lambda: sender.send_round(1, [(TASK, memory.runs)])) as raised:
        wait_until(quiet(lambda: memory.reads), "the source waits")
        sender.abort()
    assert isinstance(raised[0], AbortedError)
    assert sender.never_delivered(TASK, memory.runs).tolist() == memory.runs.tolist()
    gate.set()
    sender.close()
    with pytest.raises(AbortedError):
        sender.send_round(2, [])


def test_abort_ends_attempts_to_reopen(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    attempts = []

    def open_stream(index: int) -> ssl.SSLSocket:
        attempts.append(index)
        raise ConnectionRefusedError("nobody there")

    with PageSender([Outlet(open_stream, target.ticket)], read=Memory(1).read, streams=1) as sender:
        with running(sender.connect) as raised:
            wait_until(lambda: len(attempts) >= 2, "an attempt was repeated")
            sender.abort()
        assert isinstance(raised[0], AbortedError)


def test_memory_that_cannot_be_read_fails_the_round(
    sender_for: Callable[..., PageSender],
) -> None:
    def read(task: int, runs: np.ndarray, out: memoryview) -> np.ndarray:
        raise ProcessLookupError("gone")

    memory = Memory(10)
    with sender_for(memory, read=read) as sender, pytest.raises(SourceFailedError, match="gone"):
        sender.send_round(1, [(TASK, memory.runs)])


def test_a_sink_that_fails_ends_the_session(
    target: Target, sender_for: Callable[..., PageSender], log: Recorder
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    memory = Memory(600)
    target.sink.before_write = full
    with sender_for(memory, streams=1) as sender, pytest.raises(TargetFullError, match="no room"):
        sender.send_round(1, [(TASK, memory.runs)])
    target.sink.before_write = lambda: None
    with sender_for(memory, streams=1) as again, pytest.raises(TargetFullError):
        again.connect()
    wait_until(lambda: len(log.complaints) == 2, "both are logged")
    assert "No space left" in log.complaints[0][1]["reason"]


def test_a_wrong_ticket_is_refused_at_once(
    sender_for: Callable[..., PageSender], log: Recorder
) -> None:
    ticket = os.urandom(32)
    sender = sender_for(Memory(1), ticket=ticket, streams=1)
    with sender, pytest.raises(StreamRefusedError):
        sender.connect()
    wait_until(lambda: len(log.complaints) == 1, "it is logged")
    assert ticket.hex() not in repr(log.lines)
    assert repr(ticket) not in repr(log.lines)


def test_another_host_with_the_right_ticket_is_refused(
    target: Target, fleet: Fleet, log: Recorder
) -> None:
    context = HostIdentity.load(fleet.host("thief.test")).client_context()
    opening = partial(connect, target.port, context)
    sender = PageSender([Outlet(opening, target.ticket)], read=Memory(1).read, streams=1)
    with sender, pytest.raises(StreamRefusedError):
        sender.connect()
    wait_until(lambda: len(log.complaints) == 1, "it is logged")
    assert log.complaints[0][1]["peer"] == "thief.test"


def test_a_source_whose_identity_is_taken_back_between_rounds_hears_why(
    tmp_path: Path, log: Recorder
) -> None:
    """At once, and not after all the patience that is kept for a broken link."""
    fleet, memory = Fleet(tmp_path / "fleet"), Memory(600)
    here, there = (HostIdentity.load(fleet.host(name)) for name in (SOURCE_NAME, TARGET_NAME))
    with Target(there.server_context(), tmp_path, log) as target:
        opening = partial(connect, target.port, here.client_context())
        with PageSender([Outlet(opening, target.ticket)], read=memory.read, streams=2) as sender:
            sender.send_round(1, [(TASK, memory.runs)])
            there.take_revocations(fleet.revoke(here.paths))
            memory.rewrite(*range(600))
            with pytest.raises(PeerNotTrustedError, match="does not accept this host's"):
                sender.send_round(2, [(TASK, memory.runs)])
    assert any("revoked" in complaint[1]["reason"] for complaint in log.complaints)


def test_revoking_ends_a_session_and_no_other(
    target: Target, sender_for: Callable[..., PageSender], source: ssl.SSLContext
) -> None:
    memory = Memory(600)
    with sender_for(memory) as sender, RawClient(target.port, source) as client:
        client.hello(os.urandom(32))
        assert client.answer().status.name == "REFUSED"
        sender.send_round(1, [(TASK, memory.runs)])
        target.listener.revoke(os.urandom(32))
        sender.send_round(2, [(TASK, memory.runs)])
        target.open = False
        target.listener.revoke(target.ticket)
        writes = target.sink.writes
        memory.rewrite(*range(600))
        with pytest.raises(StreamRefusedError):
            sender.send_round(3, [(TASK, memory.runs)])
        assert target.sink.writes == writes


def test_stopping_twice_and_streams_end(
    target: Target, sender_for: Callable[..., PageSender]
) -> None:
    memory = Memory(10)
    before = threading.active_count()
    with sender_for(memory) as sender:
        sender.connect()
        target.listener.stop()
        target.listener.stop()
        assert not [each for each in threading.enumerate() if each.name == "page-listener"]
    wait_until(lambda: threading.active_count() < before, "all threads ended")


def test_a_listener_on_ipv6(accepting: ssl.SSLContext, source: ssl.SSLContext) -> None:
    with (
        DataListener(listen("::1", 0), accepting, lambda *_: None) as listener,
        tls.connect("::1", listener.port, source, server_name=TARGET_NAME) as stream,
    ):
        assert peer_of(stream).name == TARGET_NAME


def test_a_port_that_is_taken(target: Target) -> None:
    with pytest.raises(TransportError, match="cannot listen"):
        listen("127.0.0.1", target.port)
