"""What trust costs: the product's way against plain TCP, in the same run on the same machine.

    bare      memory --N TCP sockets--> pwrite into tmpfs              a sender of this file's own
    trusted   PageSender --N TLS 1.3 streams--> DataListener: checked, hashed, pwrite into tmpfs;
              the manifest is signed, and checked against what arrived

`bulk` is a first round of memory that is random bytes: nothing compresses, nothing is left out.
`last` is what a container waits for when it stands still: a final delta, the images, and, of the
trusted way, the manifest's signature and its check; CRIU is left out. Both ways are measured in
turn, so that whatever else runs on the machine hits them alike.

Usage: python -m bench.trust_cost [--mib 256] [--last-mib 8] [--images 100] [--repetitions 15]
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import socket
import ssl
import statistics
import struct
import tempfile
import threading
import time
from contextlib import ExitStack
from functools import partial
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import structlog

from bench.transport_throughput import (
    MIB,
    PERCENTILE,
    TASK,
    TMPFS,
    FileSink,
    NumpyMemory,
    connect_stream,
    identity,
)
from migrate import signing
from migrate.core import manifest as manifests
from migrate.core.manifest import Binding
from migrate.core.messages import Versions
from transport.core.frames import PAGE_BYTES
from transport.fan import Outlet
from transport.identity import HostIdentity, IdentityPaths, TlsIdentity
from transport.receiver import DataListener, listen
from transport.sender import PageSender, default_streams

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

NAME: Final = "localhost"
IMAGE_BYTES: Final = 16 << 10
END_DEADLINE_S: Final = 30.0
_BLOCK: Final = struct.Struct("<QQ")  # offset, bytes; of no bytes: the end, to be answered
_BINDING: Final = Binding("m", "c", 1, NAME, NAME, Versions("6", "4", "runc", "x86_64"), 1)


class Sink(FileSink):
    """The memory in one sparse file, images in files beside it."""

    def __init__(self, directory: Path) -> None:
        self.images = directory / "img"
        self.images.mkdir()
        super().__init__(os.open(directory / "pages", os.O_RDWR | os.O_CREAT))

    def write_file(self, name: str, offset: int, data: memoryview) -> None:
        descriptor = os.open(self.images / name, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(descriptor, data, offset)
        finally:
            os.close(descriptor)


def target(paths: IdentityPaths, directory: Path, control: Connection) -> None:
    """A process: both kinds of receiver. Told a ticket and a manifest, it checks what arrived."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    sink = Sink(directory)
    bare = listen("127.0.0.1", 0)
    threading.Thread(target=accept_bare, args=(bare, directory), daemon=True).start()
    with DataListener(
        listen("127.0.0.1", 0), TlsIdentity(paths).server_context(), lambda _hello, _peer: sink
    ) as listener:
        control.send((bare.getsockname()[1], listener.port))
        while (told := control.recv()) is not None:
            ticket, signed = told
            carried = listener.revoke(ticket)
            signing.check_arrived(
                manifests.decode_signed(signed),
                _BINDING,
                carried,
                sink.images,
                beside=(),
                trust=paths,
                now_s=time.time(),
            )
            control.send("checked")


def accept_bare(listening: socket.socket, directory: Path) -> None:
    """A thread: gives each connection a thread of its own."""
    while True:
        plain, _ = listening.accept()
        threading.Thread(target=receive_bare, args=(plain, directory), daemon=True).start()


def receive_bare(plain: socket.socket, directory: Path) -> None:
    """Blocks into the file of pages, until the connection ends."""
    buffer = memoryview(bytearray(MIB))
    head = memoryview(bytearray(_BLOCK.size))
    with plain, (directory / "pages").open("r+b", buffering=0) as file:
        while filled(plain, head):
            offset, size = _BLOCK.unpack(head)
            if not size:
                plain.sendall(b".")
                continue
            filled(plain, buffer[:size])
            os.pwrite(file.fileno(), buffer[:size], offset)


def filled(plain: socket.socket, view: memoryview) -> bool:
    """Whether so many bytes came; False at the end of the connection."""
    while view:
        count = plain.recv_into(view)
        if not count:
            return False
        view = view[count:]
    return True


