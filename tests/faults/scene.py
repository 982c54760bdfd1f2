"""Two hosts and one container that moves back and forth between them, point after point.

    with Scene() as scene:
        outcome = run(scene, point)      # trial.py; the container is on either host afterwards

Whichever host the container is on is the source of the next migration. Agents and `migrate` run in
`halting.py`, so that they can be stopped at a moment.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bench.containers import ContainerSpec, create, start
from bench.lab import agents
from bench.lab.host import Host
from bench.lab.host_files import BYTECODE_INSIDE, PATH_INSIDE, SOURCE_INSIDE
from bench.lab.lab import Lab
from tests.faults import halting
from tests.faults.points import Moment, Side
from tests.lab.migrating import Resident
from tests.lab.waiting import wait_until

PROGRAMS: Final = "/usr/local/faults"
ENVIRONMENT: Final = {"PATH": f"{PROGRAMS}:{PATH_INSIDE}"}
"""Of everything that starts `migrate` in a lab host: it is the one that can be stopped."""
HALTING: Final = f"""\
#!/bin/sh
export PYTHONPATH={SOURCE_INSIDE} PYTHONPYCACHEPREFIX={BYTECODE_INSIDE}
exec /usr/bin/python3 -m tests.faults.halting "$@"
"""
_TRACER: Final = re.compile(r"TracerPid:\t(\d+)")
SPEC: Final = ContainerSpec("guest", "memory", args=("8",), memory_mib=16, address6=None)


class Scene:
    """See the module. A scene in which a point has failed is not used again."""

    def __init__(self) -> None:
        self.lab = Lab(["A", "B"])
        self.guest = Resident(self.lab, SPEC, None)
        self._here = "A"

    def __enter__(self) -> Self:
        self.lab.start()
        try:
            for host in self.lab.hosts:
                host.write_text(f"{PROGRAMS}/migrate", HALTING, 0o755)
                for directory in (halting.ARMED, halting.REACHED):
                    host.path(directory).mkdir(parents=True)
                agents.launch(host, ENVIRONMENT)
            create(self.source, SPEC)
            start(self.source, SPEC.name)
            for host in self.lab.hosts:
                agents.wait_listening(host)
        except BaseException:
            self.lab.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.lab.close()

    @property
    def source(self) -> Host:
        """Where the container is."""
        return self.lab.host(self._here)

    @property
    def target(self) -> Host:
        """The other one."""
        return self.lab.host("B" if self._here == "A" else "A")

    def is_now_on(self, host: Host) -> None:
        """The container has been found there."""
        self._here = host.name

    def host_of(self, side: Side) -> Host:
        """The host of one side of the next migration."""
        return self.source if side == "source" else self.target

    # ---- stops ----

    def arm(self, at: Moment) -> None:
        """The next process that comes to this moment stops there."""
        self._marks(at)[0].touch()

    def wait_reached(self, at: Moment, deadline_s: float) -> None:
        """Returns when a process stands at an armed moment."""
        wait_until(f"{at} is reached", self._marks(at)[1].exists, deadline_s=deadline_s)

    def let_go(self, at: Moment) -> None:
        """The process that stands there goes on, if it is still alive."""
        self._marks(at)[1].unlink(missing_ok=True)

    def disarm(self, at: Moment) -> None:
        """Nobody stops there any more, and who did goes on. Idempotent."""
        for mark in self._marks(at):
            mark.unlink(missing_ok=True)

    def _marks(self, at: Moment) -> list[Path]:
        host = self.host_of(at.side)
        return [host.path(directory / str(at)) for directory in (halting.ARMED, halting.REACHED)]

    # ---- agents and the link ----

    def start_agent(self, host: Host) -> None:
        """Starts an agent that has been killed."""
        self.lab.start_agent(host.name, ENVIRONMENT)

    def set_link(self, *, up: bool) -> None:
        """Whether the hosts hear each other; the client hears both all the time."""
        self.lab.set_isolated([host.name for host in self.lab.hosts], isolated=not up)


def descriptors(host: Host) -> list[int]:
    """How many descriptors each task of the container has open on a host."""
    tasks = (host.cgroup / "dolly" / SPEC.name / "cgroup.procs").read_text().split()
    counts = []
    for task in tasks:
        # Of a restore that was killed some may be about to end.
        with contextlib.suppress(FileNotFoundError):
            counts.append(len(list(Path(f"/proc/{task}/fd").iterdir())))
    return sorted(counts)


def tracers(host: Host) -> set[str]:
    """Who traces threads of the container there; "0" is nobody."""
    threads = (host.cgroup / "dolly" / SPEC.name / "cgroup.threads").read_text().split()
    statuses = (Path(f"/proc/{thread}/status").read_text() for thread in threads)
    return {found[1] for status in statuses if (found := _TRACER.search(status))}
