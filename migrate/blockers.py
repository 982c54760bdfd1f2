"""What inside a container would make CRIU fail: found in /proc, said before anything is touched.

`find` reads every task of the container; `of_descriptor`, `of_mapping` and `of_status` say what a
line of /proc means and are pure. What CRIU can dump is from its own sources and from trials: a line
in the tables here is something that was refused by CRIU 4.2.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from criu_glue.errors import CriuGlueError
from criu_glue.mappings import cgroup_pids
from migrate.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Descriptors looked at in one task: a server with a million connections is looked at in part, and
# CRIU itself says the rest.
DESCRIPTORS_MAX = 65536
# Reasons of the same kind are told once; this many different ones fill a screen.
REFUSALS_MAX = 32


class _Kind(NamedTuple):
    pattern: re.Pattern[str]
    code: str
    what: str
    remedy: str


def _kind(pattern: str, code: str, what: str, remedy: str) -> _Kind:
    return _Kind(re.compile(pattern), code, what, remedy)


_DESCRIPTORS = (
    _kind(
        r"anon_inode:\[io_uring\]",
        "io-uring",
        "an io_uring",
        "have the program use epoll (Redis: `io-uring no`; libuv: UV_USE_IO_URING=0)",
    ),
    _kind(
        r"anon_inode:\[perf_event\]", "perf-event", "a performance counter", "end what profiles it"
    ),
    _kind(r"anon_inode:\[?bpf", "bpf", "a BPF object", "load it from outside of the container"),
    _kind(
        r"anon_inode:\[userfaultfd\]",
        "userfaultfd",
        "a userfaultfd of its own",
        "end the program that uses it (a debugger, another migration)",
    ),
    _kind(r"anon_inode:\[?kvm", "kvm", "a virtual machine", "migrate that by its own means"),
    _kind(r"anon_inode:\[?(fanotify|seccomp)", "anon-inode", "a kernel object", "close it"),
    _kind(r"/secretmem", "memfd-secret", "a secret memory file", "configure the program without"),
    _kind(
        r"/dev/(nvidia|dri/|kfd|infiniband|vfio|kvm)",
        "device",
        "a device that can't move",
        "run it without this device",
    ),
    _kind(
        r"/dev/(tty|pts/|console|ttyS)",
        "terminal",
        "a terminal",
        "start the container detached, with `terminal: false` in config.json",
    ),
)
_MAPPINGS = (
    _kind(r"/secretmem", "memfd-secret", "secret memory", "configure the program without it"),
    _kind(r"anon_inode:\[io_uring\]", *_DESCRIPTORS[0][1:]),
    _kind(
        r"/dev/(nvidia|dri/|kfd|infiniband|vfio)",
        "device",
        "a device's memory",
        "run it without this device",
    ),
)


def find(cgroup: Path) -> list[Refusal]:
    """Every blocker in the tasks below `cgroup`. Blocking; tasks that exit are left out."""
    found: dict[tuple[str, str], Refusal] = {}
    pids = cgroup_pids(cgroup)
    for pid in pids:
        try:
            for refusal in _of_task(Path("/proc") / str(pid), set(pids)):
                found.setdefault((refusal.code, refusal.message), refusal)
        except (FileNotFoundError, ProcessLookupError, CriuGlueError):
            continue
        if len(found) >= REFUSALS_MAX:
            break
    return list(found.values())


def of_descriptor(name: str, target: str) -> Refusal | None:
    """What an open file (the text of its link in /proc/PID/fd) stands in the way of."""
    return _match(_DESCRIPTORS, name, target, "has open")


def of_mapping(name: str, mapped: str) -> Refusal | None:
    """What a mapping (its name in /proc/PID/maps) stands in the way of."""
    return _match(_MAPPINGS, name, mapped, "has mapped")


def of_status(name: str, status: str, pids: set[int]) -> Iterator[Refusal]:
    """What /proc/PID/status tells: a tracer, or a pid namespace inside the container's."""
    tracer = re.search(r"^TracerPid:\s+(\d+)$", status, re.MULTILINE)
    if tracer is not None and int(tracer[1]) != 0:
        by = "a task of the container" if int(tracer[1]) in pids else f"pid {tracer[1]}"
        yield Refusal("traced", f"{name} is traced by {by}", "end the debugger or tracer")
    names = re.search(r"^NSpid:\s+(.+)$", status, re.MULTILINE)
    if names is not None and len(names[1].split()) > 2:
        yield Refusal(
            "nested-pids",
            f"{name} is in a pid namespace of its own inside the container",
            "CRIU can't dump nested pid namespaces: run it without one",
        )


def _match(kinds: Iterable[_Kind], name: str, text: str, has: str) -> Refusal | None:
    for kind in kinds:
        if kind.pattern.match(text):
            return Refusal(kind.code, f"{name} {has} {kind.what} ({text})", kind.remedy)
    return None


def _of_task(proc: Path, pids: set[int]) -> Iterator[Refusal]:
    status = (proc / "status").read_text()
    name = status.partition("\n")[0].removeprefix("Name:").strip()
    yield from of_status(name, status, pids)
    for line in (proc / "maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and (refusal := of_mapping(name, fields[5])):
            yield refusal
    mounts = set(re.findall(r"^(\d+) ", (proc / "mountinfo").read_text(), re.MULTILINE))
    with os.scandir(proc / "fd") as descriptors:
        for number, entry in enumerate(descriptors):
            if number >= DESCRIPTORS_MAX:
                return
            yield from _of_descriptor(proc, entry.name, name, mounts)


def _of_descriptor(proc: Path, number: str, name: str, mounts: set[str]) -> Iterator[Refusal]:
    try:
        target = os.readlink(proc / "fd" / number)  # noqa: PTH115  (Path.readlink fails on "[…]")
        info = (proc / "fdinfo" / number).read_text()
    except OSError:
        return
    if refusal := of_descriptor(name, target):
        yield refusal
        return
    if not target.startswith("/") or target.startswith(("/memfd:", "/dmabuf")):
        return
    mount = re.search(r"^mnt_id:\s+(\d+)$", info, re.MULTILINE)
    if mount is not None and mount[1] not in mounts and target != "/dev/null":
        yield Refusal(
            "foreign-file",
            f"{name} has open a file outside of its mounts ({target})",
            "start the container with its output in a pipe or /dev/null",
        )
    if "mqueue" in _file_system(proc, number):
        yield Refusal(
            "mqueue",
            f"{name} has open a POSIX message queue ({target})",
            "CRIU can't dump message queues: use a socket or System V queue",
        )


def _file_system(proc: Path, number: str) -> str:
    """The type of the file system of an open file, where mountinfo tells."""
    try:
        info = (proc / "fdinfo" / number).read_text()
        mount = re.search(r"^mnt_id:\s+(\d+)$", info, re.MULTILINE)
        if mount is None:
            return ""
        for line in (proc / "mountinfo").read_text().splitlines():
            if line.startswith(f"{mount[1]} "):
                return line.partition(" - ")[2].split()[0]
    except OSError:
        return ""
    return ""
