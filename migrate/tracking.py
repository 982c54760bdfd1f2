"""Which dirty tracker a migration uses, and why.

    write-protect   userfaultfd and PAGEMAP_SCAN, Linux >= 6.7: no stop, no memory of this host
    soft-dirty      the kernel's bits, CONFIG_MEM_SOFT_DIRTY: the container stands still in each
                    round while its page tables are read
    predump         CRIU's own rounds, by the same bits: the tasks stop in each, and this host keeps
                    what the round sends
    none            all memory is copied while the container stands still

The kernel is tried, not asked for its version. Without the user's word it is the first that works,
predump aside: a CRIU that is killed in a round of it may take the container along (decision 0022).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from criu_glue.mappings import cgroup_pids
from criu_glue.page_sources import TaskSource
from criu_glue.trackers import predump, soft_dirty, write_protect
from criu_glue.trackers.stop_and_copy import StopAndCopyTracker
from migrate import config
from migrate.errors import MigrateError
from migrate.facts import free_memory_bytes
from migrate.pre_dumping import PreDump

if TYPE_CHECKING:
    from pathlib import Path

    from criu_glue.page_sources import PageSource
    from migrate.facts import ContainerFacts
    from migrate.options import Options
    from migrate.runtimes.base import Runtime
    from migrate.throttle import Throttle

NONE: Final = StopAndCopyTracker.name
_WRITE_PROTECT: Final = write_protect.WriteProtectTracker.name
_SOFT_DIRTY: Final = soft_dirty.SoftDirtyTracker.name
_PREDUMP: Final = predump.PredumpSource.name

_REMEDIES: Final = {
    _WRITE_PROTECT: "a kernel of 6.7 or newer, or --tracker auto",
    _SOFT_DIRTY: "a kernel with CONFIG_MEM_SOFT_DIRTY, or --tracker auto",
    _PREDUMP: "a kernel with CONFIG_MEM_SOFT_DIRTY and enough free memory, or --tracker auto",
}

_WARNINGS: Final = {
    _PREDUMP: "each round of predump stops the container for a moment, and a CRIU that is killed in"
    " that moment may take it along; memory that a program moves (mremap) over what was sent before"
    " may arrive as it was, since CRIU goes by soft-dirty bits alone; --tracker soft-dirty has"
    " neither",
}


@dataclass(frozen=True, slots=True)
class Choice:
    """A tracker's name, why it is this one, and what the user should hear of it, if anything."""

    name: str
    reason: str
    warning: str = ""

    @property
    def stills(self) -> bool:
        """Whether it has the container stand still by somebody else."""
        return self.name == _SOFT_DIRTY


def choose(options: Options, facts: ContainerFacts, host: str) -> Choice:
    """The tracker that the user named, or the best that works here. Blocking; raises MigrateError
    when the one that was named does not."""
    if options.tracker == NONE:
        return _stop_and_copy("no tracker is wanted")
    if options.tracker == "auto":
        return _best(facts)
    why_not = _why_not(options.tracker, facts)
    if why_not is not None:
        raise MigrateError(
            f"the tracker {options.tracker} does not work here: {why_not}",
            host=host,
            remedy=_REMEDIES[options.tracker],
        )
    return Choice(options.tracker, "it was asked for", _WARNINGS.get(options.tracker, ""))


def _best(facts: ContainerFacts) -> Choice:
    why_not = _why_not(_WRITE_PROTECT, facts)
    if why_not is None:
        return Choice(_WRITE_PROTECT, "it works here, and costs least")
    reason = f"{_WRITE_PROTECT} does not work here ({why_not})"
    why_not = _why_not(_SOFT_DIRTY, facts)
    if why_not is None:
        return Choice(_SOFT_DIRTY, reason)
    return _stop_and_copy(f"{reason}, nor does {_SOFT_DIRTY} ({why_not})")


def page_source(
    choice: Choice,
    facts: ContainerFacts,
    runtime: Runtime,
    session: Path,
    throttle: Throttle,
) -> PageSource:
    """What the chosen tracker reports, to be read; below `session` there is room for a round, and
    `throttle` has the container stand still, or hears that it has."""
    pids = partial(cgroup_pids, facts.container.cgroup)
    if choice.name == _PREDUMP:
        run = PreDump(facts.container, runtime, session / "predump-work", throttle.stills_ms.append)
        return predump.PredumpSource(session / "predump", run)
    if choice.name == _SOFT_DIRTY:
        return TaskSource(soft_dirty.SoftDirtyTracker(pids, throttle.stilled))
    if choice.name == _WRITE_PROTECT:
        return TaskSource(write_protect.WriteProtectTracker(pids))
    return TaskSource(StopAndCopyTracker(pids))


def _stop_and_copy(reason: str) -> Choice:
    warning = f"{reason}: the container stands still while all of its memory is copied"
    return Choice(NONE, reason, warning)


def _why_not(name: str, facts: ContainerFacts) -> str | None:
    if name == _WRITE_PROTECT:
        return write_protect.supported()
    if name == _PREDUMP:
        needed, free = facts.memory_bytes + config.SESSION_RESERVE_BYTES, free_memory_bytes()
        if needed > free:
            return f"a round may take {needed >> 20} MiB of memory, {free >> 20} are free"
    return soft_dirty.supported()
