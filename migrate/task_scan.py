"""Look at the tasks of a container: what they have open and mapped, and who holds on to them.

Only looks; what of it stands in the way of a dump is `blockers.py`'s matter. Nothing is stopped:
tasks come and go meanwhile, and what is gone is left out. Everything has a limit, and `is_complete`
says whether one was reached.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyroute2 import DiagSocket
from pyroute2.netlink.exceptions import NetlinkError

from criu_glue.errors import CriuGlueError
from criu_glue.kernel import SYS_PIDFD_GETFD
from criu_glue.mappings import cgroup_pids
from migrate.netns import run_in

if TYPE_CHECKING:
    from collections.abc import Iterator

# Descriptors and sockets looked at in all: a server with more connections is looked at in part, and
# CRIU itself says the rest. It takes a second or so.
DESCRIPTORS_MAX = 32768
# Threads of all tasks; each costs two small files.
THREADS_MAX = 8192
# A maps file has about 100 bytes a line, and 65,530 lines by default.
MAPS_BYTES_MAX = 16 << 20

NAMESPACES = ("user", "pid", "ipc", "uts", "net", "time")
# The task is not frozen, so what was listed a moment ago may be gone.
_GONE = (FileNotFoundError, ProcessLookupError, PermissionError)

_SO_TYPE, _SO_PROTOCOL, _SO_DOMAIN = 3, 38, 39
_SIOCGSKNS = 0x894C
_TCP_ULP = 31
_UDP_CORK = 1
# struct tcp_info: eight bytes, four words, then tcpi_unacked: of a listener, what waits in its
# accept queue (`net/ipv4/tcp.c: tcp_get_info`).
_TCP_INFO_WAITING_AT = 24
_TCP_LISTEN = 10
_UDIAG_SHOW_NAME_AND_PEER = 1 | 4
_SCHED_DEADLINE = 6

_MAPPED = re.compile(rb"^\S+ \S+ \S+ \S+ \d+ +([/\[][^\n]*|anon_inode:[^\n]*)$", re.MULTILINE)
_libc = ctypes.CDLL(None, use_errno=True)


class Mounted(NamedTuple):
    """One row of mountinfo: the file system's type and the mount point in the task's view."""

    kind: str
    point: str


class OpenFile(NamedTuple):
    """A descriptor that is no socket. `mount`: None if it is of no mount that the task sees.

    mode, device (major, minor), links, blocks: stat(2) of what is open. note: the text of fdinfo
    for kernel objects.
    """

    number: int
    target: str
    mount: Mounted | None = None
    mode: int = 0
    device: tuple[int, int] = (0, 0)
    links: int = 1
    blocks: int = 0
    note: str = ""


class SocketView(NamedTuple):
    """A socket, asked through a duplicate. waiting: connections in a listener's accept queue.

    peer: inode of a unix socket's other end, 0 if it has none; peer_name: where that is bound.
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


@dataclass(frozen=True, slots=True)
class TaskView:
    """One task with its threads. parent, tracers: pids of the host. namespaces: inode numbers."""

    pid: int
    name: str
    state: str = "S"
    parent: int = 0
    tracers: frozenset[int] = frozenset()
    has_deadline: bool = False
    namespaces: dict[str, int] = field(default_factory=dict)
    files: tuple[OpenFile, ...] = ()
    sockets: frozenset[int] = frozenset()
    mapped: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class ContainerView:
    """All tasks; `init` is the pid of the first. sockets: each once. queues: POSIX message queues
    by name. mounts: every mount that the container sees. strangers: pids outside of the container
    that share its network."""

    init: int
    tasks: tuple[TaskView, ...]
    sockets: tuple[SocketView, ...] = ()
    queues: tuple[str, ...] = ()
    mounts: tuple[Mounted, ...] = ()
    strangers: tuple[int, ...] = ()
    is_complete: bool = True


