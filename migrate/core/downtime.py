"""The downtime of one migration, taken apart into what it was spent on.

It runs from the moment the source's network is unplugged (from there on no client reaches the
container) to the moment its tasks run on the target. The first part, `freeze`, lasts until the last
task stands still; what follows is the downtime in the narrow sense, tasks standing on both sides.

    source  unplug    frozen         dumped   final_acked  rootfs_done
              |-freeze--|----dump------|-final_delta-|--rootfs--|
    target                                                      |--restore--|-handover-|-resume-|
                                                               held      commit     resumed

Dump, final delta and root file system begin together when all tasks are frozen and run at once.
Each instant counts once, for the first of them in this order that is not over: `final_delta` is the
time from the dump's end until the last frame was acknowledged, `rootfs` the time after both; either
is 0 if it was not the last to end. `restore` runs from the end of all three until the target holds
the copy, and contains the sending of image files and of the request. So the parts always sum to the
whole.

Marks are monotonic times in microseconds, the first five by the source's clock, the others by the
target's. Where the two meet, an order that is wrong by no more than the relation's error is the
clocks' doing: the part is 0 then. Any other wrong order raises.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from migrate.core.clock_relation import ClockRelation


class MarksError(ValueError):
    """Marks are missing, or in an order that cannot be."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Named instants in µs; see the module. final_acked and rootfs_done are None where a migration
    had none of that to do."""

    unplug: int
    frozen: int
    dumped: int
    held: int
    commit: int
    resumed: int
    final_acked: int | None = None
    rootfs_done: int | None = None

    @classmethod
    def from_names(cls, source: Mapping[str, int], target: Mapping[str, int]) -> Marks:
        """From what either side has noted; other names are ignored. Raises MarksError."""
        names = {"held": target, "commit": target, "resumed": target}
        found = {
            field.name: names.get(field.name, source)[field.name]
            for field in fields(cls)
            if field.name in names.get(field.name, source)
        }
        try:
            return cls(**found)
        except TypeError as error:
            raise MarksError(f"marks are missing: {error}") from error


@dataclass(frozen=True, slots=True)
class DowntimeParts:
    """The parts in µs, in their order. Their sum is the whole."""

    freeze_us: int
    dump_us: int
    final_delta_us: int
    rootfs_us: int
    restore_us: int
    handover_us: int
    resume_us: int

    @property
    def downtime_us(self) -> int:
        """From unplugged to running again."""
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def stopped_us(self) -> int:
        """From the last task's last instruction on the source to the first on the target."""
        return self.downtime_us - self.freeze_us

    def as_ms(self) -> dict[str, float]:
        """Name without unit -> milliseconds, for the report."""
        return {
            field.name.removesuffix("_us"): getattr(self, field.name) / 1000
            for field in fields(self)
        }


def downtime_parts(marks: Marks, clocks: ClockRelation) -> DowntimeParts:
    """Take the downtime apart. Raises MarksError for an order that cannot be."""
    _in_order(unplug=marks.unplug, frozen=marks.frozen, dumped=marks.dumped)
    _in_order(held=marks.held, commit=marks.commit, resumed=marks.resumed)
    final_acked = marks.dumped if marks.final_acked is None else marks.final_acked
    rootfs_done = marks.dumped if marks.rootfs_done is None else marks.rootfs_done
    _in_order(frozen=marks.frozen, final_acked=final_acked)
    _in_order(frozen=marks.frozen, rootfs_done=rootfs_done)
    sent = max(marks.dumped, final_acked)
    ready = max(sent, rootfs_done)
    # Nothing that the target does can move the end: all its parts are taken from its own clock.
    held = clocks.to_source(marks.held)
    if held < ready - clocks.error_us:
        raise MarksError(
            f"the target held the copy {ready - held} µs before the source had sent everything"
            f" (the clocks are known to {clocks.error_us} µs)"
        )
    return DowntimeParts(
        freeze_us=marks.frozen - marks.unplug,
        dump_us=marks.dumped - marks.frozen,
        final_delta_us=sent - marks.dumped,
        rootfs_us=ready - sent,
        restore_us=max(held - ready, 0),
        handover_us=marks.commit - marks.held,
        resume_us=marks.resumed - marks.commit,
    )


def _in_order(**marks: int) -> None:
    """Raise MarksError unless the marks do not go back in time in the order they are given."""
    (before, earlier), *rest = marks.items()
    for name, instant in rest:
        if instant < earlier:
            raise MarksError(f"{name} is {earlier - instant} µs before {before}")
        before, earlier = name, instant
