"""The interface of a way to move a container from lab host A to B, and what all ways share."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from bench import containers
from bench.containers import ContainerSpec, bundle_path, host_device

if TYPE_CHECKING:
    from bench.lab.host import Host
    from bench.lab.lab import Lab

NAME: Final = "sheep"
ADDRESS: Final = "10.77.0.50/24"
MOVE_DEADLINE_S: Final = 600.0
WORK: Final = "/run/compare"
"""Of a move by hand, on both hosts: a tmpfs, as ours uses one."""
LISTENING_S: Final = 60.0
END_S: Final = 30.0
POLL_S: Final = 0.02
SSH: Final = "ssh -oBatchMode=yes -oCompression=no"
PLUG: Final = f"ip link set {host_device(NAME)} master br0"
UNPLUG: Final = f"ip link set {host_device(NAME)} nomaster"


class MoveError(Exception):
    """A container could not be moved this way; what the tools said."""


class ImpossibleError(Exception):
    """This way can't be gone on this machine at all, and why."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A lab with hosts A and B, and the container that is to be moved."""

    lab: Lab
    spec: ContainerSpec

    @property
    def source(self) -> Host:
        """Where it runs."""
        return self.lab.host("A")

    @property
    def target(self) -> Host:
        """Where it is moved to."""
        return self.lab.host("B")


@dataclass(frozen=True, slots=True)
class Moved:
    """What a move says of itself. parts_ms: its steps by name, in order; `facts`: all else."""

    total_ms: float
    parts_ms: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class System(Protocol):
    """A way to move a container. Each call raises MoveError, LabError or ContainerError."""

    name: str
    """In tables and plots."""
    needs_podman: bool

    def start(self, scene: Scene) -> None:
        """Run the container on A; returns when it listens."""

    def move(self, scene: Scene) -> Moved:
        """Move it; returns when the system says that it is done. Raises ImpossibleError."""

    def remove(self, scene: Scene) -> None:
        """End the container, wherever it is, and whatever was made for it. Idempotent."""


def run_marked(host: Host, script: str) -> dict[str, float]:
    """Run a shell script that says `mark NAME` between its steps; how long each took, in ms, by the
    mark that ended it. Raises MoveError with what it said."""
    done = host.run(["sh", "-c", _PRELUDE + script], check=False, timeout_s=MOVE_DEADLINE_S)
    if done.returncode != 0:
        raise MoveError(f"{done.stdout[-1000:]}{done.stderr[-3000:]}")
    marks = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("mark ")]
    times_ms = [int(at_ns) / 1e6 for _, at_ns in marks]
    names = [name for name, _ in marks]
    return {
        name: round(after - before, 1)
        for name, before, after in zip(names[1:], times_ms, times_ms[1:], strict=False)
    }


def move_by_script(scene: Scene, script: str) -> Moved:
    """Move it by a script on A; returns when it listens on B. Raises MoveError."""
    parts = run_marked(scene.source, script)
    wait_listening(scene.target, scene.spec)
    return Moved(sum(parts.values()), parts)


def remove_container(host: Host, name: str) -> None:
    """As `containers.remove`, and its cgroup, which tasks of much memory leave late."""
    containers.remove(host, name)
    until_s = time.monotonic() + END_S
    cgroup = host.path(f"/sys/fs/cgroup/dolly/{name}")
    while cgroup.exists():
        with contextlib.suppress(OSError):
            cgroup.rmdir()
            return
        if time.monotonic() > until_s:
            raise MoveError(f"tasks of {name} on {host.name} do not end within {END_S:g} s")
        time.sleep(POLL_S)


def wait_listening(host: Host, spec: ContainerSpec) -> None:
    """Returns when the container's server listens in its network namespace. Raises MoveError."""
    command = ["ip", "netns", "exec", spec.name, "ss", "-Hltn", "sport", "=", f":{spec.port}"]
    until_s = time.monotonic() + LISTENING_S
    while not host.run(command).stdout.strip():
        if time.monotonic() > until_s:
            raise MoveError(f"{spec.name} on {host.name} does not listen after {LISTENING_S:g} s")
        time.sleep(POLL_S)


def rootfs(name: str) -> str:
    """Inside the host."""
    return f"{bundle_path(name)}/rootfs"


# The neighbours' tables and the bridges learn at once where the address is now: who moves a
# container by hand does that, or waits for minutes.
ANNOUNCE: Final = "ip netns exec {name} arping -q -c 1 -A -I eth0 {ip}"

_PRELUDE: Final = """\
set -eu
mark() { echo "mark $1 $(date +%s%N)"; }
"""
