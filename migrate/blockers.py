"""What inside a container makes its dump fail, or gets lost by it: said before anything is touched.

`judge` is pure; `find` gives it what `task_scan.py` sees. What CRIU can dump is from its sources
(4.2; the file is named where it is not obvious) and was tried out: each row here was refused, or
lost, by CRIU 4.2.1. Where a program can do without, the remedy names the setting.
"""

from __future__ import annotations

import re
import stat
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from migrate import config
from migrate.refusals import Caution, Findings, Refusal
from migrate.socket_blockers import of_socket
from migrate.task_scan import ContainerView, scan, who

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from migrate.task_scan import OpenFile, TaskView

# Reasons of one kind are told for this many tasks, or a fork server fills the screen.
TOLD_PER_CODE_MAX = 3
_BLOCK_BYTES = 512
_STDIO = ("its standard input", "its standard output", "its standard error")

_NO_STDIO = "start the container with its streams in pipes or /dev/null"
_NO_TERMINAL = "start the container detached, with `terminal: false` in config.json"


FindingT = TypeVar("FindingT", Refusal, Caution)


class _Kind(NamedTuple):
    start: str
    code: str
    what: str
    remedy: str


# Kernel objects, by the beginning of their link in /proc/PID/fd (criu/files.c: dump_one_file).
_OBJECTS = (
    _Kind(
        "anon_inode:[io_uring]",
        "io-uring",
        "an io_uring",
        "have it use epoll (libuv, Node.js: UV_USE_IO_URING=0), or forbid io_uring (seccomp)",
    ),
    _Kind("/secretmem", "memfd-secret", "secret memory (memfd_secret)", "configure it without"),
    _Kind("anon_inode:[perf_event]", "perf-event", "a performance counter", "end what profiles it"),
    _Kind("anon_inode:bpf", "bpf", "a BPF object", "load it from outside of the container"),
    _Kind("anon_inode:btf", "bpf", "a BPF object", "load it from outside of the container"),
    _Kind(
        "anon_inode:[userfaultfd]",
        "userfaultfd",
        "a userfaultfd of its own",
        "end what uses it (a debugger, a garbage collector's option, another migration)",
    ),
    _Kind("anon_inode:kvm", "kvm", "a virtual machine", "migrate that by its own means"),
    _Kind(
        "anon_inode:seccomp",
        "seccomp-notify",
        "a seccomp notification descriptor",
        "run the supervisor of system calls outside of the container",
    ),
)
# What CRIU dumps; any other kernel object is refused.
_OBJECTS_DUMPED = (
    "anon_inode:[eventfd]",
    "anon_inode:[eventpoll]",
    "anon_inode:inotify",
    "anon_inode:[fanotify]",
    "anon_inode:[signalfd]",
    "anon_inode:[timerfd]",
    "anon_inode:[pidfd]",
    "pidfd:",
)
_GRAPHICS = ("/dev/nvidia", "/dev/dri/", "/dev/kfd", "/dev/infiniband/", "/dev/vfio/")
# Character devices that are stateless or that CRIU knows (criu/files.c: dump_chrdev): memory
# (null, zero, full, random, urandom), and of the miscellaneous tun and autofs.
_MEMORY_MAJOR, _MISC_MAJOR = 1, 10
_MISC_DUMPED = (200, 235)
# Terminals (criu/tty.c: is_tty).
_TERMINAL_MAJORS = (4, 5, *range(136, 144))
# A watch whose file handle is overlayfs' own (linux/exportfs.h: OVL_FILEID_V0, OVL_FILEID_V1).
_OVERLAY_WATCH = re.compile(r"^inotify wd:.* fhandle-type:f[8b] ", re.MULTILINE)
# fdinfo of a timer that goes off again and again (proc(5)).
# Names below /dev that are memory and no device.
_MAPPED_DEVICES_DUMPED = ("/dev/zero", "/dev/shm/", "/dev/mqueue/", "/dev/hugepages/")  # noqa: S108


def find(cgroup: Path, init: int) -> Findings:
    """Look at the tasks below `cgroup` and judge. Blocking."""
    return judge(scan(cgroup, init))


