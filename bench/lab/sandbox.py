"""Starts one lab host: its namespaces, its mounts, its pid 1.

    keeper ──fork──> shim   joins the host's cgroup, leaves every namespace but the pid one,
                      │     waits; ends with the keeper (PR_SET_PDEATHSIG)
                      └fork> pid 1 of the host: mounts, pivot_root, then catatonit, which reaps;
                            ends with the shim, and every process of the host ends with it

The mounts live in the host's own mount namespace only, so nothing shows in the machine's table
and nothing can be left behind. Runs in a freshly forked child of a single-threaded process: the
code between fork and exec only makes system calls and reports an error through a pipe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.lab import kernel
from bench.lab.errors import LabError
from bench.lab.host_files import BYTECODE_INSIDE, PATH_INSIDE, SOURCE_INSIDE
from bench.lab.remains import GRACE_PERIODS

NAMESPACES = (
    kernel.CLONE_NEWNS
    | kernel.CLONE_NEWUTS
    | kernel.CLONE_NEWIPC
    | kernel.CLONE_NEWPID
    | kernel.CLONE_NEWNET
    | kernel.CLONE_NEWCGROUP
)
# The processes of a host sit in a leaf, so that controllers can be enabled below the host's root
# cgroup where the machine has them (no internal processes: cgroups(7)).
INIT_CGROUP = "init.scope"
# Directories on the machine's disk and not on the overlay: overlays of containers cannot be
# stacked on one, and the journal should meet a plain file system.
DISK_DIRECTORIES = ("/var/lib/migrate", "/var/lib/containers")
# name, mode, major, minor: Documentation/admin-guide/devices.txt
DEVICES = (
    ("null", 0o666, 1, 3),
    ("zero", 0o666, 1, 5),
    ("full", 0o666, 1, 7),
    ("random", 0o666, 1, 8),
    ("urandom", 0o666, 1, 9),
    ("tty", 0o666, 5, 0),
    ("fuse", 0o666, 10, 229),
    ("net/tun", 0o666, 10, 200),
)
# Settings of the machine that no namespace separates: visible, not writable.
READ_ONLY = ("/proc/sys/fs", "/proc/sys/vm", "/proc/sysrq-trigger")
WHOLE_SYSFS = "/var/lib/sysfs"
PID_1 = ("/usr/bin/catatonit", "-P")


@dataclass(frozen=True, slots=True)
class HostSpec:
    """What a host is made of; all paths are of the machine."""

    name: str
    root: Path  # the common root, read-only for the host
    state: Path  # upper/ (filled), work/, disk/, mount point root/
    cgroup: Path
    source: Path  # of this project
    bytecode: Path  # of that source, and of the root


@dataclass(frozen=True, slots=True)
class Started:
    """A host on its way up: `ready_fd` ends when its pid 1 runs, or brings the error first."""

    name: str
    shim_pid: int
    init_pid: int
    init_fd: int  # pidfd of pid 1
    ready_fd: int

    def wait_ready(self) -> None:
        """Returns when the host's pid 1 runs; LabError with the reason when it will not."""
        reason = _last_words(self.ready_fd)
        if reason:
            raise LabError(f"host {self.name} did not start: {reason}")

    def in_network(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a tool of this machine in the host's network."""
        return ["nsenter", "-t", str(self.init_pid), "-n", "--", *command]

    def end(self) -> None:
        """Ends a host: its pid 1, with it every process inside, then the shim."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.init_fd, signal.SIGKILL)
        os.close(self.init_fd)
        # The shim waits for pid 1, which is reaped when all others inside have been.
        os.waitpid(self.shim_pid, 0)


def start(spec: HostSpec) -> Started:
    """Forks a host; its network namespace exists when this returns, the rest is being made."""
    (spec.cgroup / INIT_CGROUP).mkdir(parents=True)
    for directory in ("work", "root", *(f"disk{inside}" for inside in DISK_DIRECTORIES)):
        (spec.state / directory).mkdir(parents=True, exist_ok=True)
    pid_read, pid_write = os.pipe()
    ready_read, ready_write = os.pipe()
    shim_pid = os.fork()
    if shim_pid == 0:
        _keep_only(pid_write, ready_write)
        _run_shim(spec, pid_write, ready_write)
    os.close(pid_write)
    os.close(ready_write)
    with os.fdopen(pid_read, "rb") as pipe:
        reported = pipe.read()
    if not reported:
        raise LabError(f"host {spec.name}: {_last_words(ready_read)}")
    init_pid = int(reported)
    try:
        init_fd = os.pidfd_open(init_pid)
    except ProcessLookupError:
        raise LabError(f"host {spec.name} did not start: {_last_words(ready_read)}") from None
    return Started(spec.name, shim_pid, init_pid, init_fd, ready_read)


def _last_words(ready_fd: int) -> str:
    """Why a host's first processes ended; empty when its pid 1 runs."""
    with os.fdopen(ready_fd, "rb") as pipe:
        return pipe.read().decode(errors="replace")


def _keep_only(*descriptors: int) -> None:
    """Closes what was inherited: locks, pipes and sockets of the keeper are none of the host's."""
    null = os.open("/dev/null", os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    low = 3
    for descriptor in sorted(descriptors):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))


