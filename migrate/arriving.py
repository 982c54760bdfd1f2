"""Containers that came to this host and have not got all of their memory yet.

What is missing is nowhere but in a page store here, and CRIU knows nothing of it: it would dump
such memory as if it had never been there. So nobody may move or copy such a container. Mostly this
lasts for seconds; for a copy that gets what it needs and nothing else it lasts until it is told to
be filled. Blocking.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from criu_glue import pager_watch
from criu_glue.pager_state import PagerState, PagerStateError, Phase
from migrate.errors import MigrateError, UsageError
from migrate.refusals import Refusal
from migrate.standing import reading

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from migrate.config import HostPaths

# Who moves a container on as soon as it has come meets the end of its fill.
_PATIENCE_S: Final = 10.0
_STEP_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Arriving:
    """A container whose pager has not brought everything. on_demand: nor is it going to."""

    work: Path
    on_demand: bool

    @property
    def missing_bytes(self) -> int:
        """What has not come, as far as is known; 0 when all has."""
        try:
            state = PagerState.read(self.work)
        except PagerStateError:
            # With the session.
            return 0
        return 0 if state.phase is Phase.DONE else max(state.missing_bytes, 1)


def find(paths: HostPaths, container: str) -> Arriving | None:
    """None for a container that is complete, or never came. Raises JournalError."""
    with reading(paths) as journal:
        unfinished = journal.unfinished() if journal else []
    for one, _ in unfinished:
        if one.role == "target" and one.container == container:
            work = paths.session(one.migration_id, "target") / "work"
            arriving = Arriving(work, bool(one.facts.get("on_demand")))
            if arriving.missing_bytes:
                return arriving
    return None


def refusals(paths: HostPaths, container: str) -> list[Refusal]:
    """Why the container may not be dumped; waits a while for what is about to end."""
    limit_s = time.monotonic() + _PATIENCE_S
    while (arriving := find(paths, container)) is not None:
        if arriving.on_demand or time.monotonic() > limit_s:
            text = f"{arriving.missing_bytes >> 20} MiB of its memory have not been brought in yet"
            return [Refusal("memory-missing", text, f"migrate fill {container}")]
        time.sleep(_STEP_S)
    return []


def fill(paths: HostPaths, container: str, tell: Callable[[int], None]) -> None:
    """Have everything brought in that is missing, and return when it is there; `tell` hears what
    is left, in bytes. Raises UsageError, MigrateError when it fails."""
    arriving = find(paths, container)
    if arriving is None:
        raise UsageError(f"{container} lacks no memory that has been left on this host")
    pager_watch.fill(arriving.work)
    while missing_bytes := arriving.missing_bytes:
        tell(missing_bytes)
        if error := _error(arriving.work):
            raise MigrateError(f"the memory of {container} can't be brought in: {error}")
        time.sleep(_STEP_S)


def _error(work: Path) -> str:
    try:
        return PagerState.read(work).error
    except PagerStateError:
        return ""
