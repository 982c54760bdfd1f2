"""What a tracker has to see on a kernel that notes soft-dirty pages: scenes with a puppet, for the
tests here where the kernel does, and for a machine whose kernel does. Needs no pytest."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from criu_glue.trackers import write_protect
from criu_glue.trackers.page_entries import read_pieces, written_runs
from criu_glue.trackers.soft_dirty import SoftDirtyTracker
from criu_glue.trackers.write_protect import WriteProtectTracker
from tests.criu_glue.puppets import (
    ARENA,
    PAGE,
    READ_WRITE,
    Puppet,
    Stage,
    pages_in,
    state,
)

PAGES: Final = 1024
# What one page table has.
TABLE_PAGES: Final = 512


class Still:
    """Puppets stand still by themselves, when they wait for a command. Counts."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.times = 0

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.times += 1
        for puppet in self.stage.puppets:
            if Path(f"/proc/{puppet.pid}").exists() and state(puppet.pid) != "Z":
                puppet.settle()
        yield


def tracker_of(stage: Stage, still: Still) -> SoftDirtyTracker:
    """Of all puppets of the stage."""
    return SoftDirtyTracker(lambda: [puppet.pid for puppet in stage.puppets], still)


def reported(tracker: SoftDirtyTracker, pid: int, *, last: bool = False) -> list[int]:
    """The pages of a puppet's arena in the next report, by their numbers."""
    for task in tracker.collect(last=last):
        if task.pid == pid:
            return pages_in(task.runs, ARENA, 4 * PAGES)
    raise AssertionError(f"{pid} is not reported")


def exactly_what_was_written(puppet: Puppet, tracker: SoftDirtyTracker) -> None:
    puppet.do("map", ARENA, PAGES, READ_WRITE)
    puppet.do("write", ARENA, PAGES, 1)
    assert len(reported(tracker, puppet.pid)) == PAGES
    assert reported(tracker, puppet.pid) == []
    puppet.do("write", ARENA + 5 * PAGE, 2, 9)
    puppet.do("touch", ARENA + 100 * PAGE, 50)
    assert reported(tracker, puppet.pid) == [5, 6]
    assert reported(tracker, puppet.pid) == []


def moved_over_what_was_sent(puppet: Puppet, tracker: SoftDirtyTracker) -> None:
    """The kernel moves a whole page table, and marks nothing in it."""
    there = ARENA + 2 * TABLE_PAGES * PAGE
    for at in (ARENA, there):
        puppet.do("map", at, TABLE_PAGES, READ_WRITE)
        puppet.do("write", at, TABLE_PAGES, at)
    reported(tracker, puppet.pid)
    reported(tracker, puppet.pid)
    puppet.do("unmap", ARENA, TABLE_PAGES)
    puppet.do("remap", there, TABLE_PAGES, TABLE_PAGES, ARENA)
    assert reported(tracker, puppet.pid) == list(range(TABLE_PAGES))


def another_program(puppet: Puppet, tracker: SoftDirtyTracker) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    reported(tracker, puppet.pid)
    puppet.exec()
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA + 2 * PAGE, 3, 1)
    assert reported(tracker, puppet.pid) == [2, 3, 4]


def bits_beside_write_protection(puppet: Puppet, tracker: SoftDirtyTracker) -> None:
    """The other tracker has all bits cleared, for CRIU to see what was written since, and again
    when that is much."""
    if write_protect.supported() is not None:
        # Linux before 6.7, where it is not chosen.
        return
    other = WriteProtectTracker(lambda: [puppet.pid])
    puppet.do("map", ARENA, PAGES, READ_WRITE)
    puppet.do("write", ARENA, PAGES, 1)
    assert len(dirty(puppet)) == PAGES
    other.collect()
    assert dirty(puppet) == []
    puppet.do("write", ARENA + 7 * PAGE, 2, 9)
    other.collect()
    assert dirty(puppet) == [7, 8]
    puppet.do("write", ARENA, PAGES // 2, 2)
    assert len(dirty(puppet)) == PAGES // 2
    other.collect()
    assert dirty(puppet) == []
    other.detach()


def dirty(puppet: Puppet) -> list[int]:
    """The soft-dirty pages of its arena, by their numbers."""
    puppet.settle()
    with Path(f"/proc/{puppet.pid}/pagemap").open("rb") as pagemap:
        pieces = read_pieces(pagemap.fileno(), [(ARENA, ARENA + PAGES * PAGE)])
    return pages_in(written_runs(pieces, pieces), ARENA, PAGES)


SCENES: Final[tuple[Callable[[Puppet, SoftDirtyTracker], None], ...]] = (
    exactly_what_was_written,
    moved_over_what_was_sent,
    another_program,
    bits_beside_write_protection,
)


def play_all(program: Path) -> list[str]:
    """Each scene with a puppet of its own; the names of those that were played."""
    played = []
    for scene in SCENES:
        with (
            tempfile.TemporaryDirectory() as directory,
            Stage(program, Path(directory) / "socket") as stage,
        ):
            tracker = tracker_of(stage, Still(stage))
            scene(stage.start(), tracker)
            tracker.detach()
        played.append(scene.__name__)
    return played
