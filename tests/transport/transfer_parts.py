"""The parts of a transfer that the tests put together: memory, sinks, a target, a proxy that cuts.

All over real sockets and real TLS on loopback.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from transport import tls
from transport.core import frames, tables
from transport.core.frames import (
    ANSWER_BYTES,
    PAGE_BYTES,
    Answer,
    Codec,
    FrameHeader,
    FrameType,
    Hello,
    StreamKind,
)
from transport.errors import TransportError
from transport.identity import Peer
from transport.inbound import PageSink
from transport.receiver import DataListener, listen

DEADLINE_S = 30.0
QUIET_S = 0.3
TARGET_NAME = "target.test"
SOURCE_NAME = "source.test"


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll `condition`; it is the test's failure if it does not become true."""
    cutoff_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < cutoff_s, f"timed out: {what}"
        threading.Event().wait(0.005)


def held_by(gate: threading.Event) -> None:
    assert gate.wait(DEADLINE_S)


def quiet(count: Callable[[], int]) -> Callable[[], bool]:
    """Whether `count` is above 0 and has not changed for a while.

    Should it be true too early, then a test asserts less than it could, but nothing wrong.
    """
    last, since_s = 0, time.monotonic()

    def is_quiet() -> bool:
        nonlocal last, since_s
        if (now := count()) != last:
            last, since_s = now, time.monotonic()
        return last > 0 and time.monotonic() - since_s > QUIET_S

    return is_quiet


@contextmanager
def running(call: Callable[[], object]) -> Any:
    """`call` in a thread; gives what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except TransportError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield raised
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


class Recorder:
    """A logger that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def debug(self, event: str, **fields: Any) -> None:
        self.lines.append(("debug", event, fields))

    def warning(self, event: str, **fields: Any) -> None:
        self.lines.append(("warning", event, fields))

    def exception(self, event: str, **fields: Any) -> None:
        self.lines.append(("exception", event, fields))

    @property
    def complaints(self) -> list[tuple[str, dict[str, Any]]]:
        return [(event, fields) for level, event, fields in self.lines if level != "debug"]


class Memory:
    """The memory of one task at `base`, as a source reads it.

    The base lies where ext4 still has offsets: its files end at 16 TiB.
    """

    def __init__(self, pages: int, *, base: int = 0x7F_0000_0000, seed: int = 1) -> None:
        self.rng = np.random.default_rng(seed)
        self.base = base
        self.pages = pages
        self.content = self.rng.integers(0, 256, (pages, PAGE_BYTES), dtype=np.uint8)
        self.vanished: set[int] = set()
        self.reads = 0

    @property
    def runs(self) -> np.ndarray:
        return np.array([[self.base, self.pages]], dtype=np.uint64)

    def runs_of(self, *pages: int) -> np.ndarray:
        """Single-page runs."""
        return np.array([[self.base + page * PAGE_BYTES, 1] for page in pages], dtype=np.uint64)

    def rewrite(self, *pages: int) -> None:
        for page in pages:
            self.content[page] = self.rng.integers(0, 256, PAGE_BYTES, dtype=np.uint8)

    def read(self, task: int, runs: np.ndarray, out: memoryview) -> np.ndarray:
        del task
        self.reads += 1
        numbers = [
            (address - self.base) // PAGE_BYTES + at
            for address, pages in runs.tolist()
            for at in range(pages)
        ]
        assert len(out) == len(numbers) * PAGE_BYTES
        np.copyto(np.frombuffer(out, dtype=np.uint8).reshape(-1, PAGE_BYTES), self.content[numbers])
        return np.array([number not in self.vanished for number in numbers])


