"""The soft-dirty tracker against real processes. Which of their pages were written only a kernel
with these bits tells: then exactly those, and otherwise what does not depend on them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from criu_glue.errors import LimitExceededError
from criu_glue.mappings import TASKS_MAX
from criu_glue.trackers.soft_dirty import SoftDirtyTracker, supported
from tests.criu_glue.puppets import ARENA, PAGE, READ_WRITE, Puppet, Stage, state, until
from tests.criu_glue.soft_dirty_scenes import SCENES, Still, reported, tracker_of


@pytest.fixture
def still(stage: Stage) -> Still:
    return Still(stage)


@pytest.fixture
def tracker(stage: Stage, still: Still) -> Iterator[SoftDirtyTracker]:
    tracker = tracker_of(stage, still)
    yield tracker
    tracker.detach()


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


@pytest.mark.skipif(supported() is not None, reason=str(supported()))
@pytest.mark.parametrize("scene", SCENES)
def test_scenes(
    puppet: Puppet, tracker: SoftDirtyTracker, scene: Callable[[Puppet, SoftDirtyTracker], None]
) -> None:
    scene(puppet, tracker)