class BareSender:
    """The same blocks of the same memory over plain TCP, a thread for each connection."""

    def __init__(self, port: int, memory: NumpyMemory, streams: int) -> None:
        self._memory = memory
        self._connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(streams)]

    def send(self, size_bytes: int) -> None:
        """The first `size_bytes`, a multiple of a page; returns when all of it is in the file."""
        blocks = [(at, min(MIB, size_bytes - at)) for at in range(0, size_bytes, MIB)]
        parts = [blocks[index :: len(self._connections)] for index in range(len(self._connections))]
        threads = [
            threading.Thread(target=self._send, args=each)
            for each in zip(self._connections, parts, strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _send(self, connection: socket.socket, blocks: list[tuple[int, int]]) -> None:
        buffer = memoryview(bytearray(MIB))
        for offset, size in blocks:
            runs = np.array([[offset, size // PAGE_BYTES]], dtype=np.uint64)
            self._memory.read(TASK, runs, buffer[:size])
            connection.sendall(_BLOCK.pack(offset, size))
            connection.sendall(buffer[:size])
        connection.sendall(_BLOCK.pack(0, 0))
        connection.recv(1)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


class Measurement:
    """Both ways over one target. Times are in seconds."""

    def __init__(self, directory: Path, mib: int, last_mib: int, images: int, streams: int) -> None:
        self._bulk_bytes, self._last_bytes = mib * MIB, last_mib * MIB
        self._streams = streams
        self._content = np.random.default_rng(1).integers(0, 256, mib * MIB, dtype=np.uint8)
        self._memory = NumpyMemory(self._content)
        self._paths = identity(directory)
        self._store = directory / "pages"
        self._images = directory / "source"
        self._images.mkdir()
        for number in range(images):
            (self._images / f"core-{number + 1}.img").write_bytes(os.urandom(IMAGE_BYTES))
        spawn = multiprocessing.get_context("spawn")
        self._control, end = spawn.Pipe()
        self._child = spawn.Process(target=target, args=(self._paths, directory, end))
        self._child.start()
        self._bare_port, self._port = self._control.recv()

    def bare(self) -> tuple[float, float]:
        """Bulk and last. The images' bytes go the way of the pages."""
        os.truncate(self._store, 0)
        sender = BareSender(self._bare_port, self._memory, self._streams)
        bulk_s = seconds(lambda: sender.send(self._bulk_bytes))
        self._change()
        image_bytes = sum(path.stat().st_size for path in self._images.iterdir())
        last_s = seconds(lambda: sender.send(self._last_bytes + image_bytes))
        sender.close()
        return bulk_s, last_s

    def trusted(self) -> tuple[float, float]:
        """Bulk and last, the manifest's way included."""
        os.truncate(self._store, 0)
        host = HostIdentity.load(self._paths)
        ticket = os.urandom(32)
        with PageSender(
            [Outlet(partial(connect_stream, self._port, host.client_context()), ticket)],
            read=self._memory.read,
            streams=self._streams,
        ) as sender:
            sender.connect()
            bulk_s = seconds(lambda: sender.send_round(1, [(TASK, runs_of(self._bulk_bytes))]))
            self._change()
            last_s = seconds(lambda: self._finish(sender, host, ticket))
        if self._store.read_bytes() != self._content.tobytes():
            raise SystemExit("the target's pages differ from the source's")
        return bulk_s, last_s

    def end(self) -> None:
        self._control.send(None)
        self._child.join(END_DEADLINE_S)

    def _finish(self, sender: PageSender, host: HostIdentity, ticket: bytes) -> None:
        sender.send_round(2, [(TASK, runs_of(self._last_bytes))])
        sender.send_files([(path.name, path) for path in sorted(self._images.iterdir())])
        manifest = signing.manifest_of(_BINDING, sender.carried(), time.time())
        self._control.send((ticket, manifests.encode(signing.sealed(manifest, host))))
        if self._control.recv() != "checked":
            raise SystemExit("the target did not believe the manifest")

    def _change(self) -> None:
        self._content[: self._last_bytes].view(np.uint64)[:] += np.uint64(1)


def runs_of(size_bytes: int) -> Any:
    return np.array([[0, size_bytes // PAGE_BYTES]], dtype=np.uint64)


def seconds(act: Callable[[], object]) -> float:
    before_s = time.perf_counter()
    act()
    return time.perf_counter() - before_s


def row(title: str, ways: list[list[float]], unit: str, worst: float) -> str:
    """A line of the table; `worst`: the percentile that 95 % of the repetitions are better than."""
    cells = [
        f"{statistics.median(values):.0f} {unit}, {float(np.percentile(values, worst)):.0f} {unit}"
        for values in ways
    ]
    ratio = statistics.median(map(truediv, ways[1], ways[0]))
    return f"| {title} | {cells[0]} | {cells[1]} | {ratio:.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="memory of the bulk, in MiB")
    parser.add_argument("--last-mib", type=int, default=8, help="of the final delta")
    parser.add_argument("--images", type=int, default=100, help="files of 16 KiB")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--streams", type=int, default=default_streams())
    given = parser.parse_args()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=TMPFS)))
        runs = Measurement(directory, given.mib, given.last_mib, given.images, given.streams)
        stack.callback(runs.end)
        bare: list[tuple[float, float]] = []
        trusted: list[tuple[float, float]] = []
        for _ in range(given.repetitions):
            bare.append(runs.bare())
            trusted.append(runs.trusted())
    rates = [[given.mib * MIB / bulk / 1e6 for bulk, _ in each] for each in (bare, trusted)]
    last_ms = [[last * 1e3 for _, last in each] for each in (bare, trusted)]
    print(json.dumps({"bulk_mb_s": rates, "last_ms": last_ms}))
    print(
        f"\n{platform.node()}, {os.cpu_count()} CPUs, Linux {platform.release()}, Python"
        f" {platform.python_version()}, {ssl.OPENSSL_VERSION}, {given.streams} streams,"
        f" n = {given.repetitions}, load average {os.getloadavg()[0]:.1f}\n"
    )
    print("| | plain TCP: median, p95 | all of it: median, p95 | ratio |\n|---|---|---|---|")
    print(row(f"bulk, {given.mib} MiB", rates, "MB/s", 100 - PERCENTILE))
    size = f"{given.last_mib} MiB and {given.images} images of {IMAGE_BYTES >> 10} KiB"
    print(row(f"standing still, {size}", last_ms, "ms", PERCENTILE))


if __name__ == "__main__":
    main()
