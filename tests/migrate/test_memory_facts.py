"""What is said of the memory of tasks that really have it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from migrate.memory_facts import memory_facts

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
# Two tasks that map one memfd of 8 MiB, one shared anonymous mapping of 4, and privately a file of
# which the first has written 2 MiB; both have 16 MiB of their own, by copy on write.
PROGRAM = """
import mmap, os, sys, threading, time
memfd = os.memfd_create("shared")
os.ftruncate(memfd, 8 << 20)
kept = [mmap.mmap(memfd, 8 << 20), mmap.mmap(-1, 4 << 20)]
for one in kept:
    one.write(b"x" * len(one))
own = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
own.write(b"y" * len(own))
first = os.fork() != 0
if first:
    with open(sys.argv[1], "rb") as file:
        written = mmap.mmap(file.fileno(), 3 << 20, flags=mmap.MAP_PRIVATE,
                            prot=mmap.PROT_READ | mmap.PROT_WRITE)
    written[: 2 << 20] = b"z" * (2 << 20)
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def pids(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    path = tmp_path_factory.mktemp("mapped") / "file"
    path.write_bytes(b"-" * (3 * MIB))
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, process_group=0
    ) as first:
        assert first.stdout is not None
        told = [int(first.stdout.readline()) for _ in range(2)]
        try:
            yield sorted(told, key=lambda pid: pid != first.pid)
        finally:
            subprocess.run(["kill", "-KILL", "--", f"-{first.pid}"], check=True)


def test_what_tasks_share_counts_once_and_their_own_for_each(pids: list[int]) -> None:
    first, both = memory_facts(pids[:1]), memory_facts(pids)
    assert first.shared_bytes == both.shared_bytes == 12 * MIB
    assert 18 * MIB <= first.private_bytes < 60 * MIB
    assert 34 * MIB <= both.private_bytes < first.private_bytes + 60 * MIB


def test_what_was_written_into_mapped_files_is_told_apart(pids: list[int]) -> None:
    first, second = memory_facts(pids[:1]), memory_facts(pids[1:])
    # The interpreter and its libraries have relocated pages too, the same of both.
    assert first.unwatched_bytes - second.unwatched_bytes == pytest.approx(2 * MIB, abs=MIB / 2)
    assert 0 < second.unwatched_bytes < second.private_bytes


def test_threads_and_mappings_of_all_tasks_count(pids: list[int]) -> None:
    first, second, both = (memory_facts(some) for some in (pids[:1], pids[1:], pids))
    assert (first.threads, second.threads, both.threads) == (2, 1, 3)
    assert both.mappings == first.mappings + second.mappings > 20


def test_a_task_that_has_exited_is_left_out(pids: list[int]) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait(timeout=10)
    assert memory_facts([gone.pid, *pids]).threads == 3
