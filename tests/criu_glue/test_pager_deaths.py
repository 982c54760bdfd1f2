"""The pager's processes die, in any order and at any moment: another one takes over, and no byte of
memory is ever wrong. Only when both die at once is memory lost, and then it is told."""

from __future__ import annotations

import os
import random
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_glue.core.fill_journal import UNIT_BYTES
from criu_glue.core.pagemap import PAGE_BYTES
from criu_glue.pager_keeper import DEATHS_MAX
from criu_glue.pager_state import Phase
from criu_glue.uffd_memory import FAULT_AROUND_PAGES
from tests.criu_glue.pager_rig import (
    BASE,
    BASE_PAGE,
    ELSEWHERE,
    Restore,
    is_running,
    new_restore,
    wait_until,
)


@pytest.fixture
def restore() -> Iterator[Restore]:
    with new_restore() as made:
        yield made


KILLS = {"worker": ["worker"], "keeper": ["keeper"], "alternately": ["worker", "keeper"]}


def kill(restore: Restore, role: str) -> None:
    if role == "worker":
        restore.kill_worker()
    else:
        restore.kill_keeper()


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
    assert task.results() == [[]]
    assert restore.state.workers == 2
    restore.finish()
    done = restore.wait_until_done()
    assert done.tasks == 1
    assert task.do(["wrong", BASE, 512, BASE_PAGE]) == [[]]


