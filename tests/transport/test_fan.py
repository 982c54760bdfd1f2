"""One transfer to several targets: all get the same, and one that can't go on is left out."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.transport.transfer_parts import (
    TARGET_NAME,
    CuttingProxy,
    Memory,
    Recorder,
    Target,
    held_by,
    quiet,
    running,
    wait_until,
)
from transport import tls
from transport.core.connection import WINDOW_BYTES
from transport.errors import StreamRefusedError, TargetFullError, TransportError
from transport.fan import Outlet
from transport.sender import PageSender
from transport.worker import BUFFERS_MAX

TASK = 42


@pytest.fixture
def targets(accepting: ssl.SSLContext, log: Recorder, tmp_path: Path) -> Iterator[list[Target]]:
    with ExitStack() as stack:
        made = []
        for number in range(3):
            (tmp_path / str(number)).mkdir()
            made.append(stack.enter_context(Target(accepting, tmp_path / str(number), log)))
        yield made


@pytest.fixture
def outlet(source: ssl.SSLContext) -> Callable[..., Outlet]:
    def make(target: Target, lost: list[TransportError], port: int = 0) -> Outlet:
        def opened(_index: int) -> ssl.SSLSocket:
            return tls.connect("127.0.0.1", port or target.port, source, server_name=TARGET_NAME)

        return Outlet(opened, target.ticket, lost.append)

    return make


def has_all(target: Target, memory: Memory) -> bool:
    return target.sink.memory(TASK, memory.base, memory.pages) == memory.content.tobytes()


def test_all_get_the_same_and_it_is_read_once(
    targets: list[Target], outlet: Callable[..., Outlet], tmp_path: Path
) -> None:
    """Also when one's link breaks again and again."""
    lost: list[TransportError] = []
    memory = Memory(4000)
    memory.content[:1000] = 7
    memory.content[3000:3100] = 0
    image = tmp_path / "core-1.img"
    image.write_bytes(b"x" * 77)
    with ExitStack() as stack:
        proxy = stack.enter_context(
            CuttingProxy(targets[1].port, seed=7, cuts=10, up=1 << 20, down=200)
        )
        to = [outlet(targets[0], lost), outlet(targets[1], lost, proxy.port)]
        sender = stack.enter_context(PageSender(to, read=memory.read, streams=2))
        first = sender.send_round(1, [(TASK, memory.runs)])
        reads = memory.reads
        memory.rewrite(5, 500)
        second = sender.send_round(2, [(TASK, memory.runs)])
        sender.send_files([(image.name, image)])
        assert memory.reads == 2 * reads
        assert (first.pages, second.pages) == (3900, 2)
        assert sender.progress.reopened >= 1
        carried = sender.carried()
    assert lost == []
    assert all(has_all(one, memory) for one in targets[:2])
    assert sum(stream.frames for stream in carried.streams) > 16


def test_one_that_fails_is_left_out_and_the_last_one_is_not(
    targets: list[Target], outlet: Callable[..., Outlet]
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    memory = Memory(3000)
    lost: list[list[TransportError]] = [[], [], []]
    to = [outlet(one, told) for one, told in zip(targets, lost, strict=True)]
    with PageSender(to, read=memory.read, streams=3) as sender:
        sender.send_round(1, [(TASK, memory.runs)])
        memory.rewrite(*range(3000))
        targets[0].sink.before_write = full
        sender.send_round(2, [(TASK, memory.runs)])
        assert [len(told) for told in lost] == [1, 0, 0]
        assert isinstance(lost[0][0], TargetFullError)
        assert has_all(targets[1], memory)
        assert has_all(targets[2], memory)
        assert not has_all(targets[0], memory)
        assert sender.never_delivered(TASK, memory.runs).size == 0
        targets[1].sink.before_write = targets[2].sink.before_write = full
        memory.rewrite(*range(3000))
        with pytest.raises(TargetFullError):
            sender.send_round(3, [(TASK, memory.runs)])
        assert sum(len(told) for told in lost) == 2


def test_one_that_is_silent_holds_back_windows_until_it_is_left_out(
    targets: list[Target], outlet: Callable[..., Outlet]
) -> None:
    memory = Memory(256 * 60)
    gate = threading.Event()
    targets[0].sink.before_write = partial(held_by, gate)
    lost: list[TransportError] = []
    to = [outlet(one, lost) for one in targets[:2]]
    with PageSender(to, read=memory.read, streams=2) as sender:
        with running(lambda: sender.send_round(1, [(TASK, memory.runs)])) as raised:
            wait_until(quiet(lambda: memory.reads), "the source waits")
            assert memory.reads <= 2 * BUFFERS_MAX
            assert sender.progress.bytes_sent <= len(to) * 2 * WINDOW_BYTES
            sender.leave_out(0)
        assert not raised
        assert has_all(targets[1], memory)
    gate.set()


def test_one_that_refuses_is_left_out_before_anything_is_sent(
    targets: list[Target], outlet: Callable[..., Outlet]
) -> None:
    memory = Memory(600)
    lost: list[TransportError] = []
    targets[0].open = False
    with PageSender(
        [outlet(targets[0], lost), outlet(targets[1], lost)], read=memory.read, streams=2
    ) as sender:
        sender.connect()
        assert [type(error) for error in lost] == [StreamRefusedError]
        sender.send_round(1, [(TASK, memory.runs)])
    assert has_all(targets[1], memory)


def test_a_transfer_that_is_ended_waits_for_no_target(
    targets: list[Target], outlet: Callable[..., Outlet]
) -> None:
    lost: list[TransportError] = []
    sender = PageSender([outlet(one, lost) for one in targets[:2]], read=Memory(1).read, streams=2)
    sender.connect()
    sender.close()
    with pytest.raises(TransportError, match="aborted"):
        sender.send_round(1, [])
    assert lost == []
