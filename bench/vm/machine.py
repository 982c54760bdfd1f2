"""Starts one virtual machine as a host of a lab; the keeper's side of it.

    keeper ──fork──> QEMU       in the wire's network namespace and a mount namespace of its own;
       │                        its pid is the host's
       ├─fork──> ssh            master: all commands travel in its one connection (STATE/ssh)
       └─fork──> sshfs          the machine's files, at STATE/root in QEMU's mount namespace

All three are in the host's cgroup and die with the keeper (PR_SET_PDEATHSIG). QEMU starts from the
image's saved memory, so a machine is up when its SSH answers; it has no name then, no address and
the wrong time. Only the keeper's thread forks, so what runs between fork and exec may.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.lab import kernel
from bench.lab.errors import LabError
from bench.lab.host_files import PATH_INSIDE, SOURCE_INSIDE
from bench.lab.plan import Node
from bench.vm import console, image, qemu

# From saved memory it takes 3 s on an idle machine, and every command some hundred milliseconds.
UP_DEADLINE_S = 120.0
COMMAND_DEADLINE_S = 180.0
POLL_S = 0.1
# The management link's ends, the same for all machines: each has a link of its own.
HERE = "fe80::1"
THERE = "fe80::2"
# Relative to a machine's directory in the lab's state.
DISK = "memory"
CONSOLE = "console"
CONTROL = "ssh"
FILES = "root"
# Where each session is one group of the scheduler (sched(7): the autogroup feature), a nice value
# means nothing to other sessions, and QEMU gets no more than any of them. A machine has deadlines
# to keep: this gives it some ten times the weight of a session that nobody has preferred.
AUTOGROUP = Path("/proc/self/autogroup")
AUTOGROUP_NICE = -10
# On the client, which has the same Python: the source and its byte code, tar on standard output,
# compressed: an emulated processor unpacks faster than it decrypts.
# What is imported is compiled, with all that it imports: a Python that looks for byte code in
# a place of its own finds no other there, and under emulation compiling takes minutes.
PACK_SOURCE = f"""\
set -e
export PYTHONPATH={SOURCE_INSIDE} PYTHONPYCACHEPREFIX=/var/cache/migrate/pyc
cd {SOURCE_INSIDE}
set -- migrate transport criu_glue bench tests
python3 -m compileall -q "$@" >&2
python3 -c '
import importlib, pkgutil
for package in ("migrate", "transport", "criu_glue"):
    for module in pkgutil.walk_packages([package], package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
' >&2
cd /
tar -c --zstd --exclude=tests/fuzz --exclude=__pycache__ \
    var/cache/migrate $(for part; do echo {SOURCE_INSIDE.lstrip("/")}/$part; done)
"""
# No cipher is needed on a link that leads nowhere, but there is no way to have none: the cheapest.
_SSH_SETTINGS = {
    "LogLevel": "ERROR",
    "BatchMode": "yes",
    "ConnectTimeout": "5",
    "StrictHostKeyChecking": "no",
    "UserKnownHostsFile": "/dev/null",
    "Ciphers": "aes128-gcm@openssh.com",
}
SSH = ("ssh", "-F", "none", *(f"-o{name}={value}" for name, value in _SSH_SETTINGS.items()))
# The kernel may keep no attribute: files change on the machine's side. direct_io: files of /proc
# have no size, and are read nevertheless.
SSHFS_OPTIONS = "direct_io,dir_cache=no,attr_timeout=0,entry_timeout=0"


@dataclass(slots=True)
class Machine:
    """A machine on its way up, or up."""

    node: Node
    state: Path
    cgroup: Path
    qemu: subprocess.Popen[bytes]
    helpers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def init_pid(self) -> int:
        """Of QEMU: below it this machine sees the other's files (`files_path`)."""
        return self.qemu.pid

    def wait_ready(self) -> None:
        """Returns when the machine takes commands and its files are seen; LabError if not."""
        deadline_s = time.monotonic() + UP_DEADLINE_S
        key = str(image.path() / "key")
        master = [*SSH, "-MN", "-i", key, "-S", str(self.state / CONTROL)]
        address = f"root@{THERE}%{self.node.management}"
        connection = self._help([*master, address])
        while not (self.state / CONTROL).exists():
            if connection.poll() is not None:  # nobody has answered yet
                connection = self._help([*master, address])
            self._check(deadline_s, "its SSH does not answer")
            time.sleep(POLL_S)
        through = " ".join(ssh_command(self.state))
        mount_point = str(self.state / FILES)
        sshfs = ["sshfs", "-f", "-o", f"{SSHFS_OPTIONS},ssh_command={through}", "machine:/"]
        in_mounts = ["nsenter", "-t", str(self.init_pid), "-m", "--"]
        self._help([*in_mounts, *sshfs, mount_point])
        while not files_path(self.init_pid, self.state, "/etc").is_dir():
            self._check(deadline_s, "its files are not seen")
            time.sleep(POLL_S)

    def become(self, upper: Path) -> None:
        """Gives it a host's name, files and time."""
        packed = subprocess.run(
            ["tar", "-C", str(upper), "-cf", "-", "."], capture_output=True, check=True
        )
        become = ["/usr/local/sbin/machine-become", self.node.name, f"{time.time():.3f}"]
        self._run(become, packed.stdout)

    def unpack(self, archive: bytes) -> None:
        """Files of an archive (tar, zstd), below /."""
        self._run(["tar", "-C", "/", "--zstd", "--no-overwrite-dir", "-xf", "-"], archive)

    def in_network(self, command: Sequence[str]) -> list[str]:
        """The command line that runs a tool of networks inside."""
        return [*ssh_command(self.state), "machine", *command]

    def end(self) -> None:
        """Ends it as a power failure would."""
        for process in [self.qemu, *self.helpers]:
            process.kill()
            process.wait()

    def _run(self, command: Sequence[str], given: bytes) -> None:
        line = [*ssh_command(self.state), "machine", *command]
        try:
            subprocess.run(
                line, input=given, capture_output=True, check=True, timeout=COMMAND_DEADLINE_S
            )
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace")
            raise LabError(f"machine {self.node.name}: {command[0]}: {said}") from error
        except subprocess.TimeoutExpired as error:
            raise LabError(f"machine {self.node.name}: {command[0]} hangs") from error

    def _help(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        helper = _start(command, self.cgroup, kernel.die_with_parent)
        self.helpers.append(helper)
        return helper

    def _check(self, deadline_s: float, what: str) -> None:
        printed = (self.state / CONSOLE).read_text(errors="replace")
        if ill := console.faults(printed):
            raise LabError(f"machine {self.node.name}: its kernel failed: {ill}")
        if self.qemu.poll() is not None or time.monotonic() > deadline_s:
            raise LabError(f"machine {self.node.name}: {what}: {printed[-2000:]}")


def start(node: Node, state: Path, cgroup: Path) -> Machine:
    """Starts QEMU with a copy of the saved machine; its links exist (`link_lines`)."""
    disk = state / DISK
    if disk.exists():
        raise LabError(f"machine {node.name} was off: what is saved is another one's memory")
    cgroup.mkdir(parents=True)
    (state / FILES).mkdir()
    saved = image.path()
    # Not a copy of the file system: that lies below, and nobody writes to it.
    shutil.copyfile(saved / DISK, disk)
    wiring = qemu.Wiring(saved, disk, state / CONSOLE, node.wire_end, node.management)
    (state / CONSOLE).touch()
    command = qemu.command(wiring, "-loadvm", qemu.SNAPSHOT)
    return Machine(node, state, cgroup, _start(command, cgroup, _before_qemu))


def link_lines(node: Node) -> list[str]:
    """For `ip -batch` in the wire, before the start: both links."""
    return [
        f"tuntap add dev {node.wire_end} mode tap",
        f"tuntap add dev {node.management} mode tap",
        f"link set {node.management} addrgenmode none up",
        f"address add {HERE}/64 dev {node.management} nodad",
    ]


def ssh_command(state: Path) -> list[str]:
    """The start of a command line that runs a command on the machine, through its master."""
    return [*SSH, "-S", str(state / CONTROL)]


def files_path(pid: int, state: Path, inside: str) -> Path:
    """Where this machine sees a file of the other, which QEMU `pid` runs."""
    return Path(f"/proc/{pid}/root{state}") / FILES / inside.lstrip("/")


def _start(
    command: Sequence[str], cgroup: Path, prepare: Callable[[], None]
) -> subprocess.Popen[bytes]:
    def before_exec() -> None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))
        prepare()

    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={"PATH": PATH_INSIDE, "HOME": "/nonexistent"},
        start_new_session=True,
        preexec_fn=before_exec,  # noqa: PLW1509 - the keeper has one thread
    )


def _before_qemu() -> None:
    kernel.die_with_parent()
    if AUTOGROUP.exists():
        AUTOGROUP.write_text(str(AUTOGROUP_NICE))
    kernel.unshare(kernel.CLONE_NEWNS)
    kernel.mount("", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
