"""The write-protect tracker against real processes: exactly what was written, never less."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from criu_glue import kernel
from criu_glue.errors import LimitExceededError, TaskGoneError
from criu_glue.mappings import TASKS_MAX
from criu_glue.memory import TaskMemory
from criu_glue.trackers import scan
from criu_glue.trackers.base import DirtyTracker, TaskPages
from criu_glue.trackers.stop_and_copy import StopAndCopyTracker
from criu_glue.trackers.tracked_task import TrackedTask
from criu_glue.trackers.write_protect import WriteProtectTracker, supported
from tests.criu_glue.puppets import (
    ARENA,
    NONE,
    PAGE,
    READ,
    READ_WRITE,
    Puppet,
    Stage,
    descriptors,
    pages_in,
    present_pages,
    proc,
    state,
    status,
    traced_by_another,
    until,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

MADV_GUARD_INSTALL = 102
MADV_HUGEPAGE = 14


@pytest.fixture
def tracker(stage: Stage) -> Iterator[WriteProtectTracker]:
    tracker = WriteProtectTracker(lambda: [puppet.pid for puppet in stage.puppets])
    yield tracker
    tracker.detach()


def collect(tracker: DirtyTracker, puppet: Puppet, pages: int = 256) -> list[int]:
    """The dirty pages of a puppet's arena, as numbers from its start."""
    found = [task for task in tracker.collect() if task.pid == puppet.pid]
    assert len(found) == 1
    return pages_in(found[0].runs, ARENA, pages)


def test_the_kernel_of_this_machine_is_supported() -> None:
    assert supported() is None


def test_a_kernel_without_the_features_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("criu_glue.trackers.tracked_task._FEATURES", 1 << 60)
    assert "asynchronous" in str(supported())


def test_a_tracker_that_misses_writes_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel on which the round trip fails, by a scanner that protects but reports nothing."""
    real = scan.PageScanner.take
    calls = iter(range(1000))

    def take(self: scan.PageScanner) -> np.ndarray:
        runs = real(self)
        return runs if next(calls) == 0 else runs[:0]

    monkeypatch.setattr(scan.PageScanner, "take", take)
    assert supported() == "userfaultfd write-protection misses a write"


def test_memory_that_went_between_its_mappings_and_its_pages() -> None:
    """A task may end, or execute another program, after its mappings were read."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as task:
        pagemap = os.open(f"/proc/{task.pid}/pagemap", os.O_RDONLY)
    try:
        with pytest.raises(TaskGoneError):
            scan.PageScanner().walk(
                pagemap, ARENA, ARENA + PAGE, written=False, tracked=False, protect=False
            )
    finally:
        os.close(pagemap)


