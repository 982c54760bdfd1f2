"""Look at the sockets of a container through duplicates of them: asking changes nothing.

Only looks; what of it stands in the way of a dump is `socket_blockers.py`'s matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from pyroute2 import DiagSocket
from pyroute2.netlink.exceptions import NetlinkError

from criu_glue.kernel import SYS_PIDFD_GETFD
from migrate.netns import run_in

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

_SO_TYPE, _SO_PROTOCOL, _SO_DOMAIN = 3, 38, 39
_SIOCGSKNS = 0x894C
_TCP_ULP = 31
_UDP_CORK = 1
# struct tcp_info: eight bytes, four words, then tcpi_unacked: of a listener, what waits in its
# accept queue (`net/ipv4/tcp.c: tcp_get_info`).
_TCP_INFO_WAITING_AT = 24
_TCP_LISTEN = 10
# linux/unix_diag.h: the name, the peer, and what waits to be accepted.
_UDIAG_SHOW = 1 | 4 | 8
_TCP_ESTABLISHED = 1
_SHUTDOWN_BOTH = 3

_libc = ctypes.CDLL(None, use_errno=True)


class SocketView(NamedTuple):
    """A socket, asked through a duplicate. waiting: connections in a listener's accept queue.

    peer: inode of a unix socket's other end, 0 if it has none; peer_name: where that is bound.
    is_dangling: a unix socket that is connected, but to nothing that this network namespace knows:
    it waits to be accepted elsewhere.
    """

    inode: int
    family: int
    kind: int
    protocol: int
    is_foreign: bool = False
    waiting: int = 0
    is_corked: bool = False
    upper_protocol: str = ""
    peer: int = 0
    peer_name: str = ""
    is_dangling: bool = False


class _UnixSocket(NamedTuple):
    """is_alone: connected, with no other end yet or any more. waiting: inodes that have connected
    to this listener and are not accepted."""

    peer: int
    name: str
    is_alone: bool
    waiting: tuple[int, ...]


def socket_views(found: Mapping[int, tuple[int, int]], netns: Path) -> Iterator[SocketView]:
    """The sockets in `found`: inode to (pid, descriptor). `netns`: of the container's first task.

    Blocking, some 20 µs a socket; those that are closed meanwhile are left out.
    """
    if not found:
        return
    try:
        own_network = netns.stat().st_ino
        listed = run_in(netns, _unix_sockets)
    except (OSError, NetlinkError):
        return
    accepting = {inode for one in listed.values() for inode in one.waiting}
    outside: dict[int, _UnixSocket] = {}
    if any(one.peer and one.peer not in found for inode, one in listed.items() if inode in found):
        # The other end is of a process of the host: its name is in the host's list.
        with contextlib.suppress(OSError, NetlinkError):
            outside = _unix_sockets()
    for inode, (pid, number) in found.items():
        with contextlib.suppress(OSError), _duplicate(pid, number) as sock:
            view = _ask(sock, inode, own_network)
            own = listed.get(inode)
            if own is None:
                yield view
                continue
            peer = outside.get(own.peer) or listed.get(own.peer)
            yield view._replace(
                peer=own.peer,
                peer_name="" if peer is None else peer.name,
                is_dangling=own.is_alone and inode not in accepting,
            )


def _unix_sockets() -> dict[int, _UnixSocket]:
    """Every unix socket of this thread's network namespace, by inode."""
    with DiagSocket() as diag:
        listed = diag.get_sock_stats(family=socket.AF_UNIX, show=_UDIAG_SHOW)
        return {one["udiag_ino"]: _unix_socket(one) for one in listed}


def _unix_socket(one: Any) -> _UnixSocket:
    peer = one.get_attr("UNIX_DIAG_PEER") or 0
    waiting = bytes.fromhex((one.get_attr("UNIX_DIAG_ICONS") or "").replace(":", ""))
    is_connected = one["udiag_state"] == _TCP_ESTABLISHED
    is_shut = one.get_attr("UNIX_DIAG_SHUTDOWN") == _SHUTDOWN_BOTH
    return _UnixSocket(
        peer=peer,
        name=str(one.get_attr("UNIX_DIAG_NAME") or ""),
        is_alone=not peer
        and is_connected
        and not is_shut
        and one["udiag_type"] != socket.SOCK_DGRAM,
        waiting=struct.unpack(f"={len(waiting) // 4}I", waiting),
    )


@contextlib.contextmanager
def _duplicate(pid: int, number: int) -> Iterator[socket.socket]:
    """A task's socket, as a descriptor of ours: asking it changes nothing (pidfd_getfd(2))."""
    task = os.pidfd_open(pid)
    try:
        fd = _libc.syscall(SYS_PIDFD_GETFD, task, number, 0)
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
    finally:
        os.close(task)
    # The family is given so that Python does not ask; what it is, is asked by SO_DOMAIN.
    duplicate = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fileno=fd)
    with duplicate:
        yield duplicate


def _ask(sock: socket.socket, inode: int, own_network: int) -> SocketView:
    family = sock.getsockopt(socket.SOL_SOCKET, _SO_DOMAIN)
    kind = sock.getsockopt(socket.SOL_SOCKET, _SO_TYPE)
    protocol = sock.getsockopt(socket.SOL_SOCKET, _SO_PROTOCOL)
    view = SocketView(inode, family, kind, protocol, is_foreign=_network(sock) != own_network)
    if family not in (socket.AF_INET, socket.AF_INET6):
        return view
    if protocol == socket.IPPROTO_TCP and kind == socket.SOCK_STREAM:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        waiting = struct.unpack_from("=I", info, _TCP_INFO_WAITING_AT)[0]
        upper = b""
        with contextlib.suppress(OSError):
            upper = sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16)
        name = upper.split(b"\0")[0].decode(errors="replace")
        return view._replace(waiting=waiting if info[0] == _TCP_LISTEN else 0, upper_protocol=name)
    if protocol == socket.IPPROTO_UDP:
        return view._replace(is_corked=bool(sock.getsockopt(socket.IPPROTO_UDP, _UDP_CORK)))
    return view


def _network(sock: socket.socket) -> int:
    """The inode of the network namespace that a socket is of (ioctl_ns(2))."""
    fd = fcntl.ioctl(sock.fileno(), _SIOCGSKNS)
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)
