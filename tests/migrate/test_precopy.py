"""Rounds of memory: how page runs are split, and what happens at the end. Trackers and senders are
played; the real ones are in the lab's migrations."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from criu_glue.captured import CapturedPages
from criu_glue.errors import CriuGlueError, LimitExceededError
from criu_glue.kernel import PAGE_BYTES
from criu_glue.mappings import Task
from criu_glue.page_sources import TaskSource, executable_ranges, split_runs
from criu_glue.trackers.base import TaskPages
from migrate.errors import TransferFailed
from migrate.precopy import MemorySource

if TYPE_CHECKING:
    import numpy.typing as npt

    Runs = npt.NDArray[np.uint64]

PAGES_MAX = 64
DEADLINE_S = 20.0

pages_in_runs = st.sets(st.integers(0, PAGES_MAX - 1))
bounds = st.lists(st.integers(0, PAGES_MAX), max_size=12).map(sorted)


def runs_of(pages: set[int]) -> Runs:
    """The runs [address, pages] of a set of page numbers: sorted, as long as possible."""
    runs: list[list[int]] = []
    for page in sorted(pages):
        if runs and runs[-1][0] // PAGE_BYTES + runs[-1][1] == page:
            runs[-1][1] += 1
        else:
            runs.append([page * PAGE_BYTES, 1])
    return np.array(runs, dtype=np.uint64).reshape(-1, 2)


def pages_of(runs: Runs) -> list[int]:
    return [
        address // PAGE_BYTES + number
        for address, pages in runs.tolist()
        for number in range(pages)
    ]


class Numbered:
    """Memory in which every page says its number, until it is overwritten; odd ones are missing."""

    def __init__(self) -> None:
        self.added = 0

    def read(self, task: int, runs: Runs, out: memoryview) -> npt.NDArray[np.bool_]:
        pages = np.array(pages_of(runs), dtype=np.uint64)
        words = np.frombuffer(out, dtype=np.uint64).reshape(-1, PAGE_BYTES // 8)
        words[: len(pages)] = (pages + self.added)[:, None]
        return pages % 2 == 0


@given(pages_in_runs, st.data())
def test_what_was_captured_is_read_as_it_was(pages: set[int], data: st.DataObject) -> None:
    memory = Numbered()
    captured = CapturedPages.of(memory, [(1, runs_of(pages))], PAGES_MAX * PAGE_BYTES)
    memory.added = 1000
    asked = data.draw(st.sets(st.sampled_from(sorted(pages)))) if pages else set()
    out = bytearray(len(asked) * PAGE_BYTES)
    mask = captured.read(1, runs_of(asked), memoryview(out))
    assert mask.tolist() == [page % 2 == 0 for page in sorted(asked)]
    words = np.frombuffer(out, dtype=np.uint64).reshape(-1, PAGE_BYTES // 8)
    for page, content in zip(sorted(asked), words, strict=True):
        assert page % 2 == 1 or (content == page).all()


def test_no_more_is_captured_than_may_be() -> None:
    with pytest.raises(LimitExceededError, match="there is room for 0"):
        CapturedPages.of(Numbered(), [(1, runs_of({1, 2}))], PAGE_BYTES)


@given(pages_in_runs, bounds)
def test_runs_are_split_at_ranges(pages: set[int], edges: list[int]) -> None:
    """Every page is on one side, in order; ranges may be empty, or follow each other closely."""
    ranges = [
        (low * PAGE_BYTES, high * PAGE_BYTES)
        for low, high in zip(edges[::2], edges[1::2], strict=False)
    ]
    covered = {
        page for low, high in ranges for page in range(low // PAGE_BYTES, high // PAGE_BYTES)
    }
    inside, outside = split_runs(runs_of(pages), ranges)
    assert pages_of(inside) == sorted(pages & covered)
    assert pages_of(outside) == sorted(pages - covered)
    for runs in (inside, outside):
        assert runs.dtype == np.uint64
        assert runs.shape[1] == 2
        assert (runs[:, 1] > 0).all()


def test_runs_at_the_end_of_the_address_space() -> None:
    last = (1 << 64) - 2 * PAGE_BYTES
    inside, outside = split_runs(
        np.array([[last - PAGE_BYTES, 2]], dtype=np.uint64), [(last, last + PAGE_BYTES)]
    )
    assert inside.tolist() == [[last, 1]]
    assert outside.tolist() == [[last - PAGE_BYTES, 1]]


def test_executable_ranges_are_those_of_the_task() -> None:
    size = 3 * PAGE_BYTES
    with (
        contextlib.closing(mmap.mmap(-1, size, prot=mmap.PROT_READ | mmap.PROT_EXEC)),
        contextlib.closing(Task(os.getpid())) as task,
    ):
        code_pages = [
            (int(low, 16), int(high, 16))
            for low, high in (
                line.split()[0].decode().split("-")
                for line in task.read("maps").splitlines()
                if line.split()[1].startswith(b"r-x")
            )
        ]
        assert set(code_pages) <= set(executable_ranges(own_maps()))
        assert any(high - low >= size for low, high in code_pages)


def own_maps() -> bytes:
    return Path("/proc/self/maps").read_bytes()


class Tracker:
    """Reports what the test says, and can be held in the middle of it."""

    name = "played"

    def __init__(self, *rounds: Runs) -> None:
        self._rounds = list(rounds)
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.calls: list[str] = []

    def collect(self, *, last: bool = False) -> list[TaskPages]:
        self.calls.append("last" if last else "collect")
        self.entered.set()
        assert self.go_on.wait(DEADLINE_S)
        self.calls.append("collected")
        runs = self._rounds.pop(0)
        return [TaskPages(task=1, pid=os.getpid(), runs=runs)]

    def detach(self) -> None:
        self.calls.append("detach")


class Sender:
    """Keeps what it is given to send, and reads it as the real one's threads do."""

    def __init__(self, read: Callable[[int, Runs, memoryview], npt.NDArray[np.bool_]]) -> None:
        self._read = read
        self.sent: list[tuple[int, list[list[int]], bytes]] = []
        self.delivered: set[int] = set()

    def send_round(self, number: int, tasks: Sequence[tuple[int, Runs]]) -> Any:
        for task, runs in tasks:
            content = bytearray(PAGE_BYTES * len(pages_of(runs)))
            assert self._read(task, runs, memoryview(content)).all()
            self.sent.append((number, runs.tolist(), bytes(content)))
            self.delivered |= set(pages_of(runs))
        return number

    def never_delivered(self, task: int, runs: Runs) -> Runs:
        assert task == 1
        return runs_of(set(pages_of(runs)) - self.delivered)

    def close(self) -> None:
        self.sent.append((0, [], b"closed"))


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with contextlib.closing(mmap.mmap(-1, 4 * PAGE_BYTES, flags=flags)) as memory:
        memory.write(b"".join(bytes([65 + page]) * PAGE_BYTES for page in range(4)))
        yield memory


