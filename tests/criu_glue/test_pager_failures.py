"""The pager when something dies, lies or comes too early: memory that is missing is brought by
somebody else, or waited for, and never given as zeros."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_glue.core.fill_journal import RECORD_BYTES
from criu_glue.core.pagemap import PAGE_BYTES
from criu_glue.kernel import UFFD_MSG_BYTES, UFFDIO_REGISTER, UffdioRegister, ioctl
from criu_glue.lazy_pages_socket import SOCKET_NAME
from tests.criu_glue.pager_rig import (
    BASE,
    BASE_PAGE,
    DEADLINE_S,
    ELSEWHERE,
    Restore,
    new_restore,
    wait_until,
)

MODE_MISSING = 1  # UFFDIO_REGISTER_MODE_MISSING


@pytest.fixture
def restore() -> Iterator[Restore]:
    with new_restore() as made:
        yield made


def test_the_pager_outlives_the_agent(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5, pages=1024)
    restore.wait_for("tasks")
    assert os.getsid(restore.process.pid) == restore.process.pid
    restore.stop_listening_to_pager()
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        restore.process.send_signal(number)
    assert task.do(["wrong", BASE, 16, BASE_PAGE]) == [[]]
    restore.finish()
    assert restore.process.wait(DEADLINE_S) == 0
    assert task.do(["wrong", BASE, 1024, BASE_PAGE]) == [[]]


def test_the_pager_has_no_network(restore: Restore) -> None:
    restore.start_pager()
    assert restore.process
    theirs = Path(f"/proc/{restore.process.pid}/ns/net").readlink()
    assert theirs != Path("/proc/self/ns/net").readlink()


def test_the_fill_can_begin_while_the_restore_is_held(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5, pages=1024)
    restore.wait_for("tasks")
    restore.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: task.do(["resident", BASE, 1024]) == [1024])
    restore.finish()
    restore.wait_until_done()


def test_a_task_is_not_let_go_before_the_restore_is_finished(restore: Restore) -> None:
    """CRIU registers one mapping after the other; faults in the last one need an answer too."""
    restore.has_task(5, [(BASE_PAGE, 16)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.make_task(pages=16)
    restore.send_task(5, task.uffd)
    restore.wait_for("tasks")
    assert task.do(["wrong", BASE, 16, BASE_PAGE], ["map", ELSEWHERE, 16]) == [[], None]
    later = UffdioRegister(ELSEWHERE, 16 * PAGE_BYTES, MODE_MISSING, 0)
    ioctl(task.uffd, UFFDIO_REGISTER, later)
    assert task.do(["wrong", ELSEWHERE, 16, None]) == [[]]
    os.close(task.uffd)
    restore.finish()
    restore.wait_until_done()


def test_a_restore_that_fails_is_reported_and_nothing_is_given_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5)
    restore.wait_for("tasks")
    restore.disconnect()
    with pytest.raises(AssertionError, match="CRIU closed the connection"):
        restore.wait_for("done")
    assert restore.wait_for("holding")["count"] == 1
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)
    assert restore.process.poll() is None
    task.end()
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_failed_restore_is_not_forgotten_by_the_next_worker(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.disconnect()
    with pytest.raises(AssertionError, match="CRIU closed the connection"):
        restore.wait_for("done")
    restore.wait_for("holding")
    restore.kill_worker()
    with pytest.raises(AssertionError, match="CRIU has closed the connection"):
        restore.wait_for("done")
    restore.wait_for("holding")
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)


def test_a_stranger_on_the_socket_is_refused(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 16)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    with Path("/dev/null").open() as null:
        restore.send_task(5, null.fileno())
    with pytest.raises(AssertionError, match="not a userfaultfd"):
        restore.wait_for("done")
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_task_without_images_waits_and_the_others_go_on(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    bad = restore.announce(6, pages=16)
    with pytest.raises(AssertionError, match=r"pagemap-6\.img"):
        restore.wait_for("done")
    good = restore.announce(5)
    bad.start(["wrong", BASE, 1, BASE_PAGE])
    restore.finish()
    restore.wait_for("restored")
    with pytest.raises(AssertionError, match="1 tasks can't be filled"):
        restore.wait_for("done")
    restore.wait_for("holding")
    assert good.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]
    assert bad.is_waiting()
    bad.end()
    assert restore.process
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_pager_that_nobody_used_can_be_told_to_end(restore: Restore) -> None:
    restore.start_pager()
    assert restore.process
    restore.process.send_signal(signal.SIGTERM)
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_deep_directory_is_no_obstacle(restore: Restore) -> None:
    restore.work = restore.work / ("d" * 100) / ("e" * 100)
    restore.work.mkdir(parents=True)
    restore.start_pager()
    assert (restore.work / SOCKET_NAME).is_socket()


def test_another_worker_goes_on(restore: Restore) -> None:
    """Some pages are there, some are not, and a thread waits for one that nobody brings."""
    restore.has_task(5, [(BASE_PAGE, 512)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=512)
    assert task.do(["wrong", BASE, 100, BASE_PAGE]) == [[]]
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    task.start(["wrong", BASE + 200 * PAGE_BYTES, 312, BASE_PAGE + 200])
    wait_until(task.is_waiting)
    restore.kill_worker()
    assert restore.wait_for("restarted")["count"] == 1
    assert task.results() == [[]]
    restore.finish()
    done = restore.wait_until_done()
    assert done["tasks"] == 1
    assert task.do(["wrong", BASE, 512, BASE_PAGE]) == [[]]


def test_another_worker_wakes_whom_the_first_had_heard(restore: Restore) -> None:
    """A page fault is told once; its thread must ask again."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.make_task()
    restore.send_task(5, task.uffd)
    restore.wait_for("tasks")
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)
    assert len(os.read(task.uffd, 4096)) == UFFD_MSG_BYTES
    os.close(task.uffd)
    restore.kill_worker()
    assert task.results() == [[]]
    restore.finish()
    restore.wait_until_done()


