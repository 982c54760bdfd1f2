"""The pager against the real kernel: processes that register a userfaultfd themselves and do to
their memory whatever a restored task may do, while the test plays CRIU."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from criu_glue.core.pagemap import PAGE_BYTES
from criu_glue.pager_state import Phase
from tests.criu_glue.pager_rig import BASE, BASE_PAGE, ELSEWHERE, Restore, new_restore, wait_until


@pytest.fixture
def restore() -> Iterator[Restore]:
    with new_restore() as made:
        yield made


def test_faults_are_served_before_the_restore_is_finished(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    restore.wait_for_tasks(1)
    assert task.do(["walk_down", BASE, 256, BASE_PAGE]) == [[]]
    restore.finish()
    restore.wait_for(Phase.FILLING, Phase.DONE)
    done = restore.wait_until_done()
    assert done.faults == sum(done.fault_waits) == 256
    assert done.unplaced_bytes == 0


def test_the_background_fills_what_nobody_touches(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 4096)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=4096)
    restore.finish()
    done = restore.wait_until_done()
    assert done.filled_bytes == 4096 * PAGE_BYTES
    assert task.do(["resident", BASE, 4096]) == [4096]
    assert task.do(["wrong", BASE, 4096, BASE_PAGE]) == [[]]


def test_what_is_filled_leaves_the_store(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 2048)])
    assert restore.store.stored_bytes() == 2048 * PAGE_BYTES
    restore.start_pager()
    restore.connect()
    restore.announce(5, pages=2048)
    restore.finish()
    restore.wait_until_done()
    assert restore.store.stored_bytes() == 0


def test_copies_are_filled_from_one_store_as_they_need_it(restore: Restore) -> None:
    """It stays whole as long as another one fills from it, whoever of whose pager dies meanwhile;
    the last one gives it back as ever."""
    pages, whole_bytes = 2048, 2048 * PAGE_BYTES
    with new_restore(restore.store.directory) as beside:
        restore.has_task(5, [(BASE_PAGE, pages)])
        beside.has_task(5, [(BASE_PAGE, pages)], content=False)
        tasks = []
        for one in (restore, beside):
            one.start_pager(on_demand=True)
        for one in (restore, beside):
            one.connect()
            tasks.append(one.announce(5, pages=pages))
            one.finish()
            one.wait_for(Phase.FILLING)
        first, second = tasks
        assert first.do(["walk_down", BASE, 16, BASE_PAGE]) == [[]]
        restore.kill_worker()
        assert first.do(["resident", BASE, pages])[0] < pages
        assert second.do(["resident", BASE, pages]) == [0]
        os.kill(restore.worker_pid(), signal.SIGUSR1)
        restore.wait_until_done()
        assert first.do(["resident", BASE, pages]) == [pages]
        assert first.do(["wrong", BASE, pages, BASE_PAGE]) == [[]]
        assert restore.store.stored_bytes() == whole_bytes
        assert second.do(["wrong", BASE, pages, BASE_PAGE]) == [[]]
        beside.wait_until_done()
        assert restore.store.stored_bytes() == 0


def test_zeros_take_no_memory(restore: Restore) -> None:
    """Holes of the store, zeros that it holds, and memory that was never lazy."""
    restore.has_task(5, [(BASE_PAGE, 64), (BASE_PAGE + 128, 64)], [(BASE_PAGE, 256)], content=False)
    restore.fill_store(5, BASE_PAGE + 10, 1)
    restore.fill_store(5, BASE_PAGE + 130, 3)
    restore.store.write(5, BASE + 20 * PAGE_BYTES, bytes(8 * PAGE_BYTES))
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    assert task.do(["wrong", BASE, 10, None], ["wrong", BASE + 64 * PAGE_BYTES, 64, None]) == [
        [],
        [],
    ]
    restore.finish()
    done = restore.wait_until_done()
    assert done.filled_bytes == 4 * PAGE_BYTES
    assert done.zero_bytes == 124 * PAGE_BYTES
    assert task.do(
        ["wrong", BASE + 10 * PAGE_BYTES, 1, BASE_PAGE + 10],
        ["wrong", BASE + 11 * PAGE_BYTES, 119, None],
        ["wrong", BASE + 130 * PAGE_BYTES, 3, BASE_PAGE + 130],
        ["wrong", BASE + 133 * PAGE_BYTES, 123, None],
    ) == [[], [], [], []]


def test_several_tasks_and_a_zombie(restore: Restore) -> None:
    for number in (1, 2, 300):
        restore.has_task(number, [(BASE_PAGE, 32)], content=False)
        restore.fill_store(number, BASE_PAGE + number % 32, 1)
    restore.start_pager()
    restore.connect()
    tasks = {number: restore.announce(number, pages=32) for number in (1, 300)}
    restore.send_number(-17)
    tasks[2] = restore.announce(2, pages=32)
    restore.finish()
    done = restore.wait_until_done()
    assert done.tasks == 3
    for number, task in tasks.items():
        own = number % 32
        wrong = task.do(["wrong", BASE, 32, BASE_PAGE])[0]
        assert wrong == [n for n in range(32) if n != own]


def test_threads_fault_at_the_same_time(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 2048)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=2048)
    task.start(["hash_in_threads", BASE, 2048, 6])
    restore.finish()
    first = task.results()[0]
    restore.wait_until_done()
    assert len(set(first)) == 1
    assert task.do(["wrong", BASE, 2048, BASE_PAGE]) == [[]]
    assert task.do(["hash_in_threads", BASE, 2048, 1])[0] == first[:1]


def test_what_the_task_wrote_is_not_overwritten(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 2048)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=2048)
    task.do(*[["write", BASE + n * PAGE_BYTES, 7] for n in range(0, 2048, 100)])
    restore.finish()
    restore.wait_until_done()
    held = task.do(*[["holds", BASE + n * PAGE_BYTES, 7] for n in range(0, 2048, 100)])
    assert all(held)
    assert task.do(["wrong", BASE + PAGE_BYTES, 99, BASE_PAGE + 1]) == [[]]


def test_pages_given_up_read_as_zeros(restore: Restore) -> None:
    """madvise(MADV_DONTNEED) of pages that are missing, there, or written."""
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    task.do(["write", BASE + 40 * PAGE_BYTES, 9], ["wrong", BASE, 4, BASE_PAGE])
    task.do(["dontneed", BASE + 2 * PAGE_BYTES, 100])
    checks = [
        ["wrong", BASE + 2 * PAGE_BYTES, 100, None],
        ["wrong", BASE, 2, BASE_PAGE],
        ["wrong", BASE + 102 * PAGE_BYTES, 154, BASE_PAGE + 102],
    ]
    assert task.do(*checks[:2]) == [[], []]
    restore.finish()
    restore.wait_until_done()
    assert task.do(*checks) == [[], [], []]


def test_unmapped_and_mapped_again_reads_as_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    task.do(["unmap", BASE + 100 * PAGE_BYTES, 50], ["map", BASE + 100 * PAGE_BYTES, 50])
    restore.finish()
    done = restore.wait_until_done()
    assert done.filled_bytes == 206 * PAGE_BYTES
    assert done.unplaced_bytes == 0
    assert task.do(
        ["wrong", BASE, 100, BASE_PAGE],
        ["wrong", BASE + 100 * PAGE_BYTES, 50, None],
        ["wrong", BASE + 150 * PAGE_BYTES, 106, BASE_PAGE + 150],
    ) == [[], [], []]


@pytest.mark.parametrize("keep_old", [False, True])
def test_moved_memory_keeps_its_content(restore: Restore, keep_old: bool) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    middle = BASE + 64 * PAGE_BYTES
    task.do(["wrong", middle, 1, BASE_PAGE + 64], ["move", middle, 32, ELSEWHERE, 32, keep_old])
    moved = ["wrong", ELSEWHERE + 20 * PAGE_BYTES, 12, BASE_PAGE + 84]
    assert task.do(moved) == [[]]
    if keep_old:
        assert task.do(["wrong", middle, 32, None]) == [[]]
    restore.finish()
    done = restore.wait_until_done()
    assert done.filled_bytes == 256 * PAGE_BYTES
    assert task.do(
        ["wrong", ELSEWHERE, 32, BASE_PAGE + 64],
        ["wrong", BASE, 64, BASE_PAGE],
        ["wrong", BASE + 96 * PAGE_BYTES, 160, BASE_PAGE + 96],
    ) == [[], [], []]


def test_moved_and_grown_memory_ends_in_zeros(restore: Restore) -> None:
    """realloc of a large block: mremap to somewhere else with more room."""
    restore.has_task(5, [(BASE_PAGE, 64)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=64)
    task.do(["move", BASE, 64, ELSEWHERE, 256, False])
    task.do(["move", ELSEWHERE, 256, BASE + 4096 * PAGE_BYTES, 300, False])
    restore.finish()
    restore.wait_until_done()
    assert task.do(
        ["wrong", BASE + 4096 * PAGE_BYTES, 64, BASE_PAGE],
        ["wrong", BASE + 4160 * PAGE_BYTES, 236, None],
    ) == [[], []]


def test_memory_moved_to_where_other_memory_was_just_moved_away(restore: Restore) -> None:
    """The kernel tells that the first old place is unmapped after both moves."""
    restore.has_task(5, [(BASE_PAGE, 128)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=128)
    restore.wait_for_tasks(1)
    os.kill(restore.worker_pid(), signal.SIGSTOP)
    task.do(["move_in_thread", BASE, 32, ELSEWHERE])
    wait_until(lambda: task.is_waiting(threads=1))
    task.do(["move_in_thread", BASE + 64 * PAGE_BYTES, 32, BASE])
    wait_until(lambda: task.is_waiting(threads=2))
    os.kill(restore.worker_pid(), signal.SIGCONT)
    checks = [
        ["wrong", BASE, 32, BASE_PAGE + 64],
        ["wrong", ELSEWHERE, 32, BASE_PAGE],
        ["wrong", BASE + 32 * PAGE_BYTES, 32, BASE_PAGE + 32],
        ["wrong", BASE + 96 * PAGE_BYTES, 32, BASE_PAGE + 96],
    ]
    assert task.do(["join"], *checks) == [None, [], [], [], []]
    task.do(["unmap", BASE, 32], ["map", BASE, 32])
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 32, None], *checks[1:]) == [[], [], [], []]


def test_shrunk_and_grown_in_place_reads_as_zeros(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 64)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=64)
    task.do(["grow", BASE, 64, 20], ["grow", BASE, 20, 80])
    assert task.do(["wrong", BASE + 20 * PAGE_BYTES, 60, None]) == [[]]
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 20, BASE_PAGE]) == [[]]


def test_a_forked_child_has_all_of_its_parents_memory(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5)
    task.do(["wrong", BASE, 10, BASE_PAGE])
    assert task.do(["in_child", [["wrong", BASE, 256, BASE_PAGE]]]) == [[[]]]
    assert task.do(
        ["in_child", [["in_child", [["wrong", BASE, 256, BASE_PAGE]]]]],
        ["in_child", [["dontneed", BASE, 256], ["wrong", BASE, 256, None]]],
    ) == [[[[]]], [None, []]]
    restore.finish()
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]


def test_a_child_needs_what_its_parent_had_filled_or_dropped(restore: Restore) -> None:
    """The store keeps what only the child still misses, and the child outlives the fill."""
    restore.has_task(5, [(BASE_PAGE, 1024)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=1024)
    task.do(["fork_waiting", [["wrong", BASE, 1024, BASE_PAGE]]], ["dontneed", BASE, 512])
    assert task.do(["wrong", BASE, 512, None]) == [[]]
    assert task.do(["wrong", BASE + 512 * PAGE_BYTES, 512, BASE_PAGE + 512]) == [[]]
    restore.finish()
    done = restore.wait_until_done()
    assert done.filled_bytes == (512 + 1024) * PAGE_BYTES
    assert task.do(["child_results"]) == [[[]]]
    assert restore.store.stored_bytes() <= 512 * PAGE_BYTES


def test_moves_faults_and_fill_at_the_same_time(restore: Restore) -> None:
    restore.has_task(5, [(BASE_PAGE, 2048)])
    restore.start_pager()
    restore.connect()
    task = restore.announce(5, pages=2048)
    task.start(["move_while_others_read", BASE, 512, ELSEWHERE, BASE_PAGE, 400])
    restore.finish()
    assert task.results() == [[]]
    restore.wait_until_done()
    assert task.do(["wrong", BASE, 2048, BASE_PAGE]) == [[]]


def test_a_task_that_ends_does_not_keep_the_others_waiting(restore: Restore) -> None:
    for number in (1, 2):
        restore.has_task(number, [(BASE_PAGE, 256)])
    restore.start_pager()
    restore.connect()
    first = restore.announce(1)
    second = restore.announce(2)
    first.end()
    restore.finish()
    done = restore.wait_until_done()
    assert done.filled_bytes == 256 * PAGE_BYTES
    assert second.do(["wrong", BASE, 256, BASE_PAGE]) == [[]]
