"""How fast pages travel, against what TLS itself can do on the same machine in the same run.

Both measurements have their receiver in a process of its own and go over loopback::

    plain      sendall of 1 MiB in a loop    --one TLS stream-->  recv_into in a loop, thrown away
    transport  PageSender: read, hash, frame --N TLS streams-->   DataListener: check, pwrite, tmpfs

`first_round` writes into an empty sparse file, as a migration's first round does: the kernel has to
find and clear every page of it. `later_round` sends new content of the same pages. The data are
random bytes, the worst case: nothing can be left out, nothing compresses. Repetitions of all three
alternate, so that what else runs on the machine hits them alike; `ratio` is the median over the
repetitions of each one's rate to the plain stream's.

Usage: python -m bench.transport_throughput [--mib 256] [--repetitions 7] [--streams N]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import multiprocessing
import os
import platform
import socket
import ssl
import statistics
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from operator import truediv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import structlog

from transport import enrolment, tls
from transport.authority import Authority
from transport.core.frames import PAGE_BYTES
from transport.fan import Outlet
from transport.identity import IdentityPaths, Role, TlsIdentity
from transport.receiver import DataListener, listen
from transport.sender import PageSender, default_streams

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    import numpy.typing as npt

MIB = 1 << 20
TMPFS = Path("/dev/shm")  # noqa: S108  tmpfs is what is to be measured
TASK = 1
PERCENTILE = 95
END_DEADLINE_S = 30.0

_FALLOC_FL_KEEP_SIZE = 1  # include/uapi/linux/falloc.h
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.process_vm_readv.argtypes = (
    ctypes.c_int,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class FileSink:
    """One sparse file: a page's offset is its address."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, task: int, address: int, data: memoryview) -> None:
        del task
        while data:  # pwrite(2) may write less than it was given
            written = os.pwrite(self._descriptor, data, address)
            address, data = address + written, data[written:]

    def zero(self, task: int, address: int, pages: int) -> None:
        del task
        mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(self._descriptor, mode, address, pages * PAGE_BYTES) != 0:
            raise OSError(ctypes.get_errno(), "fallocate")

    def write_file(self, name: str, offset: int, data: memoryview) -> None:
        raise NotImplementedError(f"{name}: this measurement sends pages only")