def test_another_worker_knows_what_was_moved_dropped_and_forked(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 512)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=512)
    task.do(
        ["write", BASE, 3],
        ["dontneed", BASE + 10 * PAGE_BYTES, 10],
        ["unmap", BASE + 30 * PAGE_BYTES, 10],
        ["move", BASE + 100 * PAGE_BYTES, 50, ELSEWHERE, 60, False],
        ["fork_waiting", [["wrong", BASE + 40 * PAGE_BYTES, 60, BASE_PAGE + 40]]],
        ["dontneed", BASE + 40 * PAGE_BYTES, 30],
    )
    # Opened, removed, removed, moved, forked, removed.
    journal = restore.store.directory / "pager.journal"
    wait_until(lambda: journal.stat().st_size == 6 * RECORD_BYTES)
    restore.kill_worker()
    restore.wait_for("restarted")
    restore.finish()
    done = restore.wait_until_done()
    assert done["unplaced_bytes"] == 0
    assert task.do(
        ["holds", BASE, 3],
        ["wrong", BASE + PAGE_BYTES, 9, BASE_PAGE + 1],
        ["wrong", BASE + 10 * PAGE_BYTES, 10, None],
        ["wrong", BASE + 20 * PAGE_BYTES, 10, BASE_PAGE + 20],
        ["wrong", BASE + 40 * PAGE_BYTES, 30, None],
        ["wrong", BASE + 70 * PAGE_BYTES, 30, BASE_PAGE + 70],
        ["wrong", BASE + 150 * PAGE_BYTES, 362, BASE_PAGE + 150],
        ["wrong", ELSEWHERE, 50, BASE_PAGE + 100],
        ["wrong", ELSEWHERE + 50 * PAGE_BYTES, 10, None],
        ["child_results"],
    ) == [True, [], [], [], [], [], [], [], [], [[]]]


@pytest.mark.parametrize("after_ms", [0, 3, 10])
def test_workers_may_die_in_the_middle_of_the_fill(restore: Restore, after_ms: int) -> None:
    restore.has_task(5, [(BASE_PAGE, 8192)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=8192)
    task.start(["walk_down", BASE, 8192, BASE_PAGE])
    restore.finish()
    restore.wait_for("restored")
    for _ in range(2):
        end_s = time.monotonic() + after_ms / 1000
        while time.monotonic() < end_s:
            os.sched_yield()
        restore.kill_worker()
    assert task.results() == [[]]
    restore.wait_until_done()
    assert restore.store.stored_bytes() == 0


def test_criu_does_not_notice_that_a_worker_died(restore: Restore) -> None:
    """Its last word must arrive: CRIU kills what it restored when it can't send it."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.wait_for("tasks")
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    restore.finish()
    restore.kill_worker()
    restore.wait_for("restored")
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]


def test_a_worker_that_dies_before_criu_comes_is_replaced(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.kill_worker()
    restore.connect()
    task = restore.announce(5)
    assert task.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]
    restore.finish()
    restore.wait_until_done()


def test_a_worker_goes_on_without_its_keeper(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5, pages=1024)
    restore.wait_for("tasks")
    restore.process.kill()
    restore.process.wait()
    task.do(["in_child", [["wrong", BASE, 1024, BASE_PAGE]]])
    restore.finish()
    restore.wait_for("done")
    assert task.do(["wrong", BASE, 1024, BASE_PAGE]) == [[]]


def test_nothing_is_held_after_the_end(restore: Restore) -> None:
    """Fresh memory works without anybody's help then."""
    restore.has_task(5, [(BASE_PAGE, 128)], [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    task.do(["in_child", [["wrong", BASE, 128, BASE_PAGE]]])
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE + 128 * PAGE_BYTES, 128, None]) == [[]]


def test_a_worker_without_its_journal_gives_no_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.wait_for("tasks")
    (restore.store.directory / "pager.journal").unlink()
    restore.kill_worker()
    with pytest.raises(AssertionError, match=r"pager\.journal"):
        restore.wait_for("restored")
    restore.wait_for("holding")
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)
    task.end()
    assert restore.process
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_pager_whose_workers_all_die_gives_no_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 16)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=16)
    restore.wait_for("tasks")
    for _ in range(9):
        restore.kill_worker()
        restore.wait_for("restarted")
    task.start(["wrong", BASE + PAGE_BYTES, 1, BASE_PAGE + 1])
    assert task.results() == [[]]
    restore.kill_worker()
    with pytest.raises(AssertionError, match="10 workers died"):
        restore.wait_for("restarted")
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)


def test_a_worker_that_can_write_no_journal_goes_on_alone(restore: Restore) -> None:
    """What the next one would need is not there, so it gives nothing rather than old content."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    # RLIMIT_FSIZE is to a file what a full tmpfs is.
    resource.prlimit(restore.worker_pid(), resource.RLIMIT_FSIZE, (RECORD_BYTES, RECORD_BYTES))
    restore.connect()
    task = restore.announce(5)
    task.do(["dontneed", BASE, 16], ["dontneed", BASE + 32 * PAGE_BYTES, 16])
    assert task.do(["wrong", BASE, 16, None], ["wrong", BASE + 16 * PAGE_BYTES, 16, BASE_PAGE + 16])
    assert not (restore.store.directory / "pager.journal").exists()
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE + 48 * PAGE_BYTES, 208, BASE_PAGE + 48]) == [[]]
