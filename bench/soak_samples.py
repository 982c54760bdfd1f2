"""What a lab host and its agent take up at one moment, read from the host's files and /proc.

Reads only; knows of the agent its pid file, its ports and its directories, nothing else.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bench.lab import agents
from bench.lab.errors import LabError
from migrate.config import CONTROL_PORT, DATA_PORT, HostPaths

if TYPE_CHECKING:
    from pathlib import Path

    from bench.lab.host import Host

SETTLED_S: Final = 30.0
"""A session is wiped within milliseconds of its last message."""
POLL_S: Final = 0.02
BLOCK_BYTES: Final = 512
"""The unit of st_blocks (stat(2)), whatever the file system's own is."""
# The states of proc_net_tcp(5) in which a socket has no owner to leak: TIME_WAIT and LISTEN.
_IDLE_SOCKETS: Final = frozenset({"06", "0A"})
_PATHS: Final = HostPaths()


@dataclass(frozen=True, slots=True)
class Sample:
    """One host at one moment. Disk is what files occupy, not how long they are.

    agent_*: of the agent's process. journal_kib: with its write-ahead log. state_kib, run_kib: all
    of /var/lib/migrate and /run/migrate. log_kib: what the agent has written to standard error.
    The rest is counted over the whole host: netns by name.
    """

    agent_rss_kib: int
    agent_uss_kib: int
    agent_threads: int
    agent_descriptors: int
    journal_kib: int
    state_kib: int
    run_kib: int
    log_kib: int
    processes: int
    mounts: int
    netns: int
    cgroups: int


def sample(host: Host) -> Sample:
    """Measure a host that is settled."""
    agent = host.path(f"/proc/{agent_pid(host)}")
    memory = (agent / "smaps_rollup").read_text()
    threads = re.search(r"^Threads:\s+(\d+)", (agent / "status").read_text(), re.MULTILINE)
    assert threads is not None
    journal = host.path(_PATHS.journal)
    return Sample(
        agent_rss_kib=_kib(memory, "Rss"),
        agent_uss_kib=_kib(memory, "Private_Clean") + _kib(memory, "Private_Dirty"),
        agent_threads=int(threads[1]),
        agent_descriptors=_entries(agent / "fd"),
        journal_kib=sum(_disk_kib(path) for path in journal.parent.glob(f"{journal.name}*")),
        state_kib=_disk_kib(host.path(_PATHS.state)),
        run_kib=_disk_kib(host.path(_PATHS.run)),
        log_kib=_disk_kib(host.path(agents.LOG)),
        processes=sum(path.name.isdecimal() for path in host.path("/proc").iterdir()),
        mounts=len(host.read_text("/proc/1/mounts").splitlines()),
        netns=_entries(host.path("/run/netns")),
        cgroups=sum(path.is_dir() for path in host.path("/sys/fs/cgroup").rglob("*")),
    )


def agent_pid(host: Host) -> int:
    """Of the host's agent, inside the host."""
    return int(host.read_text(agents.PID_FILE))


def wait_settled(host: Host) -> None:
    """Returns when no session is there and nobody is connected to the agent. Raises LabError."""
    until_s = time.monotonic() + SETTLED_S
    while True:
        sessions = host.path(_PATHS.run / "sessions")
        left = [path.name for path in sessions.iterdir()] if sessions.is_dir() else []
        if not left and not _connections(host):
            return
        if time.monotonic() > until_s:
            raise LabError(
                f"{host.name} is not settled after {SETTLED_S:g} s: sessions {left},"
                f" {_connections(host)} connections to its agent"
            )
        time.sleep(POLL_S)


def _connections(host: Host) -> int:
    """Sockets of the agent's ports that are more than listening."""
    ports = {f"{port:04X}" for port in (CONTROL_PORT, DATA_PORT)}
    found = 0
    for table in ("tcp", "tcp6"):
        for line in host.read_text(f"/proc/1/net/{table}").splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            found += local.rpartition(":")[2] in ports and state not in _IDLE_SOCKETS
    return found


def _kib(rollup: str, name: str) -> int:
    """A value of /proc/PID/smaps_rollup."""
    match = re.search(rf"^{name}:\s+(\d+) kB", rollup, re.MULTILINE)
    assert match is not None, rollup
    return int(match[1])


def _entries(directory: Path) -> int:
    return sum(1 for _ in directory.iterdir()) if directory.is_dir() else 0


def _disk_kib(path: Path) -> int:
    """What a file, or everything below a directory, occupies."""
    if not path.exists():
        return 0
    found = [path, *path.rglob("*")] if path.is_dir() else [path]
    return sum(one.lstat().st_blocks for one in found) * BLOCK_BYTES // 1024
