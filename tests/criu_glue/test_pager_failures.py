"""The pager when something dies, lies or comes too early: memory that is missing is brought by
somebody else, or waited for, and never given as zeros."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_glue.core.pagemap import PAGE_BYTES
from criu_glue.kernel import UFFDIO_REGISTER, UffdioRegister, ioctl
from criu_glue.lazy_pages_socket import SOCKET_NAME
from criu_glue.pager_state import Phase
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
    restore.wait_for_tasks(1)
    assert os.getsid(restore.process.pid) == restore.process.pid
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
    restore.wait_for_tasks(1)
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
    restore.wait_for_tasks(1)
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
    restore.wait_for_tasks(1)
    restore.disconnect()
    assert re.search("CRIU closed the connection", restore.wait_for_error())
    assert restore.wait_for(Phase.FAILED).broken == 1
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
    assert re.search("CRIU closed the connection", restore.wait_for_error())
    restore.wait_for(Phase.FAILED)
    restore.kill_worker()
    restore.wait_for(Phase.FAILED)
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)


def test_a_stranger_on_the_socket_is_refused(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 16)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    with Path("/dev/null").open() as null:
        restore.send_task(5, null.fileno())
    assert re.search("not a userfaultfd", restore.wait_for_error())
    assert restore.process.wait(DEADLINE_S) == 1


def test_a_task_without_images_waits_and_the_others_go_on(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    bad = restore.announce(6, pages=16)
    assert re.search(r"pagemap-6\.img", restore.wait_for_error())
    good = restore.announce(5)
    bad.start(["wrong", BASE, 1, BASE_PAGE])
    restore.finish()
    assert restore.wait_for(Phase.FAILED).broken == 1
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
