"""Look at the tasks of a container: what they have open and mapped, and who holds on to them.

Only looks; what of it stands in the way of a dump is `blockers.py`'s matter. Nothing is stopped:
tasks come and go meanwhile, and what is gone is left out. Everything has a limit, and `is_complete`
says whether one was reached.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from criu_glue.errors import CriuGlueError
from criu_glue.mappings import cgroup_pids
from migrate.socket_scan import SocketView, socket_views

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

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

_SCHED_DEADLINE = 6
# linux/capability.h
_CAP_SYS_RESOURCE = 1 << 24

_DELETED = " (deleted)"
_MAPPED = re.compile(rb"^\S+ \S+ \S+ \S+ \d+ +([/\[][^\n]*|anon_inode:[^\n]*)$", re.MULTILINE)


class Mounted(NamedTuple):
    """One row of mountinfo: the file system's type and the mount point in the task's view."""

    kind: str
    point: str


class OpenFile(NamedTuple):
    """A descriptor that is no socket. `mount`: None if it is of no mount that the container sees.

    mode, device (major, minor), links, blocks: stat(2) of what is open. is_deleted: there is no
    file of that name any more. note: the text of fdinfo for kernel objects.
    """

    number: int
    target: str
    mount: Mounted | None = None
    mode: int = 0
    device: tuple[int, int] = (0, 0)
    links: int = 1
    blocks: int = 0
    is_deleted: bool = False
    note: str = ""


@dataclass(frozen=True, slots=True)
class TaskView:
    """One task with its threads. parent, tracers: pids of the host. namespaces: inode numbers.
    users: every user and group number that it has, real, effective or kept."""

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
    users: frozenset[int] = frozenset({0})


def who(task: TaskView) -> str:
    """The task in a sentence."""
    return f"{task.name} (pid {task.pid})"


@dataclass(frozen=True, slots=True)
class ContainerView:
    """All tasks; `init` is the pid of the first. sockets: each once. queues: POSIX message queues
    by name. strangers: pids outside of the container that share its network. may_ask_all: whether
    this process may ask every task for its limits, as CRIU has to."""

    init: int
    tasks: tuple[TaskView, ...]
    sockets: tuple[SocketView, ...] = ()
    queues: tuple[str, ...] = ()
    strangers: tuple[int, ...] = ()
    is_complete: bool = True
    may_ask_all: bool = True


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
    mounts = _all_mounts(pids)
    for pid in pids:
        with contextlib.suppress(*_GONE, CriuGlueError):
            tasks.append(_task(pid, mounts, descriptors, threads, found))
    proc = Path(f"/proc/{init}")
    return ContainerView(
        init=init,
        tasks=tuple(tasks),
        sockets=tuple(socket_views(found, proc / "ns/net")),
        queues=tuple(_queues(proc, mounts.values())),
        strangers=tuple(_strangers(proc, cgroup)),
        may_ask_all=_may_ask_all(proc),
        is_complete=descriptors.left >= 0 and threads.left >= 0,
    )


def _may_ask_all(proc: Path) -> bool:
    """By CAP_SYS_RESOURCE; whoever has made a user namespace has it there (user_namespaces(7))."""
    if int(_status(Path("/proc/self"))["CapEff"], 16) & _CAP_SYS_RESOURCE:
        return True
    with contextlib.suppress(*_GONE):
        return (proc / "ns/user").stat().st_ino != Path("/proc/self/ns/user").stat().st_ino
    return False


def _task(
    pid: int,
    mounts: dict[str, Mounted],
    descriptors: _Budget,
    threads: _Budget,
    sockets: dict[int, tuple[int, int]],
) -> TaskView:
    proc = Path(f"/proc/{pid}")
    status = _status(proc)
    tracers, has_deadline = {int(status["TracerPid"])}, False
    for thread in _names(proc / "task"):
        if not threads.take():
            break
        with contextlib.suppress(*_GONE):
            tracers.add(int(_status(proc / "task" / thread)["TracerPid"]))
            has_deadline |= os.sched_getscheduler(int(thread)) == _SCHED_DEADLINE
    files, inodes = [], set()
    for opened in _files(proc, mounts, descriptors):
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
        users=frozenset(int(user) for key in ("Uid", "Gid") for user in status[key].split()),
    )


def _status(proc: Path) -> dict[str, str]:
    lines = (proc / "status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _names(directory: Path) -> list[str]:
    return os.listdir(directory)  # noqa: PTH208 - names, not thousands of Paths


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


def _all_mounts(pids: Iterable[int]) -> dict[str, Mounted]:
    """By mount id, of every mount namespace in the container: a task may have files of another."""
    rows: dict[str, Mounted] = {}
    seen = set()
    for pid in pids:
        proc = Path(f"/proc/{pid}")
        with contextlib.suppress(*_GONE):
            namespace = os.readlink(proc / "ns/mnt")  # noqa: PTH115 - "mnt:[1]" is no path
            if namespace not in seen:
                seen.add(namespace)
                rows |= _mounts(proc)
    return rows


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
    for number in _names(proc / "fd"):
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
                is_deleted=target.endswith(_DELETED) and not _exists(proc, target),
            )


def _exists(proc: Path, target: str) -> bool:
    """Whether a file is really called so: " (deleted)" may be a part of its name."""
    return os.path.lexists(proc / "root" / target.lstrip("/"))


def _mapped(proc: Path) -> frozenset[str]:
    """The names of what is mapped, each once."""
    with (proc / "maps").open("rb") as file:
        text = file.read(MAPS_BYTES_MAX)
    return frozenset(name.decode(errors="replace") for name in set(_MAPPED.findall(text)))


def _queues(proc: Path, mounts: Any) -> Iterator[str]:
    for mounted in mounts:
        if mounted.kind == "mqueue":
            with contextlib.suppress(OSError):
                yield from _names(proc / "root" / mounted.point.lstrip("/"))


def _strangers(proc: Path, cgroup: Path) -> Iterator[int]:
    """Processes that are in the container's network namespace and not in its cgroup.

    Those of the container come and go meanwhile: who is there before and after a look at its cgroup
    was there during it.
    """
    with contextlib.suppress(OSError, CriuGlueError):
        network = (proc / "ns/net").stat().st_ino
        numbers = [int(name) for name in _names(Path("/proc")) if name.isdecimal()]
        inside = {pid for pid in numbers if _network_of(pid) == network}
        inside -= set(cgroup_pids(cgroup))
        yield from (pid for pid in sorted(inside) if _network_of(pid) == network)


def _network_of(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}/ns/net").st_ino  # noqa: PTH116 - fast
    return None
