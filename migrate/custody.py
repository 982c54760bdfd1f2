"""The tasks of a container while CRIU dumps them: kept as they were, whoever dies.

    keep     in the guard, tasks frozen: they are written down and shielded, CRIU is watched
    (dump)   CRIU alters tasks and puts them back; if it dies instead, they freeze as they are
    (clean)  the images, of what only the shield has put there: `unshielding.py`
    mend     whoever undoes the dump: coordinator, guard, or a recovery from outside

The record is a file in the hold's directory, on the session's tmpfs. It may be put back as long as
the tasks have executed nothing since, which is as long as their cgroup is frozen: CRIU thaws it
only while it holds them all by ptrace, and from then on it is frozen by CRIU's hook, by its orderly
undo, or by who watches it in the moment that it dies. Where nobody watched, as after the end of
guard and CRIU at once, it is not frozen: tasks have run on, and are left as they are.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

import structlog

from criu_glue import custody, deathwatch
from criu_glue.mappings import cgroup_pids
from criu_glue.mending import mend as mend_tasks
from migrate import cgroup as freezer
from migrate.processes import waited

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger()

RECORD = "custody"
"""In the hold's directory."""
FREEZE_DEADLINE_S = 5.0
ALONE_DEADLINE_S = 10.0
"""Mending takes milliseconds a task; whoever needs this long for it hangs."""


def keep(hold: Path, cgroup: Path, criu: int) -> None:
    """Write down the tasks of a frozen cgroup, and have them freeze when their CRIU ends, which has
    not begun. Raises CriuGlueError, TimeoutError."""
    custody.record(cgroup_pids(cgroup), hold / RECORD, lambda: freezer.thawed(cgroup))
    watch(cgroup, criu)
    # All that it did to them was done in the kernel, but CRIU is to find them at rest.
    freezer.freeze(cgroup, FREEZE_DEADLINE_S)


def watch(cgroup: Path, criu: int) -> None:
    """Have the tasks freeze when CRIU ends, however it ends, before it lets go of them. Raises
    TaskBusyError (another process watches it), TaskGoneError."""
    deathwatch.watch(criu, lambda: freezer.refreeze(cgroup))


def mend(hold: Path, cgroup: Path) -> None:
    """Give the tasks back what a CRIU that has ended left altered. Blocking, idempotent.

    Raises CriuGlueError, OSError: the cgroup stays frozen, and it can be tried again.
    """
    written = hold / RECORD
    alone = _lock(hold)
    if alone is None:
        return
    try:
        if freezer.is_frozen(cgroup):
            mended = mend_tasks(custody.read(written), lambda: freezer.thawed(cgroup))
            if mended.failed:
                log.warning("left in tasks", cgroup=str(cgroup), what=mended.failed)
        # From the thaw on it would be false.
        written.unlink(missing_ok=True)
    finally:
        os.close(alone)


def _lock(hold: Path) -> int | None:
    """The guard and a recovery may undo the same dump at once: the second finds it undone, None
    where even the directory is gone. The lock ends with its process. Raises TimeoutError."""

    def is_ours() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    try:
        descriptor = os.open(hold, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if not waited(is_ours, ALONE_DEADLINE_S):
        os.close(descriptor)
        raise TimeoutError(f"another process mends the tasks of {hold} and does not end")
    return descriptor
