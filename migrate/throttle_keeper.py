"""Holds the brake of a container, or the whole container for moments, and lets go of it whenever
its coordinator has gone.

A process of its own (`python3 -m migrate.throttle_keeper SESSION`; the argument only says whose it
is). It says "done" when it has begun; then it reads lines and answers each with that, or with what
failed:

    {a BrakePlan}   slow the container as its last word says, if it has one (`brakes.py`)
    pause           let it run: the dirty tracker is about to look into its tasks
    still           within a pause: freeze it
    run             thaw it
    go on           as before the pause
    (end)           put everything back, and end

A coordinator that dies, however that is, ends the pipe. A keeper that dies ends it too, and then
the coordinator puts back what it has left (`throttle.py`). If both are killed at once, the recovery
of this host does (`recovery.py`). The keeper ends by nothing else: a signal that is meant for the
command may reach all of the group or unit that it was started in.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from criu_glue.oom import choose_another
from migrate import cgroup as freezer
from migrate.brakes import BrakePlan, brake_of, put_back

if TYPE_CHECKING:
    from migrate.brakes import Brake

DONE: Final = "done"
STILL_DEADLINE_S: Final = 3.0
"""Tasks are frozen in a millisecond, but for one that waits for a disk or a file server."""
LINE_BYTES_MAX: Final = 64 * 1024
"""A plan is a path and some numbers."""
_NICE: Final = -20


class Keeper:
    """One container's brake, from the first plan on."""

    def __init__(self) -> None:
        self._plan: BrakePlan | None = None
        self._brake: Brake | None = None

    def serve(self) -> None:
        """Do what the coordinator says until it has gone."""
        while True:
            due_s = self._brake.turn() if self._brake is not None else None
            if not select.select([0], [], [], due_s)[0]:
                continue
            # The next line is not sent before this one is answered: nothing is left in the buffer.
            line = sys.stdin.buffer.readline(LINE_BYTES_MAX)
            if not line.endswith(b"\n"):
                return
            os.write(1, self._answer(line).encode() + b"\n")

    def let_go(self) -> None:
        """Put everything back."""
        if self._plan is not None:
            put_back(self._plan)

    def _answer(self, line: bytes) -> str:
        try:
            if line in (b"still\n", b"run\n"):
                self._still(is_wanted=line == b"still\n")
            elif line in (b"pause\n", b"go on\n"):
                self._pause(is_wanted=line == b"pause\n")
            else:
                self._pull(msgspec.json.decode(line, type=BrakePlan))
        except OSError as error:
            return str(error)
        return DONE

    def _pull(self, plan: BrakePlan) -> None:
        self._plan = plan
        if not plan.words:
            return
        if self._brake is None:
            self._brake = brake_of(plan)
        self._brake.pull(plan.words[-1])

    def _pause(self, *, is_wanted: bool) -> None:
        if self._brake is None:
            return
        if is_wanted:
            self._brake.pause()
        else:
            self._brake.go_on()

    def _still(self, *, is_wanted: bool) -> None:
        assert self._plan is not None
        cgroup = Path(self._plan.cgroup)
        if is_wanted:
            freezer.freeze(cgroup, STILL_DEADLINE_S)
        else:
            freezer.thaw(cgroup)


def main() -> int:
    """Serve the coordinator to its end; 0."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # The container may use all processors, and others as well: a pulse must end in time.
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except OSError:
        with contextlib.suppress(OSError):
            os.nice(_NICE)
    choose_another()
    keeper = Keeper()
    try:
        # The container has ended, or the coordinator was killed with an answer unread.
        with contextlib.suppress(OSError):
            os.write(1, f"{DONE}\n".encode())
            keeper.serve()
    finally:
        keeper.let_go()
        # The coordinator takes the end of the connection for the end of this process.
        os.closerange(0, 2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