def judge(view: ContainerView) -> Findings:
    """Every blocker, and what would be lost, of what was seen. Pure."""
    refusals: list[Refusal] = [*_of_tasks(view), *_of_sockets(view), *_of_namespace(view)]
    cautions: list[Caution] = []
    for task in view.tasks:
        cautions += _losses(task)
    if any(one.waiting for one in view.sockets):
        cautions.append(
            Caution(
                "accept-queue",
                "the container has connections that it has not accepted yet",
                "if one waits still at the freeze, the dump fails and is undone: try again",
            )
        )
    if not view.is_complete:
        cautions.append(
            Caution(
                "scan-incomplete",
                "the container has more descriptors or threads than preflight looks at",
                "what can't be dumped there is found at the freeze, and undone",
            )
        )
    return Findings(_few(refusals), _few(cautions))


def _of_tasks(view: ContainerView) -> Iterator[Refusal]:
    pids = {task.pid for task in view.tasks}
    if not any(task.state not in "ZX" for task in view.tasks):
        yield Refusal("no-tasks", "the container has no living task", "start it anew")
    first = next((task for task in view.tasks if task.pid == view.init), None)
    # A pseudoterminal whose master a task of the container holds (tmux, sshd) moves with it.
    has_master = any(one.target.endswith("ptmx") for task in view.tasks for one in task.files)
    for task in view.tasks:
        if task.state in "ZX":
            continue
        yield from _of_task(task, view.init, pids, first)
        for opened in task.files:
            yield from _of_file(task, opened, has_master=has_master)
        yield from _of_mapped(task)
        if task.users != {0} and not view.may_ask_all:
            # criu/cr-dump.c: prlimit(2) of a task of another user.
            yield Refusal(
                "other-user",
                f"{who(task)} is not root's, and this host may not ask for its limits",
                "run the agent and `migrate` with CAP_SYS_RESOURCE",
            )


def _of_task(
    task: TaskView, init: int, pids: set[int], first: TaskView | None
) -> Iterator[Refusal]:
    if task.tracers:
        by = "a task of the container" if task.tracers & pids else f"pid {min(task.tracers)}"
        # CRIU tries for 10 s, with the container frozen (criu/seize.c).
        yield Refusal("traced", f"{who(task)} is traced by {by}", "end the debugger or tracer")
    if task.pid != init and task.parent not in pids:
        # CRIU follows parents to children: what entered by `runc exec` is killed and not dumped.
        yield Refusal(
            "exec-session",
            f"{who(task)} was started inside from outside (exec) and would be lost",
            "end the exec session or health check first",
        )
    if task.has_deadline:
        # Dumped, and then refused at the restore (criu/cr-restore.c: restore_sched_info).
        yield Refusal(
            "sched-deadline",
            f"{who(task)} is scheduled with SCHED_DEADLINE",
            "give it another policy (chrt --other -p 0 PID)",
        )
    if first is None:
        return
    for kind, inode in task.namespaces.items():
        if inode != first.namespaces.get(kind, inode):
            yield Refusal(
                "nested-namespace",
                f"{who(task)} has a {kind} namespace of its own inside the container",
                "run it without one (a sandbox, a container in the container)",
            )


def _of_file(task: TaskView, opened: OpenFile, *, has_master: bool) -> Iterator[Refusal]:
    target = opened.target
    for kind in _OBJECTS:
        if target.startswith(kind.start):
            yield Refusal(kind.code, f"{who(task)} has {kind.what}", kind.remedy)
            return
    if target.startswith(_GRAPHICS):
        yield Refusal(
            "gpu",
            f"{who(task)} uses {target}, whose state can't move",
            "run it on the processor, without this device",
        )
    elif target == "anon_inode:inotify" and _OVERLAY_WATCH.search(opened.note):
        # criu/fsnotify.c: "Can't dump that handle"
        yield Refusal(
            "inotify-overlay",
            f"{who(task)} watches a directory of an overlay file system (inotify)",
            "have the container's root on a plain directory, or watch one in a volume",
        )
    elif target.startswith(("anon_inode:", "/dmabuf:")):
        if not target.startswith(_OBJECTS_DUMPED):
            yield Refusal(
                "kernel-object",
                f"{who(task)} has a kernel object that CRIU can't dump ({target})",
                "configure the program without it",
            )
    elif target.startswith("/") and not target.startswith("/memfd:"):
        yield from _of_path(task, opened, has_master=has_master)


