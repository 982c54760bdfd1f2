"""Reading the memory of real processes: what is where, and what can't be read."""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from criu_glue import memory as memory_module
from criu_glue.errors import TaskGoneError
from criu_glue.kernel import IOV_MAX
from criu_glue.memory import TaskMemory
from tests.criu_glue.puppets import ARENA, NONE, PAGE, READ_WRITE, Puppet, Stage, state, until

if TYPE_CHECKING:
    from collections.abc import Iterator

MADV_GUARD_INSTALL = 102
PAGES = 2 * IOV_MAX + 500


@pytest.fixture
def memory(puppet: Puppet) -> Iterator[TaskMemory]:
    puppet.do("map", ARENA, 2 * PAGES, READ_WRITE)
    puppet.do("write", ARENA, 2 * PAGES, 0)
    memory = TaskMemory(puppet.pid)
    yield memory
    memory.close()
    memory.close()


def runs_of(*runs: tuple[int, int]) -> np.ndarray:
    return np.array(
        [(ARENA + first * PAGE, pages) for first, pages in runs], dtype=np.uint64
    ).reshape(-1, 2)


def read(memory: TaskMemory, runs: np.ndarray) -> tuple[list[int | None], list[bool]]:
    """The number that the puppet wrote to each page, None where a page is not what it wrote."""
    buffer = bytearray(b"\xaa" * int(runs[:, 1].sum()) * PAGE)
    mask = memory.read(runs, memoryview(buffer))
    words = np.frombuffer(buffer, dtype=np.uint64).reshape(-1, PAGE // 8)
    assert mask.dtype == np.bool_
    assert len(mask) == len(words)
    intact = words[:, 0] == ~words[:, 511]
    return [
        int(w) if ok else None for w, ok in zip(words[:, 0], intact, strict=True)
    ], mask.tolist()


def test_one_run(memory: TaskMemory) -> None:
    assert read(memory, runs_of((5, 3))) == ([5, 6, 7], [True] * 3)


def test_no_runs(memory: TaskMemory) -> None:
    assert read(memory, runs_of()) == ([], [])
    assert memory.read(runs_of(), memoryview(bytearray())).tolist() == []


def test_more_runs_than_one_call_takes(memory: TaskMemory) -> None:
    numbers, mask = read(memory, runs_of(*((2 * i, 1) for i in range(PAGES))))
    assert numbers == list(range(0, 2 * PAGES, 2))
    assert all(mask)


def test_a_buffer_that_is_larger_is_left_alone_behind(memory: TaskMemory) -> None:
    buffer = bytearray(b"\xaa" * 3 * PAGE)
    assert memory.read(runs_of((1, 2)), memoryview(buffer)).all()
    assert buffer[2 * PAGE :] == b"\xaa" * PAGE


@pytest.mark.parametrize("buffer", [memoryview(bytearray(PAGE - 1)), memoryview(bytes(PAGE))])
def test_a_buffer_that_does_not_do(memory: TaskMemory, buffer: memoryview) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        memory.read(runs_of((0, 1)), buffer)


def test_memory_without_read_permission(puppet: Puppet, memory: TaskMemory) -> None:
    puppet.do("protect", ARENA + 4 * PAGE, 2, NONE)
    assert read(memory, runs_of((2, 6), (20, 2))) == (
        [2, 3, 4, 5, 6, 7, 20, 21],
        [True] * 8,
    )
    assert read(memory, runs_of((4, 1))) == ([4], [True])


def test_pages_that_are_unmapped_keep_their_place(puppet: Puppet, memory: TaskMemory) -> None:
    puppet.do("unmap", ARENA + 4 * PAGE, 2)
    numbers, mask = read(memory, runs_of((2, 6), (20, 2)))
    assert mask == [True, True, False, False, True, True, True, True]
    assert [n for n, ok in zip(numbers, mask, strict=True) if ok] == [2, 3, 6, 7, 20, 21]


def test_unreadable_pages_far_behind_in_many_runs(puppet: Puppet, memory: TaskMemory) -> None:
    lost = [0, IOV_MAX - 1, IOV_MAX, IOV_MAX + 1, PAGES - 1]
    for index in lost:
        puppet.do("unmap", ARENA + 2 * index * PAGE, 1)
    numbers, mask = read(memory, runs_of(*((2 * i, 1) for i in range(PAGES))))
    assert [i for i, ok in enumerate(mask) if not ok] == lost
    assert all(n == 2 * i for i, (n, ok) in enumerate(zip(numbers, mask, strict=True)) if ok)


def test_a_guard_page(puppet: Puppet, memory: TaskMemory) -> None:
    puppet.do("advise", ARENA + 3 * PAGE, 1, MADV_GUARD_INSTALL)
    numbers, mask = read(memory, runs_of((2, 3)))
    assert mask == [True, False, True]
    assert (numbers[0], numbers[2]) == (2, 4)


def test_a_large_hole_is_skipped_at_once(
    puppet: Puppet, memory: TaskMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = memory_module._pread

    def pread(fd: int, address: int, out: np.ndarray) -> int:
        calls.append(address)
        return real(fd, address, out)

    monkeypatch.setattr(memory_module, "_pread", pread)
    puppet.do("unmap", ARENA + PAGE, PAGES)
    numbers, mask = read(memory, runs_of((0, PAGES + 3)))
    assert mask == [True] + [False] * PAGES + [True] * 2
    assert numbers[-2:] == [PAGES + 1, PAGES + 2]
    assert len(calls) <= 3
    puppet.do("unmap", ARENA, 2 * PAGES)
    assert not any(read(memory, runs_of((0, PAGES + 3)))[1])


def test_several_threads_read_at_once(puppet: Puppet, memory: TaskMemory) -> None:
    puppet.do("protect", ARENA + 40 * PAGE, 200, NONE)
    puppet.do("unmap", ARENA + 7 * PAGE, 1)
    failures: list[object] = []

    def reader(start: int) -> None:
        for _ in range(30):
            numbers, mask = read(memory, runs_of((start, 50), (start + 300, 5)))
            wanted = [*range(start, start + 50), *range(start + 300, start + 305)]
            right = [
                n == w or (w == 7 and not ok)
                for n, w, ok in zip(numbers, wanted, mask, strict=True)
            ]
            if not all(right) or mask.count(False) != (7 in wanted):
                failures.append((start, numbers, mask))

    threads = [threading.Thread(target=reader, args=(i * 13,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_stopped_task(puppet: Puppet, memory: TaskMemory) -> None:
    os.kill(puppet.pid, signal.SIGSTOP)
    until(lambda: state(puppet.pid) == "T")
    assert read(memory, runs_of((0, 2))) == ([0, 1], [True, True])


def test_a_task_that_exits(stage: Stage, puppet: Puppet, memory: TaskMemory) -> None:
    puppet.send("exit")
    until(lambda: state(puppet.pid) == "Z")
    assert read(memory, runs_of((0, 2)))[1] == [False, False]
    stage.child.wait()
    assert read(memory, runs_of((0, 2)))[1] == [False, False]
    with pytest.raises(TaskGoneError):
        TaskMemory(puppet.pid)


def test_a_main_thread_that_exits(puppet: Puppet, memory: TaskMemory) -> None:
    assert read(memory, runs_of((0, 2))) == ([0, 1], [True, True])
    puppet.send("forsake")
    until(lambda: state(puppet.pid) == "Z")
    assert read(memory, runs_of((0, 2))) == ([0, 1], [True, True])
    puppet.do("protect", ARENA, 2, NONE)
    assert read(memory, runs_of((0, 2))) == ([0, 1], [True, True])


def test_a_pid_that_belongs_to_another_process_now(
    stage: Stage, puppet: Puppet, memory: TaskMemory
) -> None:
    """What was read may be another process's: nothing of it counts."""
    other = stage.start()
    other.do("map", ARENA, 4, READ_WRITE)
    other.do("write", ARENA, 4, 0)
    memory._thread = other.pid
    assert read(memory, runs_of((0, 4))) == ([0, 1, 2, 3], [True] * 4)
    puppet.send("exit")
    until(lambda: state(puppet.pid) == "Z")
    stage._children[0].wait()
    assert read(memory, runs_of((0, 4)))[1] == [False] * 4


def test_a_program_that_is_replaced(puppet: Puppet, memory: TaskMemory) -> None:
    puppet.exec()
    assert read(memory, runs_of((0, 2)))[1] == [False, False]
    puppet.do("map", ARENA, 4, READ_WRITE)
    puppet.do("write", ARENA, 4, 70)
    assert read(memory, runs_of((0, 2))) == ([70, 71], [True, True])
    puppet.do("protect", ARENA, 4, NONE)
    assert read(memory, runs_of((0, 2))) == ([70, 71], [True, True])
