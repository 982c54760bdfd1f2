"""The soft-dirty tracker against real processes. Which of their pages were written only a kernel
with these bits tells: then exactly those, and otherwise what does not depend on them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_glue.errors import LimitExceededError
from criu_glue.mappings import TASKS_MAX
from criu_glue.trackers.base import DirtyTracker
from criu_glue.trackers.soft_dirty import SoftDirtyTracker, supported
from tests.criu_glue.puppets import (
    ARENA,
    PAGE,
    READ_WRITE,
    Puppet,
    Stage,
    pages_in,
    state,
    until,
)

PAGES = 1024
needs_bits = pytest.mark.skipif(supported() is not None, reason=str(supported()))


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


@pytest.fixture
def still(stage: Stage) -> Still:
    return Still(stage)


@pytest.fixture
def tracker(stage: Stage, still: Still) -> Iterator[SoftDirtyTracker]:
    tracker = SoftDirtyTracker(lambda: [puppet.pid for puppet in stage.puppets], still)
    yield tracker
    tracker.detach()


def reported(tracker: DirtyTracker, pid: int, *, last: bool = False) -> list[int]:
    for task in tracker.collect(last=last):
        if task.pid == pid:
            return pages_in(task.runs, ARENA, 4 * PAGES)
    raise AssertionError(f"{pid} is not reported")


def test_a_kernel_is_asked_by_what_it_does() -> None:
    """Whichever it is: kernels that note soft-dirty pages say so in every mapping that is new
    (proc_pid_smaps(5): `sd` of VmFlags)."""
    with Path("/proc/self/smaps").open() as smaps:
        notes = any(line.startswith("VmFlags:") and " sd" in line for line in smaps)
    assert (supported() is None) == notes


def test_first_everything_and_of_a_new_task(
    puppet: Puppet, tracker: SoftDirtyTracker, still: Still
) -> None:
    puppet.do("map", ARENA, 20, READ_WRITE)
    puppet.do("write", ARENA + 2 * PAGE, 3, 1)
    puppet.do("touch", ARENA + 10 * PAGE, 5)
    assert reported(tracker, puppet.pid) == [2, 3, 4]
    child = puppet.fork()
    child.settle()
    assert reported(tracker, child.pid) == [2, 3, 4]
    assert still.times == 2
    # Frozen for good, it neither has to be stilled nor is anything forgotten.
    puppet.do("write", ARENA + 12 * PAGE, 1, 1)
    puppet.settle()
    for _ in range(2):
        assert 12 in reported(tracker, puppet.pid, last=True)
    assert still.times == 2


def test_tasks_that_have_gone(stage: Stage, puppet: Puppet, tracker: SoftDirtyTracker) -> None:
    tracker.collect()
    puppet.send("exit")
    until(lambda: state(puppet.pid) == "Z")
    assert tracker.collect() == []
    stage.child.wait()
    assert tracker.collect() == []


def test_too_many_tasks() -> None:
    tracker = SoftDirtyTracker(lambda: list(range(1, TASKS_MAX + 2)), contextlib.nullcontext)
    with pytest.raises(LimitExceededError):
        tracker.collect()


class LateError(Exception):
    """The container ran while it should have stood still."""


def test_after_a_failure_everything_is_dirty(stage: Stage, puppet: Puppet) -> None:
    fails = False

    @contextlib.contextmanager
    def still() -> Iterator[None]:
        yield
        if fails:
            raise LateError

    tracker = SoftDirtyTracker(lambda: [puppet.pid], still)
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    puppet.settle()
    before = len(list(Path("/proc/self/fd").iterdir()))
    reported(tracker, puppet.pid)
    fails = True
    with pytest.raises(LateError):
        tracker.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    fails = False
    assert reported(tracker, puppet.pid) == [0, 1, 2, 3]
    tracker.detach()


@needs_bits
def test_exactly_what_was_written(puppet: Puppet, tracker: SoftDirtyTracker) -> None:
    puppet.do("map", ARENA, PAGES, READ_WRITE)
    puppet.do("write", ARENA, PAGES, 1)
    assert len(reported(tracker, puppet.pid)) == PAGES
    assert reported(tracker, puppet.pid) == []
    puppet.do("write", ARENA + 5 * PAGE, 2, 9)
    puppet.do("touch", ARENA + 100 * PAGE, 50)
    assert reported(tracker, puppet.pid) == [5, 6]
    assert reported(tracker, puppet.pid) == []


@needs_bits
def test_what_is_moved_over_what_was_sent(puppet: Puppet, tracker: SoftDirtyTracker) -> None:
    """2 MiB at a 2 MiB boundary: the kernel moves the page table, and marks nothing in it."""
    table = 512 * PAGE
    for at in (ARENA, ARENA + 2 * table):
        puppet.do("map", at, 512, READ_WRITE)
        puppet.do("write", at, 512, at)
    reported(tracker, puppet.pid)
    reported(tracker, puppet.pid)
    puppet.do("unmap", ARENA, 512)
    puppet.do("remap", ARENA + 2 * table, 512, 512, ARENA)
    assert reported(tracker, puppet.pid) == list(range(512))


@needs_bits
def test_execve(puppet: Puppet, tracker: SoftDirtyTracker) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    reported(tracker, puppet.pid)
    puppet.exec()
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA + 2 * PAGE, 3, 1)
    assert reported(tracker, puppet.pid) == [2, 3, 4]
