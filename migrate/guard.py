"""The guard: thaws the source's container when its coordinator dies before the commit.

A process of its own (`python3 -m migrate.guard`), started before anything is frozen. It reads a
line, a GuardPlan, and then waits on the same pipe:

    keep      the tasks are frozen and CRIU waits at its gate: they are taken into custody
              (`custody.py`), and from then on no death of CRIU costs them anything. Answers "kept"
    disarm    it ends
    (end)     the coordinator is dead

At the end of the pipe the journal says whose the container is. Committed: it is the target's, so it
stays held here until an operator decides. Anything else: CRIU is told to abort, and when the
runtime has ended, the container is mended, thawed and plugged in again.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import sys
import time
from pathlib import Path

import msgspec
import psutil

from criu_glue.errors import CriuGlueError
from criu_glue.hooks import abort_from_outside, criu_pid, has_criu_died
from criu_glue.no_core import forbid_cores
from criu_glue.oom import choose_another
from migrate import cgroup, custody, tcp_repair
from migrate.core.table import Verdict
from migrate.errors import JournalError
from migrate.grace_periods import put_back_left
from migrate.journal import Journal
from migrate.port import plug
from migrate.processes import is_alive, kill_tree, running

# CRIU undoes a dump in milliseconds; one that has not ended after this hangs, and is killed. The
# container stands still as long.
ABORT_DEADLINE_S = 10.0
# A runtime ends with its CRIU, unless a child of that still has the connection.
CRIU_DIED_DEADLINE_S = 2.0
JOURNAL_PAUSE_S = 1.0
_STEP_MS = 20


class GuardPlan(msgspec.Struct, frozen=True):
    """What the guard needs to know to give the container back to its users."""

    migration_id: str
    journal: str
    hold_directory: str
    runtime_pid: int
    cgroup: str
    ports: tuple[tuple[str, str], ...]
    run: str


def main() -> int:
    """Wait for the coordinator's end; 0 when it ended well or the container was given back."""
    forbid_cores()
    line = sys.stdin.buffer.readline()
    if not line:
        # The coordinator died before it had told us anything: before it froze anything.
        return 0
    plan = msgspec.json.decode(line, type=GuardPlan)
    choose_another()
    if _serve(plan):
        return 0
    put_back_left(Path(plan.run))
    while True:
        try:
            verdict = read_verdict(plan)
        except JournalError:
            # Nobody may thaw what may be another host's; the disk, or whoever is in the way, will
            # let it be read some time.
            select.select([], [], [], JOURNAL_PAUSE_S)
        else:
            break
    if verdict is Verdict.UNDO:
        give_back(plan)
    return 0


def _serve(plan: GuardPlan) -> bool:
    """Do what the coordinator says; whether it said "disarm" before it ended."""
    # A coordinator that is dead does not read our word; one that is killed with a word unread
    # resets the connection.
    with contextlib.suppress(ConnectionError):
        os.write(1, b"armed\n")
        for line in sys.stdin.buffer:
            if line == b"disarm\n":
                return True
            if line == b"keep\n":
                os.write(1, _keep(plan).encode() + b"\n")
    return False


def _keep(plan: GuardPlan) -> str:
    """The answer: "kept", or why not."""
    hold = Path(plan.hold_directory)
    criu = criu_pid(hold)
    if criu is None:
        return "CRIU has ended"
    try:
        custody.keep(hold, Path(plan.cgroup), criu)
    except (CriuGlueError, OSError) as error:
        return str(error)
    return "kept"


def read_verdict(plan: GuardPlan) -> Verdict:
    """What the journal says of the frozen container. Raises JournalError."""
    with Journal.open_read_only(Path(plan.journal)) as journal:
        return journal.verdict(plan.migration_id, "source")


def end_criu(hold_directory: Path, runtime_pid: int, cgroup: Path) -> None:
    """Have CRIU undo its dump; returns when it and its runtime have ended. Blocking, idempotent.

    The tasks must not be thawed before: CRIU leaves their cgroup as it found it, which is frozen.
    """
    limit_s = time.monotonic() + ABORT_DEADLINE_S
    while True:
        told, pids = abort_from_outside(hold_directory), busy(hold_directory, runtime_pid)
        if not told and not pids:
            break
        now_s = time.monotonic()
        if has_criu_died(hold_directory):
            limit_s = min(limit_s, now_s + CRIU_DIED_DEADLINE_S)
        if now_s > limit_s:
            _kill(hold_directory, pids, cgroup)
            break
        select.select([], [], [], _STEP_MS / 1000)
    _kill_orphans(hold_directory)


def _kill(hold_directory: Path, pids: list[int], cgroup: Path) -> None:
    """Kill what hangs; returns when CRIU has ended."""
    criu = criu_pid(hold_directory)
    if criu is not None:
        # The guard watches it already, if there is one.
        with contextlib.suppress(CriuGlueError):
            custody.watch(cgroup, criu)
    for pid in pids:
        kill_tree(pid)
    limit_s = time.monotonic() + CRIU_DIED_DEADLINE_S
    while criu is not None and criu_pid(hold_directory) is not None:
        if time.monotonic() > limit_s:
            _kill_watcher(criu)
        select.select([], [], [], _STEP_MS / 1000)


def _kill_watcher(criu: int) -> None:
    """A guard that hangs: what it traces waits for it, and can't even die."""
    with contextlib.suppress(OSError):
        tracer = re.search(r"TracerPid:\s*(\d+)", Path(f"/proc/{criu}/status").read_text())
        if tracer is not None and int(tracer[1]) not in (0, os.getpid()):
            os.kill(int(tracer[1]), signal.SIGKILL)


def _kill_orphans(hold_directory: Path) -> None:
    """Children of a CRIU that was killed: they have its environment, and its connection."""
    ours = str(hold_directory / "criu.conf")
    for process, _ in running():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("CRIU_CONFIG_FILE") == ours:
                process.kill()


def busy(hold_directory: Path, runtime_pid: int) -> list[int]:
    """The processes of a dump; CRIU may be held still when its runtime is dead already."""
    pids = [runtime_pid] if hold_directory.exists() and is_alive(runtime_pid) else []
    criu = criu_pid(hold_directory)
    return pids if criu is None else [*pids, criu]


def give_back(plan: GuardPlan) -> None:
    """Undo the freeze: CRIU aborts, the cgroup thaws, the port is plugged in.

    Raises CriuGlueError, OSError: the tasks could not be mended, and are frozen.
    """
    frozen = Path(plan.cgroup)
    end_criu(Path(plan.hold_directory), plan.runtime_pid, frozen)
    custody.mend(Path(plan.hold_directory), frozen)
    tcp_repair.leave(frozen)
    cgroup.thaw(frozen)
    for port, bridge in plan.ports:
        # A container that ended meanwhile may have taken its port with it.
        if Path("/sys/class/net", port).exists():
            plug(port, bridge)


if __name__ == "__main__":
    sys.exit(main())