def _of_path(task: TaskView, opened: OpenFile, *, has_master: bool) -> Iterator[Refusal]:
    what = _STDIO[opened.number] if opened.number < len(_STDIO) else f"fd {opened.number}"
    where = f"{who(task)} has {opened.target} open as {what}"
    if stat.S_ISCHR(opened.mode) and opened.device[0] in _TERMINAL_MAJORS:
        if opened.mount is None or not has_master:
            yield Refusal("terminal", f"{where}, a terminal", _NO_TERMINAL)
    elif opened.mount is None:
        # criu/files-reg.c: "Can't lookup mount"
        yield Refusal("foreign-file", f"{where}, which is outside of its mounts", _NO_STDIO)
    elif opened.mount.kind == "mqueue":
        yield Refusal(
            "mqueue",
            f"{where}, a POSIX message queue",
            "use another queue: CRIU can't dump these",
        )
    elif stat.S_ISCHR(opened.mode):
        yield from _of_device(where, opened)
    elif stat.S_ISREG(opened.mode) and opened.is_deleted:
        yield from _of_deleted(where, opened)


def _of_device(where: str, opened: OpenFile) -> Iterator[Refusal]:
    major, minor = opened.device
    is_dumped = major == _MEMORY_MAJOR or (major == _MISC_MAJOR and minor in _MISC_DUMPED)
    if not is_dumped:
        yield Refusal(
            "device",
            f"{where}, a device ({major}:{minor}) that CRIU can't dump",
            "run the program without this device",
        )


def _of_deleted(where: str, opened: OpenFile) -> Iterator[Refusal]:
    size_bytes = opened.blocks * _BLOCK_BYTES
    if opened.links == 0 and size_bytes > config.GHOST_FILE_BYTES_MAX:
        yield Refusal(
            "ghost-file",
            f"{where}, deleted and {size_bytes >> 20} MiB large",
            f"close it: at most {config.GHOST_FILE_BYTES_MAX >> 20} MiB of it can move",
        )
    elif opened.links > 0:
        # criu/files-reg.c: "Can't create link remap", for which it would write into the rootfs.
        yield Refusal(
            "deleted-link",
            f"{where}, deleted under this name and linked under another",
            "have the program open it by the name that is left",
        )


def _of_mapped(task: TaskView) -> Iterator[Refusal]:
    for name in sorted(task.mapped):
        if name.startswith("/secretmem"):
            yield Refusal(
                "memfd-secret", f"{who(task)} has secret memory (memfd_secret)", _OBJECTS[1].remedy
            )
        elif name == "[uprobes]":
            yield Refusal(
                "uprobes",
                f"{who(task)} is traced by uprobes",
                "end what traces it (bpftrace, perf probe, an observability agent)",
            )
        elif name.startswith("anon_inode:") or (
            name.startswith("/dev/") and not name.startswith(_MAPPED_DEVICES_DUMPED)
        ):
            known = next((kind for kind in _OBJECTS if name.startswith(kind.start)), None)
            yield Refusal(
                "device-memory" if known is None else known.code,
                f"{who(task)} has mapped {name if known is None else known.what}",
                "run it without this device" if known is None else known.remedy,
            )


def _of_sockets(view: ContainerView) -> Iterator[Refusal]:
    own = {one.inode for one in view.sockets}
    holders = {inode: task for task in reversed(view.tasks) for inode in task.sockets}
    for one in view.sockets:
        holder = who(holders[one.inode]) if one.inode in holders else "the container"
        refusal = of_socket(one, holder, own)
        if refusal is not None:
            yield refusal


def _of_namespace(view: ContainerView) -> Iterator[Refusal]:
    if view.queues:
        # criu/filesystems.c: "mqueue isn't empty"
        yield Refusal(
            "mqueue",
            f"the container has the POSIX message queue {min(view.queues)}",
            "remove it (rm /dev/mqueue/…): CRIU can't dump these",
        )
    if view.strangers:
        yield Refusal(
            "network-shared",
            f"pid {min(view.strangers)} outside of the container shares its network",
            "give each container a network namespace of its own",
        )


def _losses(task: TaskView) -> Iterator[Caution]:
    for opened in task.files:
        # criu/eventfd.c restores a counter and not its mode.
        if opened.target == "anon_inode:[eventfd]" and "eventfd-semaphore: 1" in opened.note:
            yield Caution(
                "eventfd-semaphore",
                f"{who(task)} has an eventfd that counts like a semaphore, CRIU forgets that",
                "check that the program bears an ordinary one",
            )


def _few(found: Iterable[FindingT]) -> tuple[FindingT, ...]:
    """Each once, and no more of one kind than tell what the matter is."""
    kept: list[FindingT] = []
    told: dict[str, int] = {}
    for one in dict.fromkeys(found):
        told[one.code] = told.get(one.code, 0) + 1
        if told[one.code] <= TOLD_PER_CODE_MAX:
            kept.append(one)
    return tuple(kept)