def test_another_worker_wakes_whom_the_first_had_heard(restore: Restore) -> None:
    """A page fault is told once; its thread must ask again."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.make_task()
    restore.send_task(5, task.uffd)
    restore.wait_for_tasks(1)
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)
    assert len(os.read(task.uffd, 4096)) == UNIT_BYTES
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
    restore.kill_worker()
    restore.finish()
    done = restore.wait_until_done()
    assert done.unplaced_bytes == 0
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


@pytest.mark.parametrize("roles", KILLS.values(), ids=KILLS)
def test_processes_may_die_in_the_middle_of_the_fill(restore: Restore, roles: list[str]) -> None:
    """As soon as something more is filled, while the task walks through its memory from the end and
    the fill comes from the front."""
    restore.has_task(5, [(BASE_PAGE, 16384)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=16384)
    task.start(["walk_down", BASE, 16384, BASE_PAGE])
    restore.finish()
    killed = 0
    settled = 0
    while restore.state.phase is not Phase.DONE and restore.is_alive():
        if restore.state.settled_bytes > settled and killed < 40:
            settled = restore.state.settled_bytes
            kill(restore, roles[killed % len(roles)])
            killed += 1
    assert killed > 5
    assert task.results() == [[]]
    assert restore.wait_until_done().unplaced_bytes == 0
    assert restore.store.stored_bytes() == 0


@pytest.mark.parametrize("roles", KILLS.values(), ids=KILLS)
def test_processes_may_die_while_mappings_change(restore: Restore, roles: list[str]) -> None:
    """Memory is dropped, moved and forked without end, and every message about it counts: one that
    got lost would bring content where zeros belong, or the other way round."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    chance = random.Random(seed)
    restore.has_task(5, [(BASE_PAGE, 4096)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=4096)
    steps: list[list[object]] = []
    for n in range(0, 2048, 16):
        at, page = BASE + n * PAGE_BYTES, BASE_PAGE + n
        kept = BASE + (2048 + n) * PAGE_BYTES
        steps += [
            ["dontneed", at, 2],
            ["wrong", at, 2, None],
            ["move", at + 4 * PAGE_BYTES, 4, ELSEWHERE + n * PAGE_BYTES, 4, False],
            ["map", at + 4 * PAGE_BYTES, 2],
            ["wrong", at + 4 * PAGE_BYTES, 2, None],
            ["in_child", [["wrong", kept, 8, BASE_PAGE + 2048 + n], ["wrong", at, 2, None]]],
            ["wrong", ELSEWHERE + n * PAGE_BYTES, 4, page + 4],
            ["wrong", at + 8 * PAGE_BYTES, 8, page + 8],
        ]
    for first in range(0, len(steps), 64):
        task.start(*steps[first : first + 64])
        for _ in range(4):
            kill(restore, chance.choice(roles))
        results = task.results()
        assert all(result in ([], None, [[], []]) for result in results), results
    restore.finish()
    kill(restore, roles[0])
    assert restore.wait_until_done().unplaced_bytes == 0
    for n in range(0, 2048, 16):
        at, page = BASE + n * PAGE_BYTES, BASE_PAGE + n
        checks = [["wrong", at, 2, None], ["wrong", at + 8 * PAGE_BYTES, 8, page + 8]]
        assert task.do(*checks) == [[], []]
    assert task.do(["wrong", BASE + 2048 * PAGE_BYTES, 2048, BASE_PAGE + 2048]) == [[]]


def test_criu_does_not_notice_that_a_worker_died(restore: Restore) -> None:
    """Its last word must arrive: CRIU kills what it restored when it can't send it."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.wait_for_tasks(1)
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    restore.finish()
    restore.kill_worker()
    restore.wait_for(Phase.FILLING, Phase.DONE)
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


def test_another_keeper_is_there_for_the_next_worker(restore: Restore) -> None:
    """One dies, then the other: whoever is left had everything before it was needed."""
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    assert restore.process
    restore.connect()
    task = restore.announce(5, pages=1024)
    task.do(["fork_waiting", [["wrong", BASE, 1024, BASE_PAGE]]])
    restore.process.kill()
    restore.process.wait()
    wait_until(lambda: restore.state.keepers == 2)
    restore.kill_worker()
    task.do(["in_child", [["wrong", BASE, 1024, BASE_PAGE]]])
    restore.kill_keeper()
    restore.finish()
    done = restore.wait_until_done()
    assert done.tasks == 1
    assert task.do(["wrong", BASE, 1024, BASE_PAGE], ["child_results"]) == [[], [[]]]


def test_both_have_no_network_and_are_of_one_session(restore: Restore) -> None:
    restore.start_pager()
    restore.kill_keeper()
    restore.kill_worker()
    group = restore.state.group
    for pid in (restore.keeper_pid(), restore.worker_pid()):
        assert (os.getsid(pid), os.getpgid(pid)) == (group, group)
        theirs = Path(f"/proc/{pid}/ns/net").readlink()
        assert theirs != Path("/proc/self/ns/net").readlink()


def test_signals_reach_whichever_processes_there_are(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=1024)
    restore.wait_for_tasks(1)
    restore.kill_keeper()
    os.kill(restore.keeper_pid(), signal.SIGTERM)
    os.kill(restore.keeper_pid(), signal.SIGUSR1)
    wait_until(lambda: task.do(["resident", BASE, 1024]) == [1024])
    restore.finish()
    restore.wait_until_done()


def test_what_was_filled_is_counted_over_deaths(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=1024)
    assert task.do(["wrong", BASE, 512, BASE_PAGE]) == [[]]
    restore.kill_worker()
    restore.finish()
    done = restore.wait_until_done()
    # What it had copied with its last page fault it may not have counted.
    assert 1024 - FAULT_AROUND_PAGES <= done.filled_bytes // PAGE_BYTES <= 1024
    assert done.faults > 0
    assert done.fill_us > 0


def test_both_dead_is_seen_at_once_and_what_is_lost_is_known(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=1024)
    assert task.do(["wrong", BASE, 16, BASE_PAGE]) == [[]]
    wait_until(lambda: 0 < restore.state.missing_bytes <= 1008 * PAGE_BYTES)
    restore.kill_both()
    restore.wait_until_gone()
    state = restore.state
    assert state.phase is Phase.LISTENING
    assert state.missing_bytes > 900 * PAGE_BYTES
    assert task.do(["wrong", BASE + 512 * PAGE_BYTES, 512, None]) == [[]]


def test_a_worker_that_stands_still_is_replaced(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.wait_for_tasks(1)
    stopped = restore.worker_pid()
    os.kill(stopped, signal.SIGSTOP)
    task.start(["wrong", BASE, 256, BASE_PAGE])
    assert task.results() == [[]]
    assert not is_running(stopped)
    assert restore.state.workers == 2
    restore.finish()
    restore.wait_until_done()


def test_a_pager_that_stood_still_as_a_whole_goes_on(restore: Restore) -> None:
    """As after a host was suspended: nobody takes the other for hung."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.wait_for_tasks(1)
    group = restore.state.group
    os.killpg(group, signal.SIGSTOP)
    task.start(["wrong", BASE, 256, BASE_PAGE])
    wait_until(task.is_waiting)
    os.killpg(group, signal.SIGCONT)
    assert task.results() == [[]]
    assert (restore.state.workers, restore.state.keepers) == (1, 1)
    restore.finish()
    restore.wait_until_done()


def test_a_pager_whose_workers_all_die_gives_no_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 16)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=16)
    restore.wait_for_tasks(1)
    for _ in range(DEATHS_MAX):
        restore.kill_worker()
    assert "workers died and filled nothing" in restore.wait_for(Phase.FAILED).error
    restore.kill_worker()
    restore.kill_keeper()
    task.start(["wrong", BASE, 1, BASE_PAGE])
    wait_until(task.is_waiting)
    assert (restore.state.workers, restore.state.keepers) == (DEATHS_MAX + 2, 2)
    assert task.is_waiting()
    task.end()
    restore.wait_until_gone()


def test_a_worker_without_room_for_its_journal_goes_on_alone(restore: Restore) -> None:
    """What the next one would need is not there, so it gives nothing rather than old content."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    # RLIMIT_FSIZE is to a file what no memory is.
    resource.prlimit(restore.worker_pid(), resource.RLIMIT_FSIZE, (UNIT_BYTES, UNIT_BYTES))
    restore.connect()
    task = restore.announce(5)
    task.do(["dontneed", BASE, 16])
    assert task.do(["wrong", BASE, 16, None], ["wrong", BASE + 16 * PAGE_BYTES, 16, BASE_PAGE + 16])
    assert restore.state.journal_lost
    restore.kill_worker()
    assert "journal is not complete" in restore.wait_for_error()
    task.start(["wrong", BASE + 48 * PAGE_BYTES, 1, BASE_PAGE + 48])
    wait_until(task.is_waiting)
    assert restore.wait_for(Phase.FAILED).broken == 1
