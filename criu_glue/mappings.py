"""Tasks and their mappings as /proc shows them. Reads only; knows nothing of trackers or images.

A `Task` is an open directory /proc/PID. The kernel ties it to the task and not to the number:
every access through it fails once the task has been reaped, also when the pid belongs to another
task by then. That is this package's defence against pid reuse.
"""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, Final, NamedTuple

from criu_glue.errors import CriuGlueError, LimitExceededError, TaskGoneError

if TYPE_CHECKING:
    from collections.abc import Sized
    from pathlib import Path

# vm.max_map_count is 65,530 by default; Elasticsearch and Proton ask for 262,144 and some
# distributions ship 1,048,576. More than that is not a container but an accident.
MAPPINGS_MAX: Final = 1 << 20
# Linux's largest pid_max is 4 Mi; a container with more tasks than this is a fork bomb, and
# each tracked task costs two descriptors here.
TASKS_MAX: Final = 4096
# A systemd container has some hundreds of control groups.
CGROUPS_MAX: Final = 4096

# A reaped task answers ESRCH to open files and ENOENT to lookups in its directory.
_GONE: Final = (errno.ESRCH, errno.ENOENT)

# Private, no file: what CRIU's lazy dump leaves out (criu/include/vma.h:
# vma_entry_can_be_lazy). The special mappings ([vdso], [vvar], [vsyscall], [uprobes]) and hugetlb
# (a file by its inode) don't match. MAP_LOCKED ones do although CRIU dumps them itself: a mapping
# can be unlocked before the freeze, and a page too many does no harm.
_PRIVATE_ANONYMOUS: Final = re.compile(
    rb"^([0-9a-f]+)-([0-9a-f]+) ...p [0-9a-f]+ 00:00 0 *"
    rb"(?:\[heap\]|\[stack(?::\d+)?\]|\[anon:[^\n]*\])?$",
    re.MULTILINE,
)
_EVERY: Final = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (...)[ps] \S+ \S+ \d+ *(.*)$", re.MULTILINE)


class Mapping(NamedTuple):
    """One row of /proc/PID/maps. `permissions` as there, without the p or s: `rw-`."""

    start: int
    end: int
    permissions: str
    name: str


def private_anonymous(maps: bytes) -> list[tuple[int, int]]:
    """[start, end) of every private anonymous mapping in the text of a maps file.

    Sorted and not overlapping, also if mappings were merged while the file was being read (it is
    not atomic: the kernel goes on behind the last address that it has shown).
    """
    rows: list[tuple[int, int]] = []
    shown_end = 0
    for start_text, end_text in _PRIVATE_ANONYMOUS.findall(maps):
        start, end = max(int(start_text, 16), shown_end), int(end_text, 16)
        if start < end:
            rows.append((start, end))
            shown_end = end
    if len(rows) > MAPPINGS_MAX:
        raise LimitExceededError(f"a task has {len(rows)} mappings, more than {MAPPINGS_MAX}")
    return rows


def parse_maps(maps: bytes) -> list[Mapping]:
    """All rows of the text of a maps file."""
    return [
        Mapping(int(start, 16), int(end, 16), permissions.decode(), name.decode(errors="replace"))
        for start, end, permissions, name in _EVERY.findall(maps)
    ]


