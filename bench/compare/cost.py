"""What a move takes of the hosts: processor time and memory of all that is there but the container.

Processor time is that of the cgroup in which a lab host has all processes of its own (cgroup v2
counts it without a controller), so that nothing is missed which has ended. Memory is looked at from
outside, ten times a second: a peak that is over sooner is not seen. Files on tmpfs are memory too:
images and page stores are there.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

import msgspec

from bench.lab.sandbox import INIT_CGROUP

if TYPE_CHECKING:
    from types import TracebackType

    from bench.lab.host import Host

PERIOD_S: Final = 0.1
MIB: Final = 1 << 20
KIB: Final = 1 << 10
_ANONYMOUS: Final = re.compile(r"^RssAnon:\s+(\d+) kB$", re.MULTILINE)
_USAGE: Final = re.compile(r"^usage_usec (\d+)$", re.MULTILINE)


class Cost(msgspec.Struct, frozen=True):
    """Of one host, from the begin of a move to its end. memory_mib: anonymous memory of processes,
    files_mib: files on tmpfs below /run; both the most that was seen above what was there before.
    Pages that a fork shares count twice."""

    cpu_s: float
    memory_mib: float
    files_mib: float


class CostMeter:
    """Of some hosts, while it is entered as a context."""

    def __init__(self, *hosts: Host) -> None:
        self._hosts = hosts
        self._cpu_s = [cpu_s(host) for host in hosts]
        self._before = [_held_bytes(host) for host in hosts]
        self._most = list(self._before)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="cost", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def costs(self) -> dict[str, Cost]:
        """By host, so far."""
        costs = {}
        for at, host in enumerate(self._hosts):
            memory, files = (
                round((most - before) / MIB, 1)
                for most, before in zip(self._most[at], self._before[at], strict=True)
            )
            costs[host.name] = Cost(round(cpu_s(host) - self._cpu_s[at], 3), memory, files)
        return costs

    def _look(self) -> None:
        while not self._ended.wait(PERIOD_S):
            for at, host in enumerate(self._hosts):
                now, most = _held_bytes(host), self._most[at]
                self._most[at] = (max(now[0], most[0]), max(now[1], most[1]))


def cpu_s(host: Host) -> float:
    """Of the host's own processes, since it was started, those that have ended included."""
    found = _USAGE.search((host.cgroup / INIT_CGROUP / "cpu.stat").read_text())
    assert found is not None  # cgroup-v2.rst: exists whether a controller is enabled or not
    return int(found[1]) / 1e6


def _held_bytes(host: Host) -> tuple[int, int]:
    """(anonymous memory of the host's own processes, files on its tmpfs below /run)."""
    pids = (host.cgroup / INIT_CGROUP / "cgroup.procs").read_text().split()
    return sum(map(_anonymous_bytes, pids)), sum(map(_used_bytes, _tmpfs(host)))


def _anonymous_bytes(pid: str) -> int:
    try:
        found = _ANONYMOUS.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0  # it has ended
    return int(found[1]) * KIB if found else 0


def _tmpfs(host: Host) -> set[Path]:
    """Where one is mounted below the host's /run."""
    mounts = (line.split() for line in host.read_text("/proc/1/mounts").splitlines())
    return {
        host.path(where)
        for _, where, kind, *_ in mounts
        if kind == "tmpfs" and Path(where).is_relative_to("/run")
    }


def _used_bytes(mounted: Path) -> int:
    try:
        now = os.statvfs(mounted)
    except OSError:
        return 0  # no longer mounted
    return (now.f_blocks - now.f_bfree) * now.f_frsize
