"""Who a container waits for gets a processor before all others (sched(7)).

While a container stands still a dozen processes work for it in turn, and its page faults are
answered by one more. On a host that is busy, as one is that is to be emptied, each of them waits
for a processor at every turn, for some ms. Real-time scheduling ends that: these are few, they
sleep most of the time, and nothing is done by them that does not end soon. Niceness would not do:
it counts among the processes of one session or one cgroup only (sched(7), "autogroup").

A kernel that gives a cgroup no real-time share (CONFIG_RT_GROUP_SCHED) refuses. It is as it was
then: nothing depends on this but time.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from criu_glue.errors import CriuGlueError
from criu_glue.mappings import cgroup_pids

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

TRACER: Final = 3
"""The priority of a thread that CRIU waits for at each of its signals (`deathwatch.py`)."""
STANDSTILL: Final = 2
"""That of those that the container can't run before."""
FILL: Final = 1
"""That of the pager, whose background fill must not be in their way."""
TIMER_SLACK_NS: Final = 50_000
"""The kernel's own (`init/init_task.c`), which each task inherits."""


class Urgency:
    """Of this process and of `others`, asked for each time, as long as a block `with` it is entered
    by anybody; what they start meanwhile is not urgent. In one event loop. There is to be one of a
    process."""

    def __init__(self, others: Callable[[], Sequence[int]] = tuple) -> None:
        self._others = others
        self._entered = 0

    def __enter__(self) -> None:
        self._entered += 1
        for pid in (os.getpid(), *self._others()):
            make_urgent(pid, STANDSTILL, inherited=False)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            for pid in (os.getpid(), *self._others()):
                make_normal(pid)


def make_urgent(pid: int, priority: int, *, inherited: bool) -> None:
    """All threads of a process, and what they start from now on where that is `inherited`. Never
    raises: it may have ended."""
    _schedule(pid, os.SCHED_RR if inherited else os.SCHED_RR | os.SCHED_RESET_ON_FORK, priority)


def make_normal(pid: int) -> None:
    """All threads of a process: what they do now is waited for by nobody. Never raises."""
    _schedule(pid, os.SCHED_OTHER, 0)


def give_timers_slack(group: Path) -> None:
    """Let the timers of restored tasks, of the cgroup at `group`, have the slack that every task
    begins with. CRIU gives them their own scheduling again (`criu/pie/restorer.c:
    restore_sched_info`) but knows no slack, and since Linux 6.12 children of an urgent CRIU inherit
    none (`kernel/sched/syscalls.c: __setscheduler_params`). Never raises."""
    with contextlib.suppress(CriuGlueError):
        for thread in (thread for pid in cgroup_pids(group) for thread in _threads(pid)):
            slack = Path("/proc", str(thread), "timerslack_ns")
            with contextlib.suppress(OSError):
                if slack.read_text().strip() == "0":
                    slack.write_text(str(TIMER_SLACK_NS))


def _schedule(pid: int, policy: int, priority: int) -> None:
    for thread in _threads(pid):
        with contextlib.suppress(OSError):
            os.sched_setscheduler(thread, policy, os.sched_param(priority))


def _threads(pid: int) -> list[int]:
    try:
        return [int(thread.name) for thread in Path("/proc", str(pid), "task").iterdir()]
    except OSError:
        return []