class _Budget:
    """What is left of a limit."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self) -> bool:
        self.left -= 1
        return self.left >= 0


def scan(cgroup: Path, init: int) -> ContainerView:
    """Look at every task below `cgroup`. Blocking, some 30 µs a descriptor."""
    descriptors, threads = _Budget(DESCRIPTORS_MAX), _Budget(THREADS_MAX)
    found: dict[int, tuple[int, int]] = {}
    tasks = []
    pids = cgroup_pids(cgroup)
    for pid in pids:
        with contextlib.suppress(*_GONE, CriuGlueError):
            tasks.append(_task(pid, descriptors, threads, found))
    proc = Path(f"/proc/{init}")
    mounts = _mounts(proc)
    return ContainerView(
        init=init,
        tasks=tuple(tasks),
        sockets=tuple(_sockets(found, proc / "ns/net")),
        queues=tuple(_queues(proc, mounts.values())),
        mounts=tuple(mounts.values()),
        strangers=tuple(_strangers(proc, set(pids))),
        is_complete=descriptors.left >= 0 and threads.left >= 0,
    )


def _task(
    pid: int, descriptors: _Budget, threads: _Budget, sockets: dict[int, tuple[int, int]]
) -> TaskView:
    proc = Path(f"/proc/{pid}")
    status = _status(proc)
    tracers, has_deadline = {int(status["TracerPid"])}, False
    for thread in os.listdir(proc / "task"):
        if not threads.take():
            break
        with contextlib.suppress(*_GONE):
            tracers.add(int(_status(proc / "task" / thread)["TracerPid"]))
            has_deadline |= os.sched_getscheduler(int(thread)) == _SCHED_DEADLINE
    files, inodes = [], set()
    for opened in _files(proc, _mounts(proc), descriptors):
        inode = _inode_of(opened.target, "socket")
        if inode is None:
            files.append(opened)
        else:
            inodes.add(inode)
            sockets.setdefault(inode, (pid, opened.number))
    return TaskView(
        pid=pid,
        name=status["Name"],
        state=status["State"][0],
        parent=int(status["PPid"]),
        tracers=frozenset(tracers - {0}),
        has_deadline=has_deadline,
        namespaces=_namespaces(proc),
        files=tuple(files),
        sockets=frozenset(inodes),
        mapped=_mapped(proc),
    )


def _status(proc: Path) -> dict[str, str]:
    lines = (proc / "status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _namespaces(proc: Path) -> dict[str, int]:
    found = {}
    for kind in NAMESPACES:
        with contextlib.suppress(*_GONE):
            inode = _inode_of(os.readlink(proc / "ns" / kind), kind)  # noqa: PTH115 - "pid:[1]"
            found[kind] = inode or 0
    return found


def _inode_of(target: str, kind: str) -> int | None:
    """The number in "socket:[17]", None for what is of another kind."""
    if not target.startswith(f"{kind}:["):
        return None
    return int(target.removeprefix(f"{kind}:[").rstrip("]"))


def _mounts(proc: Path) -> dict[str, Mounted]:
    """By mount id (proc(5), mountinfo)."""
    rows = {}
    with contextlib.suppress(*_GONE, OSError):
        for line in (proc / "mountinfo").read_text(errors="replace").splitlines():
            fields, _, rest = line.partition(" - ")
            identity, _, _, _, point, *_ = fields.split(" ")
            rows[identity] = Mounted(rest.split(" ")[0], point)
    return rows


def _files(proc: Path, mounts: dict[str, Mounted], budget: _Budget) -> Iterator[OpenFile]:
    for number in os.listdir(proc / "fd"):
        if not budget.take():
            return
        with contextlib.suppress(*_GONE):
            path = proc / "fd" / number
            target = os.readlink(path)  # noqa: PTH115 - "socket:[17]" is no path
            if target.startswith(("socket:", "pipe:")):
                yield OpenFile(int(number), target)
                continue
            info = (proc / "fdinfo" / number).read_text()
            if not target.startswith("/"):
                yield OpenFile(int(number), target, note=info)
                continue
            identity = re.search(r"^mnt_id:\s+(\d+)$", info, re.MULTILINE)
            status = path.stat()
            yield OpenFile(
                number=int(number),
                target=target,
                mount=mounts.get(identity[1]) if identity else None,
                mode=status.st_mode,
                device=(os.major(status.st_rdev), os.minor(status.st_rdev)),
                links=status.st_nlink,
                blocks=status.st_blocks,
            )


def _mapped(proc: Path) -> frozenset[str]:
    """The names of what is mapped, each once."""
    with (proc / "maps").open("rb") as file:
        text = file.read(MAPS_BYTES_MAX)
    return frozenset(name.decode(errors="replace") for name in set(_MAPPED.findall(text)))


def _queues(proc: Path, mounts: Any) -> Iterator[str]:
    for mounted in mounts:
        if mounted.kind == "mqueue":
            with contextlib.suppress(OSError):
                yield from os.listdir(proc / "root" / mounted.point.lstrip("/"))


def _strangers(proc: Path, own: set[int]) -> Iterator[int]:
    """Processes that are in the container's network namespace and not in its cgroup."""
    with contextlib.suppress(OSError):
        wanted = (proc / "ns/net").stat().st_ino
        for name in os.listdir("/proc"):
            if name.isdecimal() and int(name) not in own:
                with contextlib.suppress(OSError):
                    if os.stat(f"/proc/{name}/ns/net").st_ino == wanted:  # noqa: PTH116 - fast
                        yield int(name)


def _sockets(found: dict[int, tuple[int, int]], netns: Path) -> Iterator[SocketView]:
    if not found:
        return
    try:
        own_network = netns.stat().st_ino
        peers = run_in(netns, _unix_sockets)
    except (OSError, NetlinkError):
        return
    names: dict[int, tuple[int, str]] = {}
    if any(peer and peer not in found for inode, (peer, _) in peers.items() if inode in found):
        with contextlib.suppress(OSError, NetlinkError):
            names = _unix_sockets()
    for inode, (pid, number) in found.items():
        with contextlib.suppress(OSError), _duplicate(pid, number) as sock:
            view = _ask(sock, inode, own_network)
            peer, _ = peers.get(inode, (0, ""))
            name = (names.get(peer) or peers.get(peer) or (0, ""))[1]
            yield view._replace(peer=peer, peer_name=name)


def _unix_sockets() -> dict[int, tuple[int, str]]:
    """Every unix socket of this network namespace: inode to (the peer's inode, its own name)."""
    with DiagSocket() as diag:
        listed = diag.get_sock_stats(family=socket.AF_UNIX, show=_UDIAG_SHOW_NAME_AND_PEER)
        return {
            one["udiag_ino"]: (
                one.get_attr("UNIX_DIAG_PEER") or 0,
                str(one.get_attr("UNIX_DIAG_NAME") or ""),
            )
            for one in listed
        }


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