def test_first_everything_present_then_what_was_written(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    puppet.do("map", ARENA, 100, READ_WRITE)
    puppet.do("write", ARENA, 50, 1)
    assert collect(tracker, puppet) == list(range(50))
    assert collect(tracker, puppet) == []
    puppet.do("write", ARENA + 3 * PAGE, 1, 7)
    puppet.do("write", ARENA + 10 * PAGE, 5, 7)
    puppet.do("write", ARENA + 70 * PAGE, 2, 7)
    assert collect(tracker, puppet) == [3, 10, 11, 12, 13, 14, 70, 71]
    assert collect(tracker, puppet) == []
    assert tracker.untracked == {}


def test_reading_is_not_writing(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 20, READ_WRITE)
    puppet.do("write", ARENA, 10, 1)
    collect(tracker, puppet)
    puppet.do("touch", ARENA, 20)
    assert collect(tracker, puppet) == []


def test_a_write_over_a_page_that_was_only_read(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("touch", ARENA, 4)
    assert collect(tracker, puppet) == []
    puppet.do("write", ARENA + PAGE, 2, 1)
    assert collect(tracker, puppet) == [1, 2]


def test_the_last_collect_leaves_what_it_reports_dirty(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    collect(tracker, puppet)
    puppet.do("write", ARENA + PAGE, 2, 1)
    for _ in range(2):
        [last] = tracker.collect(last=True)
        assert pages_in(last.runs, ARENA, 8) == [1, 2]
    assert collect(tracker, puppet) == [1, 2]


def test_the_last_collect_reports_a_new_task_without_stopping_it(
    puppet: Puppet, tracker: WriteProtectTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 5, 1)
    tracker.collect()
    child = puppet.fork()

    def refuse(*_: object) -> None:
        raise AssertionError("a thread was stopped in the freeze")

    monkeypatch.setattr("criu_glue.ptrace.run_in_thread", refuse)
    found = {task.pid: pages_in(task.runs, ARENA, 8) for task in tracker.collect(last=True)}
    assert found == {puppet.pid: [], child.pid: [0, 1, 2, 3, 4]}


def test_a_mapping_made_between_two_collects(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    collect(tracker, puppet)
    puppet.do("map", ARENA + 8 * PAGE, 8, READ_WRITE)
    puppet.do("write", ARENA + 9 * PAGE, 2, 1)
    assert collect(tracker, puppet) == [9, 10]
    puppet.do("write", ARENA + 15 * PAGE, 1, 1)
    assert collect(tracker, puppet) == [15]


def test_a_mapping_replaced_at_the_same_address(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    collect(tracker, puppet)
    puppet.do("unmap", ARENA, 8)
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA + 2 * PAGE, 1, 1)
    assert collect(tracker, puppet) == [2]
    assert collect(tracker, puppet) == []


def test_a_hole_in_the_middle_filled_again(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 16, READ_WRITE)
    puppet.do("write", ARENA, 16, 1)
    collect(tracker, puppet)
    puppet.do("unmap", ARENA + 4 * PAGE, 4)
    puppet.do("map", ARENA + 4 * PAGE, 4, READ_WRITE)
    puppet.do("write", ARENA + 5 * PAGE, 1, 9)
    puppet.do("write", ARENA + 12 * PAGE, 1, 9)
    assert collect(tracker, puppet) == [5, 12]


def test_growth_by_brk(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    heap = puppet.do("brk", 16)
    puppet.do("write", heap, 16, 1)
    tracker.collect()
    assert puppet.do("brk", 16) == heap + 16 * PAGE
    puppet.do("write", heap + 20 * PAGE, 2, 1)
    puppet.do("write", heap + 3 * PAGE, 1, 1)
    [task] = tracker.collect()
    assert pages_in(task.runs, heap, 32) == [3, 20, 21]
    [task] = tracker.collect()
    assert pages_in(task.runs, heap, 32) == []


def test_growth_of_the_stack(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    tracker.collect()
    deepest = puppet.do("dig", 60) & ~(PAGE - 1)
    [task] = tracker.collect()
    # `dig` writes a page of each frame, and a frame is somewhat larger than a page.
    assert len(pages_in(task.runs, deepest, 60)) >= 59
    tracker.collect()
    puppet.do("dig", 60)
    [task] = tracker.collect()
    assert len(pages_in(task.runs, deepest, 60)) >= 59


@pytest.mark.parametrize("target", [0, ARENA + 100 * PAGE], ids=["in place", "moved"])
def test_mremap(puppet: Puppet, tracker: WriteProtectTracker, target: int) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    collect(tracker, puppet)
    puppet.do("write", ARENA + 4 * PAGE, 1, 7)
    moved = puppet.do("remap", ARENA, 8, 12, target)
    assert moved == (target or ARENA)
    puppet.do("write", moved + 10 * PAGE, 1, 7)
    [task] = tracker.collect()
    dirty = pages_in(task.runs, moved, 12)
    assert {4, 10} <= set(dirty)
    assert set(dirty) <= {*range(8), 10}
    puppet.do("write", moved + 11 * PAGE, 1, 7)
    [task] = tracker.collect()
    assert pages_in(task.runs, moved, 12) == [11]


def test_protections(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 12, READ_WRITE)
    puppet.do("write", ARENA, 12, 1)
    puppet.do("protect", ARENA, 4, NONE)
    puppet.do("protect", ARENA + 4 * PAGE, 4, READ)
    assert collect(tracker, puppet) == list(range(12))
    assert collect(tracker, puppet) == []
    puppet.do("protect", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA + PAGE, 1, 2)
    puppet.do("write", ARENA + 5 * PAGE, 1, 2)
    puppet.do("protect", ARENA, 12, NONE)
    assert collect(tracker, puppet) == [1, 5]


def test_pages_given_back_are_not_reported_until_written(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    collect(tracker, puppet)
    puppet.do("advise", ARENA, 8, mmap.MADV_DONTNEED)
    assert collect(tracker, puppet) == []
    puppet.do("write", ARENA + 3 * PAGE, 1, 2)
    assert collect(tracker, puppet) == [3]


def test_locked_memory_is_tracked_too(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("lock", ARENA, 4)
    puppet.do("write", ARENA, 8, 1)
    collect(tracker, puppet)
    puppet.do("write", ARENA + 3 * PAGE, 2, 1)
    assert collect(tracker, puppet) == [3, 4]


def test_memory_that_can_not_be_protected_is_dirty_each_time(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    """MAP_DROPPABLE, which glibc >= 2.41 has for getrandom(3), refuses userfaultfd."""
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    puppet.do("droppable", ARENA + 8 * PAGE, 4)
    puppet.do("write", ARENA + 8 * PAGE, 2, 1)
    assert collect(tracker, puppet) == [0, 1, 2, 3, 8, 9]
    assert collect(tracker, puppet) == [8, 9]
    assert collect(tracker, puppet) == [8, 9]


def test_guard_pages_stay_guards_and_are_not_pages(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    puppet.do("advise", ARENA + 2 * PAGE, 2, MADV_GUARD_INSTALL)
    assert collect(tracker, puppet) == [0, 1, 4, 5, 6, 7]
    assert collect(tracker, puppet) == []
    tracker.detach()
    puppet.send("touch", ARENA + 2 * PAGE, 1)
    until(lambda: state(puppet.pid) == "Z")


def test_huge_pages(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 1024, READ_WRITE)
    puppet.do("advise", ARENA, 1024, MADV_HUGEPAGE)
    puppet.do("write", ARENA, 1024, 1)
    _, _, rows = proc(puppet.pid, "smaps").partition(f"{ARENA:x}-")
    huge = next(row for row in rows.splitlines() if row.startswith("AnonHugePages"))
    assert huge.split()[1] == "4096", "this machine gave no huge pages"
    assert collect(tracker, puppet, 1024) == list(range(1024))
    puppet.do("write", ARENA + 700 * PAGE, 1, 2)
    dirty = collect(tracker, puppet, 1024)
    # The page itself, or the huge page with it, on a kernel that does not split.
    assert 700 in dirty
    assert set(dirty) <= set(range(512, 1024))
    assert collect(tracker, puppet, 1024) == []


def test_fork(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    collect(tracker, puppet)
    child = puppet.fork()
    puppet.do("write", ARENA + 1 * PAGE, 1, 2)
    child.do("write", ARENA + 2 * PAGE, 1, 2)
    found = {task.pid: pages_in(task.runs, ARENA, 8) for task in tracker.collect()}
    assert found == {puppet.pid: [1], child.pid: list(range(8))}
    puppet.do("write", ARENA + 3 * PAGE, 1, 2)
    child.do("write", ARENA + 4 * PAGE, 1, 2)
    found = {task.pid: pages_in(task.runs, ARENA, 8) for task in tracker.collect()}
    assert found == {puppet.pid: [3], child.pid: [4]}


def test_execve(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    collect(tracker, puppet)
    puppet.exec()
    assert collect(tracker, puppet) == []
    assert tracker.untracked == {}
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 3, 1)
    assert collect(tracker, puppet) == [0, 1, 2]
    puppet.do("write", ARENA + PAGE, 1, 1)
    assert collect(tracker, puppet) == [1]


def test_everything_is_dirty_after_execve(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    tracker.collect()
    puppet.exec()
    puppet.settle()
    [task] = tracker.collect()
    present = present_pages(puppet.pid)
    reported = {address + i * PAGE for address, pages in task.runs.tolist() for i in range(pages)}
    assert {address for address in present if any(present[address])} <= reported


def test_exit(puppet: Puppet, stage: Stage, tracker: WriteProtectTracker) -> None:
    child = puppet.fork()
    assert {task.pid for task in tracker.collect()} == {puppet.pid, child.pid}
    child.send("exit")
    until(lambda: state(child.pid) == "Z")
    assert [task.pid for task in tracker.collect()] == [puppet.pid]
    puppet.do("reap", child.pid)
    assert [task.pid for task in tracker.collect()] == [puppet.pid]
    puppet.send("exit")
    until(lambda: state(puppet.pid) == "Z")
    assert tracker.collect() == []


def test_a_main_thread_that_has_exited(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    puppet.send("forsake")
    until(lambda: state(puppet.pid) == "Z")
    assert collect(tracker, puppet) == list(range(8))
    assert tracker.untracked == {}
    puppet.do("write", ARENA + PAGE, 1, 3)
    [task] = tracker.collect()
    assert pages_in(task.runs, ARENA, 8) == [1]
    content = read(task)
    assert content[ARENA + PAGE][:8] == (3).to_bytes(8, "little")


def test_a_child_in_the_same_memory_does_not_take_pages_away(
    puppet: Puppet, stage: Stage, tracker: WriteProtectTracker
) -> None:
    """Between vfork and execve two processes have one memory; only one of them is reported."""
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    collect(tracker, puppet)
    child = puppet.do("share")
    both = WriteProtectTracker(lambda: [child, puppet.pid])
    both._tasks = tracker._tasks
    puppet.do("write", ARENA + 5 * PAGE, 1, 1)
    found = {task.pid: pages_in(task.runs, ARENA, 8) for task in both.collect()}
    assert found == {puppet.pid: [5]}
    os.kill(child, signal.SIGKILL)
    puppet.do("reap", child)
    puppet.do("write", ARENA + 6 * PAGE, 1, 1)
    found = {task.pid: pages_in(task.runs, ARENA, 8) for task in both.collect()}
    assert found == {puppet.pid: [6]}


def test_a_userfaultfd_of_another_memory_is_replaced(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    """As when a task was opened as a vfork child: its userfaultfd works, on its parent."""
    child = puppet.fork()
    tracker.collect()
    tasks = tracker._tasks
    tasks[puppet.pid].uffd, tasks[child.pid].uffd = tasks[child.pid].uffd, tasks[puppet.pid].uffd
    puppet.exec()
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    assert collect(tracker, puppet) == [0, 1, 2, 3]
    assert set(collect(tracker, puppet)) <= {0, 1, 2, 3}
    puppet.do("write", ARENA, 1, 1)
    assert 0 in collect(tracker, puppet)
    assert collect(tracker, puppet) == []


def test_a_pid_that_belongs_to_another_task_now(
    stage: Stage, puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    """The number of a task that has gone, given to a new one: by joining the two in the tracker,
    since the kernel can't be asked for a certain pid without a checkpoint's rights."""
    tracker.collect()
    gone = tracker._tasks.pop(puppet.pid)
    other = stage.start()
    puppet.send("exit")
    until(lambda: state(puppet.pid) == "Z")
    stage._children[0].wait()
    stage.puppets.remove(puppet)
    puppet.close()
    other.do("map", ARENA, 4, READ_WRITE)
    other.do("write", ARENA, 4, 1)
    tracker._tasks[other.pid] = gone
    assert collect(tracker, other) == [0, 1, 2, 3]
    assert tracker._tasks[other.pid] is not gone


def test_a_task_that_is_traced_is_reported_whole(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    with traced_by_another(puppet.pid):
        for _ in range(2):
            assert collect(tracker, puppet) == [0, 1, 2, 3]
            assert "is traced by python" in tracker.untracked[puppet.pid]
    collect(tracker, puppet)
    assert tracker.untracked == {}
    assert collect(tracker, puppet) == []


def test_a_parent_in_vfork_is_reported_whole_until_it_can_be_stopped(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    puppet.send("vfork")
    until(lambda: state(puppet.pid) == "D")
    child = int(proc(puppet.pid, f"task/{puppet.pid}/children"))
    assert collect(tracker, puppet) == [0, 1, 2, 3]
    assert "does not stop" in tracker.untracked[puppet.pid]
    until(lambda: status(puppet.pid)["TracerPid"] == "0")
    os.kill(child, signal.SIGKILL)
    assert puppet.answer() == child
    puppet.do("reap", child)
    assert collect(tracker, puppet) == [0, 1, 2, 3]
    assert tracker.untracked == {}
    assert collect(tracker, puppet) == []


def test_a_task_without_a_free_descriptor_is_reported_whole(
    stage: Stage, tracker: WriteProtectTracker
) -> None:
    puppet = stage.start("prlimit", "--nofile=5")
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    opened = 0
    while puppet_opens(puppet):
        opened += 1
    assert opened >= 1
    assert collect(tracker, puppet) == [0, 1, 2, 3]
    assert "Too many open files" in tracker.untracked[puppet.pid]
    assert collect(tracker, puppet) == [0, 1, 2, 3]


def puppet_opens(puppet: Puppet) -> bool:
    puppet.send("userfault")
    return puppet.answer() == 0


def test_a_program_with_a_seccomp_filter(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    puppet.do("confine")
    collect(tracker, puppet)
    assert tracker.untracked == {}
    puppet.do("write", ARENA, 1, 1)
    assert collect(tracker, puppet) == [0]
    # The filter is in force again: userfaultfd kills.
    puppet.send("userfault")
    until(lambda: state(puppet.pid) == "Z")


def test_a_program_without_capabilities(stage: Stage, tracker: WriteProtectTracker) -> None:
    """In a user namespace of its own, as in a rootless container."""
    puppet = stage.start("unshare", "--user", "--map-user=1000")
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    assert int(status(puppet.pid)["CapEff"], 16) == 0
    collect(tracker, puppet)
    assert tracker.untracked == {}
    puppet.do("write", ARENA, 1, 1)
    assert collect(tracker, puppet) == [0]


def test_no_descriptor_is_left_in_the_task(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    before = descriptors(puppet.pid)
    tracker.collect()
    assert descriptors(puppet.pid) == before


def test_scanning_makes_no_page(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    """No markers on unpopulated memory: the page tables of an empty range stay empty."""
    puppet.do("map", ARENA, 1 << 18, READ_WRITE)
    puppet.do("write", ARENA, 1, 1)
    puppet.settle()
    before = set(present_pages(puppet.pid))
    tables = int(status(puppet.pid)["VmPTE"].split()[0])
    for _ in range(3):
        tracker.collect()
    assert set(present_pages(puppet.pid)) == before
    assert int(status(puppet.pid)["VmPTE"].split()[0]) == tables


def test_detaching_leaves_nothing(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 64, READ_WRITE)
    puppet.do("write", ARENA, 32, 1)
    puppet.settle()
    before = present_pages(puppet.pid)
    assert "uw" not in vm_flags(puppet.pid)
    tracker.collect()
    assert "uw" in vm_flags(puppet.pid)
    own = len(descriptors(os.getpid()))
    tracker.detach()
    tracker.detach()
    assert len(descriptors(os.getpid())) == own - 2
    assert "uw" not in vm_flags(puppet.pid)
    after = present_pages(puppet.pid)
    assert after.keys() == before.keys()
    # The kernel writes to rseq(2)'s area whenever a thread has moved to another CPU.
    assert [
        a for a in after if after[a] != before[a] and a in range(ARENA, ARENA + 64 * PAGE)
    ] == []
    # Bit 57 of a pagemap entry: write-protected through userfaultfd.
    with Path(f"/proc/{puppet.pid}/pagemap").open("rb") as pagemap:
        pagemap.seek(ARENA // PAGE * 8)
        entries = np.frombuffer(pagemap.read(64 * 8), dtype=np.uint64)
    assert not (entries >> np.uint64(57) & np.uint64(1)).any()
    puppet.do("write", ARENA, 64, 1)


def vm_flags(pid: int) -> set[str]:
    rows = proc(pid, "smaps").splitlines()
    return {flag for row in rows if row.startswith("VmFlags:") for flag in row.split()[1:]}


def test_many_regions_overflow_the_vector(
    puppet: Puppet, tracker: WriteProtectTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "VECTOR_REGIONS", 64)
    monkeypatch.setattr(scan, "_VECTOR_RESERVE", 8)
    tracker = WriteProtectTracker(lambda: [puppet.pid])
    puppet.do("map", ARENA, 512, READ_WRITE)
    puppet.do("write", ARENA, 512, 1)
    assert collect(tracker, puppet, 512) == list(range(512))
    for page in range(0, 512, 2):
        puppet.do("write", ARENA + page * PAGE, 1, 2)
    assert collect(tracker, puppet, 512) == list(range(0, 512, 2))
    assert collect(tracker, puppet, 512) == []
    tracker.detach()


def test_more_regions_than_the_kernel_buffers(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    """The kernel hands its regions out 512 at a time, and then misreports how far it has come."""
    pages = 4 * 512 + 100
    scattered = list(range(0, pages, 2))
    puppet.do("map", ARENA, pages, READ_WRITE)
    for page in scattered:
        puppet.do("write", ARENA + page * PAGE, 1, 1)
    assert collect(tracker, puppet, pages) == scattered
    assert collect(tracker, puppet, pages) == []
    for page in scattered:
        puppet.do("write", ARENA + page * PAGE, 1, 2)
    for _ in range(2):
        [last] = tracker.collect(last=True)
        assert pages_in(last.runs, ARENA, pages) == scattered
    [everything] = StopAndCopyTracker(lambda: [puppet.pid]).collect(last=True)
    assert pages_in(everything.runs, ARENA, pages) == scattered
    assert collect(tracker, puppet, pages) == scattered
    assert collect(tracker, puppet, pages) == []


def test_too_many_tasks() -> None:
    with pytest.raises(LimitExceededError):
        WriteProtectTracker(lambda: list(range(1, TASKS_MAX + 2))).collect()


def test_a_task_that_does_not_exist() -> None:
    assert WriteProtectTracker(lambda: [0x3FFFFF]).collect() == []


def read(task: TaskPages) -> dict[int, bytes]:
    """Address and content of each page, through the code under test."""
    buffer = bytearray(task.pages * PAGE)
    memory = TaskMemory(task.pid)
    mask = memory.read(task.runs, memoryview(buffer))
    memory.close()
    addresses = [a + i * PAGE for a, n in task.runs.tolist() for i in range(n)]
    return {
        address: bytes(buffer[i * PAGE : (i + 1) * PAGE])
        for i, address in enumerate(addresses)
        if mask[i]
    }


@contextmanager
def stopped(puppet: Puppet) -> Iterator[None]:
    os.kill(puppet.pid, signal.SIGSTOP)
    until(lambda: state(puppet.pid) == "T")
    try:
        yield
    finally:
        os.kill(puppet.pid, signal.SIGCONT)


def assert_copy_is_exact(copy: dict[int, bytes], pid: int) -> None:
    """What is copied equals what is there; pages that were never reported are zero."""
    present = present_pages(pid)
    wrong = [hex(a) for a, content in present.items() if copy.get(a, bytes(PAGE)) != content]
    assert wrong == []


def test_threads_that_write_all_the_time(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 256, READ_WRITE)
    for i in range(3):
        puppet.do("writer", ARENA + i * 64 * PAGE, 64)
    copy: dict[int, bytes] = {}
    for _ in range(20):
        for task in tracker.collect():
            copy |= read(task)
    with stopped(puppet):
        [task] = tracker.collect(last=True)
        assert task.pages < 256 + 64
        copy |= read(task)
        assert_copy_is_exact(copy, puppet.pid)
    puppet.do("still")


def test_a_task_is_collected_while_it_changes_its_mappings(
    puppet: Puppet, tracker: WriteProtectTracker
) -> None:
    """Mappings that come and go under the scan: nothing fails, and the copy is exact."""
    copy: dict[int, bytes] = {}
    ended = threading.Event()
    failure: list[BaseException] = []

    def churn() -> None:
        try:
            for turn in range(300):
                at = ARENA + turn % 7 * 64 * PAGE
                puppet.do("map", at, 64, READ_WRITE)
                puppet.do("write", at + PAGE, 40, turn << 32)
                puppet.do("unmap", at + 8 * PAGE, 16)
                puppet.do("map", at + 12 * PAGE, 4, READ_WRITE)
                puppet.do("write", at + 13 * PAGE, 2, turn << 32)
                if turn < 296:
                    puppet.do("unmap", at, 64)
        except BaseException as error:  # noqa: BLE001  shown by the test's thread
            failure.append(error)
        finally:
            ended.set()

    churner = threading.Thread(target=churn)
    churner.start()
    while not ended.is_set():
        for task in tracker.collect():
            copy |= read(task)
    churner.join()
    assert failure == []
    puppet.settle()
    for task in tracker.collect(last=True):
        copy |= read(task)
    assert_copy_is_exact(copy, puppet.pid)


@pytest.mark.parametrize("registered", [True, False])
def test_a_mapping_replaced_between_protecting_and_reporting(
    puppet: Puppet,
    tracker: WriteProtectTracker,
    monkeypatch: pytest.MonkeyPatch,
    registered: bool,
) -> None:
    """The scan protects the pages before an unregistered hole, then fails with EPERM and forgets
    them. They must be reported all the same, whether or not the hole can then be registered."""
    puppet.do("map", ARENA, 16, READ_WRITE)
    puppet.do("write", ARENA, 16, 1)
    tracker.collect()
    puppet.do("write", ARENA, 8, 2)
    real = WriteProtectTracker._collect_mapping

    def collect_mapping(
        self: WriteProtectTracker,
        tracked: TrackedTask,
        fd: int,
        start: int,
        end: int,
        *,
        last: bool,
    ) -> None:
        if start == ARENA:
            # After the maps were read: a new mapping in the middle of a tracked one.
            puppet.do("unmap", ARENA + 10 * PAGE, 2)
            puppet.do("map", ARENA + 10 * PAGE, 2, READ_WRITE)
            puppet.do("write", ARENA + 10 * PAGE, 2, 3)
        real(self, tracked, fd, start, end, last=last)

    monkeypatch.setattr(WriteProtectTracker, "_collect_mapping", collect_mapping)
    if not registered:
        monkeypatch.setattr(TrackedTask, "register", lambda *_: False)
    assert set(range(8)) | {10, 11} <= set(collect(tracker, puppet))
    monkeypatch.undo()
    if registered:
        puppet.do("write", ARENA + 11 * PAGE, 1, 4)
        assert collect(tracker, puppet) == [11]


def test_collecting_by_different_threads(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    """An agent's executor gives each collect to whichever thread is free."""
    puppet.do("map", ARENA, 8, READ_WRITE)
    puppet.do("write", ARENA, 8, 1)
    found: list[list[int]] = []
    for page in (1, 2):
        thread = threading.Thread(target=lambda: found.append(collect(tracker, puppet)))
        thread.start()
        thread.join()
        puppet.do("write", ARENA + page * PAGE, 1, 2)
    assert found == [list(range(8)), [1]]


def test_runs_are_merged_across_mappings(puppet: Puppet, tracker: WriteProtectTracker) -> None:
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 1)
    puppet.do("protect", ARENA + 2 * PAGE, 2, READ)
    [task] = tracker.collect()
    assert [ARENA, 4] in task.runs.tolist()
    assert task.runs.dtype == np.uint64


def test_the_task_is_named_by_its_own_namespace(stage: Stage) -> None:
    puppet = stage.start("unshare", "--pid", "--fork", "--kill-child")
    tracker = WriteProtectTracker(lambda: [puppet.pid])
    [task] = tracker.collect()
    tracker.detach()
    assert task.pid == puppet.pid
    assert task.task == 1


def test_a_walk_that_makes_no_progress_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "ioctl", lambda *_: 0)
    with pytest.raises(Exception, match="no progress"):
        scan.PageScanner().walk(0, PAGE, 2 * PAGE, written=False, tracked=False, protect=False)
