"""The moves of a drain on the host that has the container: each is a `migrate` of its own.

It runs in a session of its own and outlives whoever began it. How far it is can be told by anybody
later: while its process runs it moves, then the journal of this host says what became of it.

    STATE/drain/ID.json   its report        STATE/drain/ID.log   what it says
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from migrate import config, told_rate
from migrate.claim import claimant
from migrate.core.states import SourceState
from migrate.errors import MigrateError
from migrate.processes import Outliving, module_command, running, tail
from migrate.report import read_report
from migrate.standing import reading
from transport import sealed_files

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migrate.config import HostPaths
    from migrate.core.messages import MoveState

_LOG_BYTES_MAX: Final = 4096
_WHY_CHARS_MAX: Final = 500


def bandwidth_options(mib_s: float | None) -> list[str]:
    """Of a command that may send so much a second."""
    return [] if mib_s is None else ["--bandwidth", f"{mib_s:g}"]


class Look(NamedTuple):
    """What a move is at. why: of one that has not arrived. copied_s: what it took to copy all of
    its memory once, 0 if that is not known."""

    state: MoveState
    why: str = ""
    downtime_ms: float | None = None
    copied_s: float = 0.0


class Moves:
    """Begins moves of this host's containers, and tells of any that was begun here."""

    def __init__(self, paths: HostPaths) -> None:
        self._paths = paths
        self._processes: dict[str, Outliving] = {}
        self._ended_s: dict[str, float] = {}

    def begin(
        self,
        migration_id: str,
        container: str,
        target: str,
        mib_s: float | None,
        options: Sequence[str] = (),
    ) -> None:
        """mib_s: what it may send each second until `look` says otherwise. Blocking, for
        milliseconds. Raises OSError."""
        sealed_files.make_directory(self._paths.drain)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        log = os.open(self._paths.drain / f"{migration_id}.log", flags, 0o600)
        report = self._paths.drain / f"{migration_id}.json"
        named = ["--to", target, "--id", migration_id, "--report", str(report)]
        named += bandwidth_options(mib_s)
        if mib_s is not None:
            named += ["--bandwidth-told", str(self._paths.rate(migration_id))]
        try:
            self._processes[migration_id] = Outliving(
                module_command("migrate", "container", container, *named, *options), stderr=log
            )
        finally:
            os.close(log)

    def look(self, migration_id: str, mib_s: float | None = None) -> Look:
        """How far it is. mib_s: what it may send each second from now on, None for as before.
        Blocking. Raises JournalError."""
        rate = self._paths.rate(migration_id)
        if self._runs(migration_id):
            if mib_s is not None:
                # What can't be told leaves it as it was.
                with contextlib.suppress(OSError):
                    told_rate.tell(rate, mib_s)
            return Look("moving")
        rate.unlink(missing_ok=True)
        with reading(self._paths) as journal:
            state = None if journal is None else journal.state(migration_id, "source")
        match state:
            case SourceState.DONE:
                return self._arrived(migration_id)
            case None | SourceState.ABORTED:
                return Look("undone", self._why(migration_id))
        # The agent of this host goes on with what its command has left.
        ended_s = self._ended_s.setdefault(migration_id, time.monotonic())
        if time.monotonic() - ended_s < config.UNDO_DEADLINE_S:
            return Look("moving")
        return Look("held", f"it is {state}: migrate status {migration_id}")

    def _runs(self, migration_id: str) -> bool:
        process = self._processes.get(migration_id)
        if process is not None:
            return process.returncode is None
        if claimant(self._paths.claim(migration_id, "source")) is not None:
            return True
        # One that was begun by a process that is dead may not have got as far as its claim.
        return any(migration_id in one.words for one in running())

    def _arrived(self, migration_id: str) -> Look:
        """With what its report tells, if there is one."""
        with contextlib.suppress(MigrateError):
            report = read_report(self._paths.drain / f"{migration_id}.json")
            copied_ms = report.rounds[0].duration_ms if report.rounds else 0.0
            return Look("arrived", downtime_ms=report.downtime_ms, copied_s=copied_ms / 1000)
        return Look("arrived")

    def _why(self, migration_id: str) -> str:
        """Its refusals or its message; nothing of a process that said nothing."""
        lines = tail(self._paths.drain / f"{migration_id}.log", _LOG_BYTES_MAX).splitlines()
        refusals = [line.strip(" -") for line in lines if line.startswith("  - ")]
        said = [line for line in lines if line and not line.startswith((" ", "timestamp="))]
        return ("; ".join(refusals) or (said[0] if said else "it ended"))[:_WHY_CHARS_MAX]