class FileSink(PageSink):
    """Each task's memory is one sparse file, offset = address; image files by name."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self.writes = 0
        self.before_write: Callable[[], None] = lambda: None

    def write(self, task: int, address: int, data: memoryview) -> None:
        self.before_write()
        assert os.pwrite(self._descriptor(f"task-{task}"), data, address) == len(data)
        with self._lock:
            self.writes += 1

    def zero(self, task: int, address: int, pages: int) -> None:
        self.before_write()
        assert os.pwrite(self._descriptor(f"task-{task}"), bytes(pages * PAGE_BYTES), address)

    def write_file(self, name: str, offset: int, data: memoryview) -> None:
        assert os.pwrite(self._descriptor(f"file-{name}"), data, offset) == len(data)

    def memory(self, task: int, base: int, pages: int) -> bytes:
        data = os.pread(self._descriptor(f"task-{task}"), pages * PAGE_BYTES, base)
        return data.ljust(pages * PAGE_BYTES, b"\0")

    def file(self, name: str) -> bytes:
        return (self._directory / f"file-{name}").read_bytes()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(
                    self._directory / name, os.O_RDWR | os.O_CREAT, 0o600
                )
            return self._descriptors[name]


class Target:
    """A listener with one session, for the peer `source.test` only."""

    def __init__(
        self, context: ssl.SSLContext, directory: Path, log: Recorder, **limits: Any
    ) -> None:
        self.ticket = os.urandom(frames.TICKET_BYTES)
        self.sink = FileSink(directory)
        self.open = True
        self.asked: list[tuple[int, str]] = []
        self.listener = DataListener(
            listen("127.0.0.1", 0), context, self._authorise, log=log, **limits
        )
        self.port = self.listener.port

    def __enter__(self) -> Target:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.stop()
        self.sink.close()

    def _authorise(self, hello: Hello, peer: Peer) -> PageSink | None:
        self.asked.append((hello.stream, peer.name))
        known = self.open and hello.ticket == self.ticket and peer.name == SOURCE_NAME
        return self.sink if known else None


class CuttingProxy:
    """Passes TCP on to `port`, and cuts connections after random numbers of bytes, `cuts` times.

    Cut as a dying host's kernel does it: closed with bytes unread, so that both sides get a reset.
    """

    def __init__(self, port: int, *, seed: int, cuts: int, up: int, down: int) -> None:
        self._target = port
        self._random = random.Random(seed)
        self._limits = (up, down)
        self._lock = threading.Lock()
        self._stopping = False
        self._pairs: list[_Pair] = []
        self._cuts_left = cuts
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listening.close()
        self.cut_all()
        for thread in self._threads[1:]:
            thread.join()

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def cut_all(self) -> None:
        for pair in list(self._pairs):
            pair.shut()

    def _accept(self) -> None:
        while not self._stopping:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            pair = _Pair(client, socket.create_connection(("127.0.0.1", self._target)))
            # The handshake must pass, or no connection ever carries anything.
            budgets = [4096 + self._random.randrange(limit) for limit in self._limits]
            for ends, budget in zip((pair.ends, pair.ends[::-1]), budgets, strict=True):
                thread = threading.Thread(target=self._pump, args=(pair, *ends, budget))
                self._threads.append(thread)
                thread.start()
            self._pairs.append(pair)

    def _pump(self, pair: _Pair, begin: socket.socket, end: socket.socket, budget: int) -> None:
        with suppress(OSError):
            while data := begin.recv(min(64 << 10, budget)):
                end.sendall(data)
                budget -= len(data)
                if budget <= 0:
                    if self._may_cut():
                        break
                    budget = 1 << 40
        pair.shut()
        pair.leave()

    def _may_cut(self) -> bool:
        with self._lock:
            self._cuts_left -= 1
            return self._cuts_left >= 0


class _Pair:
    """The two sockets of a connection through the proxy; its second pump to end closes them."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.ends = (client, server)
        self._lock = threading.Lock()
        self._pumps = 2

    def shut(self) -> None:
        for end in self.ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def leave(self) -> None:
        with self._lock:
            self._pumps -= 1
            if self._pumps == 0:
                for end in self.ends:
                    end.close()


class RawClient:
    """A client that speaks the protocol byte by byte, to say what a sender never would."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.stream = tls.connect("127.0.0.1", port, context, server_name=TARGET_NAME)
        self.stream.settimeout(DEADLINE_S)

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()

    def hello(self, ticket: bytes, index: int = 0) -> None:
        self.stream.sendall(frames.encode_hello(Hello(StreamKind.PAGES, index, ticket)))

    def greet(self, ticket: bytes, index: int = 0) -> Answer:
        self.hello(ticket, index)
        return self.answer()

    def answer(self) -> Answer:
        data = b""
        while len(data) < ANSWER_BYTES:
            received = self.stream.recv(ANSWER_BYTES - len(data))
            assert received, "the server closed the stream without an answer"
            data += received
        return frames.parse_answer(data)

    def closed(self) -> bool:
        """Whether the server ends the stream, waiting for it to."""
        try:
            return self.stream.recv(1) == b""
        except ConnectionError:
            return True

    def page(self, sequence: int, number: int, content: bytes, address: int = 0) -> None:
        self.stream.sendall(page_frame(sequence, number, content, address))


def page_frame(sequence: int, number: int, content: bytes, address: int = 0) -> bytes:
    """One page of task 1."""
    table = tables.encode_runs(
        np.array([address], dtype=np.uint64), np.array([tables.RunKind.DATA], dtype=np.uint8)
    )
    header = FrameHeader(FrameType.PAGES, Codec.RAW, number, sequence, 1, 0, len(content), 0)
    return frames.encode_prefix(header, table, content) + content