def _run_shim(spec: HostSpec, pid_fd: int, ready_fd: int) -> None:
    try:
        kernel.die_with_parent()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        (spec.cgroup / "cgroup.procs").write_text(str(os.getpid()))
        kernel.unshare(NAMESPACES)
        (spec.cgroup / INIT_CGROUP / "cgroup.procs").write_text(str(os.getpid()))
        pid = os.fork()
        if pid == 0:
            os.close(pid_fd)
            kernel.die_with_parent()
            _boot(spec)
            os.set_inheritable(ready_fd, False)
            os.execve(PID_1[0], PID_1, {"PATH": PATH_INSIDE})
        os.close(ready_fd)
        os.write(pid_fd, str(pid).encode())
        os.close(pid_fd)
        os.waitpid(pid, 0)
    except BaseException as error:  # noqa: BLE001 - the process ends here, with its reason in the pipe
        os.write(ready_fd, f"{type(error).__name__}: {error}".encode())
        os._exit(1)
    os._exit(0)


def _boot(spec: HostSpec) -> None:
    os.setsid()
    os.umask(0o022)
    root = str(spec.state / "root")
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    layers = f"lowerdir={spec.root},upperdir={spec.state / 'upper'},workdir={spec.state / 'work'}"
    kernel.mount("overlay", root, "overlay", data=layers)
    for inside in DISK_DIRECTORIES:
        os.makedirs(root + inside, exist_ok=True)
        kernel.mount(str(spec.state / "disk") + inside, root + inside, flags=kernel.MS_BIND)
    _bind_read_only(str(spec.source), root + SOURCE_INSIDE)
    # Written by any host: Python replaces a file of byte code at once, and looks whether it is the
    # source's.
    os.makedirs(root + BYTECODE_INSIDE, exist_ok=True)
    kernel.mount(str(spec.bytecode), root + BYTECODE_INSIDE, flags=kernel.MS_BIND)
    _mount_kernel_views(root)
    _make_devices(root + "/dev")
    kernel.mount("tmpfs", root + "/run", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755")
    kernel.mount("tmpfs", root + "/tmp", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
    for directory in ("lock", "netns", "sshd"):
        os.mkdir(f"{root}/run/{directory}", 0o755)
    os.chdir(root)
    kernel.pivot_root(".", ".")
    # The old root now lies over the new one and goes away with everything below it.
    kernel.umount(".", kernel.MNT_DETACH)
    os.chdir("/")
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_SHARED)
    kernel.set_hostname(spec.name)


def _mount_kernel_views(root: str) -> None:
    restricted = kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC
    kernel.mount("proc", root + "/proc", "proc", restricted)
    for path in READ_ONLY:
        if os.path.exists(root + path):  # not every kernel has each
            _bind_read_only(root + path, root + path)
    kernel.mount("sysfs", root + "/sys", "sysfs", restricted | kernel.MS_RDONLY)
    if GRACE_PERIODS.exists():
        # The machine's own, for there is one kernel; put back with the lab. A user namespace may
        # mount a sysfs only where there is one that nothing is mounted upon (fs/namespace.c:
        # mnt_already_visible).
        kernel.mount(str(GRACE_PERIODS), f"{root}{GRACE_PERIODS}", flags=kernel.MS_BIND)
        os.makedirs(root + WHOLE_SYSFS, exist_ok=True)
        kernel.mount("sysfs", root + WHOLE_SYSFS, "sysfs", restricted | kernel.MS_RDONLY)
    kernel.mount("cgroup2", root + "/sys/fs/cgroup", "cgroup2", restricted)


def _bind_read_only(source: str, target: str) -> None:
    kernel.mount(source, target, flags=kernel.MS_BIND)
    kernel.mount("", target, flags=kernel.MS_BIND | kernel.MS_REMOUNT | kernel.MS_RDONLY)


def _make_devices(dev: str) -> None:
    kernel.mount("tmpfs", dev, "tmpfs", kernel.MS_NOSUID, "mode=755")
    for directory in ("net", "pts", "shm", "mqueue"):
        os.mkdir(f"{dev}/{directory}", 0o755)
    for name, mode, major, minor in DEVICES:
        _make_device(f"{dev}/{name}", mode, os.makedev(major, minor))
    # Its minor number is given out when the machine starts.
    if os.path.exists("/dev/userfaultfd"):
        _make_device(f"{dev}/userfaultfd", 0o600, os.stat("/dev/userfaultfd").st_rdev)
    kernel.mount("devpts", f"{dev}/pts", "devpts", data="newinstance,ptmxmode=0666,mode=620,gid=5")
    kernel.mount("tmpfs", f"{dev}/shm", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=1777")
    kernel.mount("mqueue", f"{dev}/mqueue", "mqueue")
    for link, target in (
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ):
        os.symlink(target, f"{dev}/{link}")


def _make_device(path: str, mode: int, device: int) -> None:
    os.mknod(path, stat.S_IFCHR | mode, device)
    os.chmod(path, mode)  # mknod(2) subtracts the umask