def address_of(memory: mmap.mmap) -> int:
    return int(np.frombuffer(memory, dtype=np.uint8).__array_interface__["data"][0])


def make(
    tracker: Tracker,
    undisturbed: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> tuple[MemorySource, Sender]:
    senders: list[Sender] = []

    def make_sender(read: Any) -> Any:
        senders.append(Sender(read))
        return senders[0]

    return MemorySource(TaskSource(tracker), make_sender, undisturbed), senders[0]


def test_rounds_carry_what_is_in_the_task(memory: mmap.mmap) -> None:
    address = address_of(memory)
    all_of_it = np.array([[address, 4]], dtype=np.uint64)
    one = np.array([[address + PAGE_BYTES, 1]], dtype=np.uint64)
    source, sender = make(Tracker(all_of_it, one))
    source.round()
    assert source.round_bytes_total == 4 * PAGE_BYTES
    memory[PAGE_BYTES] = 0x7A
    source.round()
    assert source.rounds == 2
    assert sender.sent[0] == (
        1,
        [[address, 4]],
        b"".join(bytes([65 + n]) * PAGE_BYTES for n in range(4)),
    )
    assert sender.sent[1] == (2, [[address + PAGE_BYTES, 1]], b"z" + b"B" * (PAGE_BYTES - 1))
    source.close()


def test_what_is_undelivered(memory: mmap.mmap, tmp_path: Path) -> None:
    """What the target never got, and what may have changed since because no tracker looks there:
    a file that is mapped privately, maybe where memory was that had been sent."""
    (tmp_path / "file").write_bytes(bytes(2 * PAGE_BYTES))
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    pages, of_file = [address_of(memory), 3], [address_of(mapped), 2]
    sent = np.array(sorted([pages, of_file]), dtype=np.uint64)
    everything = np.array(sorted([[pages[0], 4], of_file]), dtype=np.uint64)
    source, _ = make(Tracker(sent, sent[:0]))
    source.round()
    source.final_delta()
    ((task, missing),) = source.undelivered({1: everything})
    never_sent = [pages[0] + 3 * PAGE_BYTES, 1]
    assert (task, missing.tolist()) == (1, sorted([never_sent, of_file]))
    assert source.undelivered({1: np.array([pages], dtype=np.uint64)}) == []
    source.close()
    mapped.close()


def test_nothing_slows_running_tasks_while_the_tracker_is_at_work(memory: mmap.mmap) -> None:
    tracker = Tracker(np.array([[address_of(memory), 1]], dtype=np.uint64))

    @contextlib.contextmanager
    def undisturbed() -> Iterator[None]:
        tracker.calls.append("paused")
        yield
        tracker.calls.append("slowed")

    source, _ = make(tracker, undisturbed)
    source.round()
    assert tracker.calls == ["paused", "collect", "collected", "slowed"]
    source.close()


def test_the_final_delta_gives_the_tasks_back_first() -> None:
    """Code comes apart from the rest: CRIU writes into it while it dumps."""
    low, high = executable_ranges(own_maps())[0]
    runs = np.array([[low - PAGE_BYTES, (high - low) // PAGE_BYTES + 2]], dtype=np.uint64)
    tracker = Tracker(runs)
    source, _ = make(tracker)
    delta = source.final_delta()
    assert tracker.calls == ["last", "collected", "detach"]
    ((task, code),) = delta.code
    assert (task, code.tolist()[0][0]) == (1, low)
    rest = [page for _, others in delta.rest for page in pages_of(others)]
    assert sorted(pages_of(code) + rest) == pages_of(runs)
    assert delta.size_bytes == PAGE_BYTES * len(pages_of(runs))
    source.close()


def test_closing_waits_for_a_collection_that_nobody_waits_for(memory: mmap.mmap) -> None:
    """A rollback can't stop the thread that is in the middle of it, and must not go between."""
    tracker = Tracker(np.array([[address_of(memory), 1]], dtype=np.uint64))
    tracker.go_on.clear()
    source, sender = make(tracker)
    failures: list[Exception] = []

    def collect() -> None:
        try:
            source.round()
        except (KeyError, CriuGlueError, TransferFailed) as error:
            # It looks at a task that is closed, by its list or by its descriptor; in truth its
            # sender has failed by then.
            failures.append(error)

    round_thread = threading.Thread(target=collect)
    round_thread.start()
    assert tracker.entered.wait(DEADLINE_S)
    closing = threading.Thread(target=source.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive()
    assert "detach" not in tracker.calls
    tracker.go_on.set()
    closing.join(DEADLINE_S)
    round_thread.join(DEADLINE_S)
    assert not closing.is_alive()
    assert not round_thread.is_alive()
    assert tracker.calls == ["collect", "collected", "detach"]
    assert (0, [], b"closed") in sender.sent


def test_after_the_end_nothing_is_tracked_any_more() -> None:
    tracker = Tracker(runs_of({1}), runs_of({1}))
    source, _ = make(tracker)
    source.close()
    for late in (source.round, source.final_delta):
        with pytest.raises(TransferFailed):
            late()
    source.close()
    assert set(tracker.calls) == {"detach"}
