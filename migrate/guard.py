"""The guard: thaws the source's container when its coordinator dies before the commit.

A process of its own (`python3 -m migrate.guard`), started before anything is frozen. It reads a
line, a GuardPlan, and then waits on the same pipe: "disarm" ends it, the end of the pipe means
that the coordinator is dead. Then the journal says whose the container is. Committed: it is the
target's, so it stays held here until an operator decides. Anything else: CRIU is told to abort, and
when the runtime has ended, the container is thawed and plugged in again.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from pathlib import Path

import msgspec

from criu_glue.hooks import abort_from_outside
from migrate import cgroup
from migrate.errors import JournalError
from migrate.journal import Journal
from migrate.network import plug
from migrate.processes import is_alive

# CRIU undoes a dump in milliseconds; a runtime that has not ended after this hangs, and a container
# that runs beside a hung CRIU is still better than one that stays frozen.
ABORT_DEADLINE_S = 60.0
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


def main() -> int:
    """Wait for the coordinator's end; 0 when it ended well or the container was given back."""
    line = sys.stdin.buffer.readline()
    if not line:
        # The coordinator died before it had told us anything: before it froze anything.
        return 0
    plan = msgspec.json.decode(line, type=GuardPlan)
    # A coordinator that is dead already does not read it.
    with contextlib.suppress(ConnectionError):
        os.write(1, b"armed\n")
    if sys.stdin.buffer.readline() == b"disarm\n":
        return 0
    while True:
        try:
            is_theirs = is_committed(plan)
        except JournalError:
            # Nobody may thaw what may be another host's; the disk, or whoever is in the way, will
            # let it be read some time.
            select.select([], [], [], JOURNAL_PAUSE_S)
        else:
            break
    if not is_theirs:
        give_back(plan)
    return 0


def is_committed(plan: GuardPlan) -> bool:
    """Whether the journal says that the container belongs to the target."""
    with Journal.open_read_only(Path(plan.journal)) as journal:
        return journal.is_committed(plan.migration_id)


def give_back(plan: GuardPlan) -> None:
    """Undo the freeze: CRIU aborts, the cgroup thaws, the port is plugged in."""
    directory = Path(plan.hold_directory)
    limit_s = time.monotonic() + ABORT_DEADLINE_S
    while time.monotonic() < limit_s:
        # CRIU may be held still when its runtime is dead already.
        told = abort_from_outside(directory)
        if not told and not (is_alive(plan.runtime_pid) and directory.exists()):
            break
        select.select([], [], [], _STEP_MS / 1000)
    cgroup.thaw(Path(plan.cgroup))
    for port, bridge in plan.ports:
        # A container that ended meanwhile may have taken its port with it.
        if Path("/sys/class/net", port).exists():
            plug(port, bridge)


if __name__ == "__main__":
    sys.exit(main())
