"""Where a container's tasks execute, looked at all the time: never on two hosts at once.

A thread of the memory workload ticks a thousand times a second (its ticker, `memory.c`), and each
tick gives the processor up of its own accord. A task that is restored, held, frozen or dying does
so a few times at most. So a host executes the container in a window if one of its threads did so
more often than anything but its own code would make it. The processor's time does not tell: dying
and being restored cost it too.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from bench.lab.host import Host

PERIOD_S: Final = 0.03
TURNS_MIN_PER_S: Final = 300.0
"""A third of what the ticker does when the machine is idle, and several times the handful of
futexes in which CRIU has a task wait while it restores it."""
COMMAND: Final = "memory"
_STATUS: Final = re.compile(r"Name:\t(\S+)\n(?:.*\n)*?voluntary_ctxt_switches:\t(\d+)")


@dataclass(frozen=True)
class Window:
    """From when to when (monotonic), and on which hosts the container executed meanwhile."""

    begin_s: float
    end_s: float
    hosts: frozenset[str]


class Watch:
    """Looks until it is closed. For a `with` block."""

    def __init__(self, hosts: Sequence[Host], name: str) -> None:
        self._cgroups = {host.name: host.cgroup / "dolly" / name for host in hosts}
        self.windows: list[Window] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def executes_on(self) -> list[str]:
        """Of late. A busy machine may not let it execute in every single window."""
        latest = self.windows[-5:]
        return sorted(frozenset[str]().union(*(window.hosts for window in latest)))

    def twice(self) -> list[Window]:
        """The windows in which it executed on two hosts: there must be none."""
        return [window for window in self.windows if len(window.hosts) > 1]

    def idle_s(self, since_s: float) -> float:
        """The longest time after `since_s` in which it executed nowhere."""
        longest, begin = 0.0, since_s
        for window in self.windows:
            if window.end_s < since_s:
                continue
            if window.hosts:
                begin = window.end_s
            longest = max(longest, window.end_s - begin)
        return longest

    def _look(self) -> None:
        before_s, before = time.monotonic(), self._turns()
        while not self._stop.wait(PERIOD_S):
            now_s, now = time.monotonic(), self._turns()
            least = TURNS_MIN_PER_S * (now_s - before_s)
            executing = frozenset(
                host
                for host, turns in now.items()
                if any(
                    turns[thread] - before[host][thread] >= least
                    for thread in turns.keys() & before[host].keys()
                )
            )
            self.windows.append(Window(before_s, now_s, executing))
            before_s, before = now_s, now

    def _turns(self) -> dict[str, dict[int, int]]:
        return {host: _turns(cgroup) for host, cgroup in self._cgroups.items()}


def _turns(cgroup: Path) -> dict[int, int]:
    """How often each of the workload's threads has given the processor up."""
    turns: dict[int, int] = {}
    # A cgroup that goes away meanwhile answers ENODEV, a thread ESRCH.
    with contextlib.suppress(OSError):
        for thread in (cgroup / "cgroup.threads").read_text().split():
            with contextlib.suppress(OSError):
                found = _STATUS.search(Path(f"/proc/{thread}/status").read_text())
                if found is not None and found[1] == COMMAND:
                    turns[int(thread)] = int(found[2])
    return turns