class Task:
    """A process of the host, by an open /proc/PID. Raises TaskGoneError once it has been reaped."""

    __slots__ = ("_fd", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._translated(error) from error

    def _translated(self, error: OSError) -> CriuGlueError:
        if error.errno in _GONE:
            return TaskGoneError(f"task {self.pid} has exited")
        return CriuGlueError(f"/proc/{self.pid}: {error.strerror}")

    def open(self, name: str, access: int = os.O_RDONLY) -> int:
        """A descriptor of a file below /proc/PID, for reading if nothing else is said."""
        try:
            return os.open(name, access | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise self._translated(error) from error

    def read(self, name: str) -> bytes:
        """The whole of a (text) file below /proc/PID."""
        try:
            with os.fdopen(self.open(name), "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            raise self._translated(error) from error

    def write(self, name: str, order: bytes) -> None:
        """Write a few bytes, at once, to a file below /proc/PID."""
        fd = self.open(name, os.O_WRONLY)
        try:
            os.write(fd, order)
        except OSError as error:
            raise self._translated(error) from error
        finally:
            os.close(fd)

    def open_and_read_at(self, name: str, offset: int, size_bytes: int) -> bytes:
        """Up to `size_bytes` of a file at an offset, nothing where it can't be read; of `mem`, the
        memory at an address. The file is opened anew, as `mem` belongs to the program that ran
        when it was opened."""
        fd = self.open(name)
        try:
            return os.pread(fd, size_bytes, offset)
        except OSError as error:
            if error.errno in (errno.EIO, errno.EFAULT):
                return b""
            raise self._translated(error) from error
        finally:
            os.close(fd)

    def alive(self) -> bool:
        """Whether the task has not been reaped (it may be a zombie)."""
        try:
            os.stat("stat", dir_fd=self._fd)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise self._translated(error) from error
        return True

    def status(self, field: str, *, thread: int | None = None) -> str:
        """A field of /proc/PID/status: `State`, `NSpid`, `TracerPid`, `Seccomp`."""
        text = self.read("status" if thread is None else f"task/{thread}/status")
        match = re.search(rb"^%b:\s*(.*)$" % field.encode(), text, re.MULTILINE)
        if match is None:
            raise CriuGlueError(f"/proc/{self.pid}/status has no field {field}")
        return match[1].decode()

    def vpid(self) -> int:
        """The task's number in its own, innermost pid namespace (pid_namespaces(7))."""
        return int(self.status("NSpid").split()[-1])

    def names(self, directory: str) -> list[str]:
        """What is in a directory below /proc/PID."""
        try:
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
            try:
                return os.listdir(fd)  # noqa: PTH208  a descriptor has no Path
            finally:
                os.close(fd)
        except OSError as error:
            raise self._translated(error) from error

    def threads(self) -> list[int]:
        """Its threads by their host numbers, the main thread first."""
        return sorted(map(int, self.names("task")), key=lambda tid: (tid != self.pid, tid))

    def thread_state(self, thread: int) -> str:
        """One letter as in proc(5): R, S, D, T, t, Z, X, I."""
        return self._stat_fields(f"task/{thread}/stat")[0]

    def living_thread(self) -> int:
        """A thread through which the task's memory can be reached: the main one, unless it has
        exited before the others. A task with no such thread is a zombie: TaskGoneError."""
        if self._stat_fields("stat")[0] not in "ZX":
            return self.pid
        for thread in self.threads():
            try:
                if self.thread_state(thread) not in "ZX":
                    return thread
            except TaskGoneError:
                continue
        raise TaskGoneError(f"task {self.pid} has exited")

    def _stat_fields(self, name: str) -> list[str]:
        # The name of the program, in parentheses, may hold spaces and parentheses itself.
        return self.read(name).rpartition(b")")[2].decode().split()

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def vpid(pid: int) -> int:
    """The number of a task in its own pid namespace: CRIU's name for it in images."""
    task = Task(pid)
    try:
        return task.vpid()
    finally:
        task.close()


def check_count(tasks: Sized, whose: str = "the container") -> None:
    """Raises LimitExceededError when they are more than TASKS_MAX."""
    if len(tasks) > TASKS_MAX:
        raise LimitExceededError(f"{whose} has {len(tasks)} tasks, more than {TASKS_MAX}")


def cgroup_pids(directory: Path) -> list[int]:
    """Host pids of all processes in a cgroup v2 directory and those below it, sorted.

    Processes that come or go meanwhile may or may not be in it, unless the group is frozen.
    """
    found: set[int] = set()
    pending = [directory]
    seen = 0
    while pending:
        group = pending.pop()
        seen += 1
        if seen > CGROUPS_MAX:
            raise LimitExceededError(f"{directory} has more than {CGROUPS_MAX} control groups")
        try:
            found.update(map(int, (group / "cgroup.procs").read_bytes().split()))
            pending.extend(path for path in group.iterdir() if path.is_dir())
        except OSError as error:
            # A group below may be removed at any time. In a threaded one the processes are
            # listed by its domain (cgroups(7)).
            vanished = error.errno in (errno.ENOENT, errno.ENODEV) and group != directory
            if not vanished and error.errno != errno.EOPNOTSUPP:
                raise CriuGlueError(f"{group}: {error.strerror}") from error
    if 0 in found:
        raise CriuGlueError(f"{directory} holds processes of another pid namespace")
    check_count(found, str(directory))
    return sorted(found)
