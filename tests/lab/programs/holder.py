"""holder KIND...: holds what is named, then writes "ready" (or what went wrong) to /tmp/ready.

For tests of preflight: what a checkpoint refuses, and what it does not. Runs on the standard
library alone, inside a container.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import pathlib
import signal
import socket
import struct
import sys
import time
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)
kept: list[Any] = []


def system_call(number: int, *arguments: Any) -> int:
    result = libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def child(unshared: int = 0) -> int:
    pid = os.fork()
    if pid == 0:
        if unshared and libc.unshare(unshared) != 0:
            os._exit(1)
        # Of the child's own mount namespace, if it has one.
        kept.append(os.open("/etc/passwd", os.O_RDONLY))
        signal.pause()
    return pid


def connected() -> tuple[socket.socket, socket.socket, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    return listener, client, listener.accept()[0]


def secret() -> Any:
    fd = system_call(447, 0)
    os.ftruncate(fd, 4096)
    return mmap.mmap(fd, 4096)


def corked() -> Any:
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.connect(("127.0.0.1", 9))
    datagrams.setsockopt(socket.IPPROTO_UDP, 1, 1)
    datagrams.send(b"x")
    return datagrams


def external() -> Any:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect("/srv/external.sock")
    return connection


def deleted(size_bytes: int) -> Any:
    path = pathlib.Path("/tmp/deleted")
    path.write_bytes(b"x" * size_bytes)
    fd = os.open(path, os.O_RDWR)
    path.unlink()
    return fd


def deleted_link() -> Any:
    path = pathlib.Path("/tmp/first")
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.link(path, "/tmp/second")
    path.unlink()
    return fd


def odd_name() -> Any:
    return os.open("/tmp/not (deleted)", os.O_RDWR | os.O_CREAT)


def traced() -> Any:
    pid = child()
    # PTRACE_SEIZE
    system_call(101, 0x4206, pid, 0, 0)


def deadline() -> Any:
    attributes = struct.pack("=IIQiIQQQ", 48, 6, 0, 0, 0, 10**7, 2 * 10**7, 3 * 10**7)
    system_call(314, 0, attributes, 0)


def message_queue() -> Any:
    return system_call(240, b"jobs", os.O_CREAT | os.O_RDWR, 0o600, None)


def waiting() -> Any:
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, socket.create_connection(listener.getsockname())


def unix_waiting() -> Any:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("/tmp/listener")
    listener.listen()
    client = socket.socket(socket.AF_UNIX)
    client.connect("/tmp/listener")
    return listener, client


def half_closed() -> Any:
    pair = socket.socketpair()
    pair[0].close()
    return pair[1]


def link_events() -> Any:
    events = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    events.bind((0, 1))
    return events


def in_flight() -> Any:
    pair = socket.socketpair()
    socket.send_fds(pair[0], [b"x"], [0])
    return pair


def watch(path: bytes) -> int:
    fd = system_call(294, 0)
    system_call(254, fd, path, 2)
    return fd


def timer() -> int:
    fd = system_call(283, 1, 0)
    system_call(286, fd, 0, struct.pack("=QQQQ", 3600, 0, 3600, 0), 0)
    return fd


def zombie() -> Any:
    if os.fork() == 0:
        os._exit(0)


KINDS: dict[str, Any] = {
    "io_uring": lambda: system_call(425, 4, ctypes.create_string_buffer(120)),
    "secret": secret,
    "perf": lambda: system_call(298, struct.pack("=IIQ", 1, 128, 0) + bytes(112), 0, -1, -1, 0),
    "bpf": lambda: system_call(321, 0, struct.pack("=IIIII", 1, 4, 4, 4, 0) + bytes(100), 120),
    "userfaultfd": lambda: system_call(323, 1),
    "landlock": lambda: system_call(444, struct.pack("=Q", 1), 8, 0),
    "mqueue": message_queue,
    "vsock": lambda: socket.socket(40, socket.SOCK_STREAM),
    "mptcp": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262),
    "corked": corked,
    "external": external,
    "deleted_large": lambda: deleted(65 << 20),
    "deleted_link": deleted_link,
    "traced": traced,
    "deadline": deadline,
    "user": lambda: child(0x10000000),
    "net": lambda: child(0x40000000),
    "overlay_watch": lambda: watch(b"/srv"),
    # what moves
    "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x300),
    "udplite": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136),
    "link_events": link_events,
    "tcp": connected,
    "unix": socket.socketpair,
    "unix_waiting": unix_waiting,
    "half_closed": half_closed,
    "in_flight": in_flight,
    "pidfd": lambda: os.pidfd_open(1),
    "inotify": lambda: watch(b"/tmp"),
    "fanotify": lambda: system_call(300, 0, 0),
    "terminal": lambda: os.openpty(),
    "deleted": lambda: deleted(1 << 16),
    "odd_name": odd_name,
    "memfd": lambda: os.memfd_create("buffer"),
    "mount": lambda: child(0x20000),
    "child": child,
    "zombie": zombie,
    # what moves, and loses something
    "semaphore": lambda: os.eventfd(3, os.EFD_SEMAPHORE),
    "waiting": waiting,
    "timer": timer,
}


def main() -> None:
    try:
        for kind in sys.argv[1:]:
            kept.append(KINDS[kind]())
        # Children that have unshared something must have done so.
        time.sleep(0.1)
        said = "ready"
    except OSError as error:
        said = f"{kind}: {error}"
    pathlib.Path("/tmp/ready").write_text(said)
    while True:
        time.sleep(1)


main()
