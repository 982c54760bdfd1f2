"""The states of both sides of a migration, as they are spelled in the journal and on the wire.

Only names: what leads from one to the other is in `source_machine.py` and `target_machine.py`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class SourceState(StrEnum):
    """Where a migration stands on the host that the container runs on before."""

    NEW = "new"
    PREFLIGHT = "preflight"  # both sides are looked at, nothing is touched
    PRECOPY = "precopy"  # session, root file system, memory in rounds; the container runs
    PREPARING = "preparing"  # the target starts its restore up to its gate; the container runs
    FROZEN = "frozen"  # unplugged, cgroup frozen, CRIU dumps
    SENDING_FINAL = "sending_final"  # dumped and held; the rest of memory and the images travel
    RESTORING = "restoring"  # the target restores
    HELD = "held"  # the target holds a restored copy; the commit is being recorded
    COMMITTED = "committed"  # the journal says: the target's; held frozen here until it runs there
    IN_DOUBT = "in_doubt"  # committed, and the target's answer is unknown
    RELEASING = "releasing"  # it runs on the target; the frozen tree here is let die
    DONE = "done"
    LOST = "lost"  # this host went down before the commit: what the target holds is all there is
    ROLLING_BACK = "rolling_back"  # being undone
    ABORTED = "aborted"  # the container runs here, as before


class TargetState(StrEnum):
    """Where a session stands on the host that the container runs on after."""

    OPEN = "open"  # asked for; identity, policy and resources are being checked
    RECEIVING = "receiving"  # pages and files arrive
    PREPARED = "prepared"  # the restore waits at its gate
    RESTORING = "restoring"  # CRIU restores
    HELD = "held"  # restored, held before its first instruction; waits for COMMIT
    IN_DOUBT = "in_doubt"  # held, and the source cannot be heard: asks it
    COMMITTED = "committed"  # COMMIT is in the journal; being resumed
    RUNNING = "running"  # tasks run, the pager fills
    DONE = "done"
    ABORTING = "aborting"  # the copy is being killed and everything wiped
    ABORTED = "aborted"  # nothing is left here


SOURCE_TERMINAL: Final = frozenset({SourceState.DONE, SourceState.ABORTED})
TARGET_TERMINAL: Final = frozenset({TargetState.DONE, TargetState.ABORTED})