def receive_pages(paths: IdentityPaths, path: Path, control: Connection) -> None:
    """A process: the transport's target."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    sink = FileSink(descriptor)
    with DataListener(
        listen("127.0.0.1", 0), TlsIdentity(paths).server_context(), lambda _hello, _peer: sink
    ) as listener:
        control.send(listener.port)
        control.recv()


def receive_plainly(paths: IdentityPaths, control: Connection) -> None:
    """A process: accepts one stream after another, reads to its end, and answers with one byte."""
    context = TlsIdentity(paths).server_context()
    buffer = memoryview(bytearray(MIB))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        control.send(listening.getsockname()[1])
        while control.recv():
            with context.wrap_socket(listening.accept()[0], server_side=True) as stream:
                remaining = control.recv()
                while remaining:
                    remaining -= stream.recv_into(buffer)
                stream.sendall(b".")


def plain_s(context: ssl.SSLContext, port: int, control: Connection, size_bytes: int) -> float:
    """Seconds for `size_bytes` over one plain TLS stream, its handshake not counted."""
    control.send(True)
    with tls.connect("127.0.0.1", port, context, server_name="localhost") as stream:
        stream.settimeout(None)
        control.send(size_bytes)
        data = os.urandom(MIB)
        before_s = time.perf_counter()
        for _ in range(size_bytes // MIB):
            stream.sendall(data)
        stream.recv(1)
        return time.perf_counter() - before_s


class NumpyMemory:
    """A source whose pages are copied within this process."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._memory = memory

    def read(
        self, task: int, runs: npt.NDArray[np.uint64], out: memoryview
    ) -> npt.NDArray[np.bool_]:
        del task
        target = np.frombuffer(out, dtype=np.uint8)
        filled = 0
        for address, pages in runs.tolist():
            size = pages * PAGE_BYTES
            np.copyto(target[filled : filled + size], self._memory[address : address + size])
            filled += size
        return np.ones(filled // PAGE_BYTES, dtype=np.bool_)


class ProcessMemory:
    """The same source, read by process_vm_readv(2) as if it were another process's memory."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._base = memory.ctypes.data
        self._pid = os.getpid()

    def read(
        self, task: int, runs: npt.NDArray[np.uint64], out: memoryview
    ) -> npt.NDArray[np.bool_]:
        del task
        remote = runs.copy()
        remote[:, 0] += np.uint64(self._base)
        remote[:, 1] *= np.uint64(PAGE_BYTES)
        local = np.array(
            [[np.frombuffer(out, dtype=np.uint8).ctypes.data, len(out)]], dtype=np.uint64
        )
        count = _libc.process_vm_readv(
            self._pid, local.ctypes.data, 1, remote.ctypes.data, len(remote), 0
        )
        if count != len(out):
            raise OSError(ctypes.get_errno(), f"process_vm_readv returned {count}")
        return np.ones(len(out) // PAGE_BYTES, dtype=np.bool_)


SOURCES: dict[str, Callable[[npt.NDArray[np.uint8]], NumpyMemory | ProcessMemory]] = {
    "copy": NumpyMemory,
    "process_vm_readv": ProcessMemory,
}


def measure(mib: int, repetitions: int, streams: int, source: str) -> dict[str, Any]:
    """MB/s of every repetition, by measurement."""
    size_bytes = mib * MIB
    rng = np.random.default_rng(1)
    memory = rng.integers(0, 256, size_bytes, dtype=np.uint8)
    read = SOURCES[source](memory).read
    runs = np.array([[0, size_bytes // PAGE_BYTES]], dtype=np.uint64)
    rates: dict[str, list[float]] = {"plain": [], "first_round": [], "later_round": []}
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=TMPFS)))
        paths = identity(directory)
        context = TlsIdentity(paths).client_context()
        pages_control, pages_end = spawn.Pipe()
        plain_control, plain_end = spawn.Pipe()
        store = directory / "pages"
        children = [
            spawn.Process(target=receive_pages, args=(paths, store, pages_end)),
            spawn.Process(target=receive_plainly, args=(paths, plain_end)),
        ]
        for child in children:
            child.start()
        port, plain_port = pages_control.recv(), plain_control.recv()
        open_stream = partial(connect_stream, port, context)
        for _ in range(repetitions):
            elapsed_s = plain_s(context, plain_port, plain_control, size_bytes)
            rates["plain"].append(size_bytes / elapsed_s / 1e6)
            os.truncate(store, 0)
            with PageSender(
                [Outlet(open_stream, os.urandom(32))], read=read, streams=streams
            ) as sender:
                sender.connect()
                for number, name in enumerate(("first_round", "later_round")):
                    memory.view(np.uint64)[:] += np.uint64(1)  # new content, every page
                    stats = sender.send_round(number, [(TASK, runs)])
                    rates[name].append(size_bytes / stats.duration_ms / 1e3)
        if store.read_bytes() != memory.tobytes():
            raise SystemExit("the target's pages differ from the source's")
        pages_control.send(None)
        plain_control.send(None)
        for child in children:
            child.join(END_DEADLINE_S)
    report: dict[str, Any] = {name: summary(values) for name, values in rates.items()}
    report["ratio"] = {
        name: round(statistics.median(map(truediv, rates[name], rates["plain"])), 3)
        for name in ("first_round", "later_round")
    }
    return report


def connect_stream(port: int, context: ssl.SSLContext, index: int) -> ssl.SSLSocket:
    del index
    return tls.connect("127.0.0.1", port, context, server_name="localhost")


def identity(directory: Path) -> IdentityPaths:
    """An identity of an authority made for this run, for both ends."""
    paths = IdentityPaths(directory / "tls")
    enrolment.enrol_here(paths, Authority.temporary(), "localhost", Role.HOST)
    return paths


def summary(rates: list[float]) -> dict[str, Any]:
    """Median, and the rate that 95 % of the repetitions reach."""
    slow = float(np.percentile(rates, 100 - PERCENTILE))
    return {
        "median_mb_s": round(statistics.median(rates), 1),
        "p95_mb_s": round(slow, 1),
        "all_mb_s": [round(rate, 1) for rate in rates],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=256, help="size of the memory in MiB")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--streams", type=int, default=default_streams())
    parser.add_argument(
        "--source", choices=sorted(SOURCES), default="copy", help="how pages are read"
    )
    arguments = parser.parse_args()
    measured = measure(arguments.mib, arguments.repetitions, arguments.streams, arguments.source)
    report = {
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "openssl": ssl.OPENSSL_VERSION,
        "n": arguments.repetitions,
        "mib": arguments.mib,
        "streams": arguments.streams,
        "source": arguments.source,
        **measured,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
