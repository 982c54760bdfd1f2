"""Answers a CRIU that is held when nobody else does: by the journal, and only where it is clear.

CRIU's hook starts it when a hold lasts (`criu_glue/hooks.py`), and ends it with the hold:

    python3 -m migrate.holder JOURNAL CLAIM MIGRATION ROLE HOLD_DIRECTORY

As long as somebody has the claim of the migration it only waits. Once nobody has: on the source a
dump that was not committed is undone, and one whose copy runs on the target may end; on the target
a committed copy may run, and one that was given up is killed. What only the two journals together,
or an operator, can decide stays held.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from criu_glue import hooks
from migrate import cgroup
from migrate.claim import claimant
from migrate.core.table import Verdict
from migrate.errors import JournalError
from migrate.journal import Journal
from migrate.processes import module_command

if TYPE_CHECKING:
    from migrate.config import HostPaths
    from migrate.journal import Role

PAUSE_S = 1.0
_MOVE = 'echo $$ > "$0"; exec "$@"'
_WORDS: dict[Verdict, hooks.Verdict] = {Verdict.UNDO: "abort", Verdict.LET_GO: "commit"}


def main() -> int:
    """Wait and decide; 0 when the hook has been told, 1 when none waits any more."""
    journal, claim, migration_id, role, directory = sys.argv[1:]
    while hooks.is_held(Path(directory)):
        word = decision(Path(journal), Path(claim), migration_id, cast("Role", role))
        if word is not None and hooks.say(Path(directory), word):
            return 0
        time.sleep(PAUSE_S)
    return 1


def command(
    paths: HostPaths, migration_id: str, role: Role, hold_directory: Path
) -> tuple[str, ...]:
    """The command line of the holder of one CRIU. It moves to the cgroup of this process: CRIU is
    in the container's when it restores, and there it would take the container's memory."""
    claim = paths.claim(migration_id, role)
    given = (str(paths.journal), str(claim), migration_id, role, str(hold_directory))
    return (
        *("sh", "-c", _MOVE, str(cgroup.own() / "cgroup.procs")),
        *module_command("migrate.holder", *given),
    )


def decision(journal: Path, claim: Path, migration_id: str, role: Role) -> hooks.Verdict | None:
    """What the hook is to be told; None when that is not for this process to say."""
    if claimant(claim) is not None:
        return None
    try:
        with Journal.open_read_only(journal) as opened:
            verdict = opened.verdict(migration_id, role)
    except JournalError:
        # A full disk, a lock: it will be readable some time. A damaged one is for the operator.
        return None
    return _WORDS.get(verdict)


if __name__ == "__main__":
    sys.exit(main())
