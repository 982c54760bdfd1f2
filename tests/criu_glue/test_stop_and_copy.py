"""The tracker that tracks nothing."""

from __future__ import annotations

import pytest

from criu_glue.errors import LimitExceededError
from criu_glue.mappings import TASKS_MAX
from criu_glue.trackers.base import DirtyTracker
from criu_glue.trackers.stop_and_copy import StopAndCopyTracker
from tests.criu_glue.puppets import (
    ARENA,
    NONE,
    PAGE,
    READ_WRITE,
    Puppet,
    Stage,
    pages_in,
    present_pages,
    state,
    status,
    until,
)


def test_everything_present_each_time(stage: Stage, puppet: Puppet) -> None:
    tracker: DirtyTracker = StopAndCopyTracker(lambda: [p.pid for p in stage.puppets])
    puppet.do("map", ARENA, 20, READ_WRITE)
    puppet.do("write", ARENA + 2 * PAGE, 5, 1)
    puppet.do("touch", ARENA + 10 * PAGE, 5)
    puppet.do("protect", ARENA + 3 * PAGE, 1, NONE)
    puppet.settle()
    child = puppet.fork()
    for last in (False, True):
        found = {task.pid: pages_in(task.runs, ARENA, 20) for task in tracker.collect(last=last)}
        assert found == {puppet.pid: [2, 3, 4, 5, 6], child.pid: [2, 3, 4, 5, 6]}
    [task, _] = tracker.collect(last=True)
    reported = {address + i * PAGE for address, n in task.runs.tolist() for i in range(n)}
    present = present_pages(puppet.pid)
    assert {address for address, content in present.items() if any(content)} <= reported
    assert reported <= present.keys()
    assert status(puppet.pid)["TracerPid"] == "0"
    tracker.detach()


def test_tasks_that_have_gone(stage: Stage, puppet: Puppet) -> None:
    tracker = StopAndCopyTracker(lambda: [puppet.pid, 0x3FFFFF])
    assert [task.pid for task in tracker.collect()] == [puppet.pid]
    puppet.send("exit")
    until(lambda: state(puppet.pid) == "Z")
    assert tracker.collect() == []
    stage.child.wait()
    assert tracker.collect() == []


def test_too_many_tasks() -> None:
    with pytest.raises(LimitExceededError):
        StopAndCopyTracker(lambda: list(range(1, TASKS_MAX + 2))).collect()
