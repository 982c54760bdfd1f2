"""The queue of the line: due times, order, what is lost and overtaken, its limit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.errors import LabError
from bench.lab.line import REORDER_S, Fault, LineQueue


def passed(queue: LineQueue, frames: list[bytes], gap_s: float) -> list[bytes]:
    """What leaves a queue when frames come at equal distances."""
    left: list[bytes] = []
    for number, frame in enumerate(frames):
        left += queue.pop_due(number * gap_s)
        queue.push(frame, number * gap_s)
    while (due_s := queue.due_s()) is not None:
        left += queue.pop_due(due_s)
    return left


def numbered(count: int) -> list[bytes]:
    return [number.to_bytes(4) for number in range(count)]


@given(
    gaps_s=st.lists(st.floats(0, 1), max_size=30),
    delay_ms=st.floats(0, 2000),
    step_s=st.floats(0.01, 0.5),
)
def test_every_frame_leaves_once_in_order_and_never_early(
    gaps_s: list[float], delay_ms: float, step_s: float
) -> None:
    queue = LineQueue(Fault(delay_ms))
    now_s = 0.0
    arrived_s: dict[bytes, float] = {}
    for number, gap_s in enumerate(gaps_s):
        now_s += gap_s
        frame = number.to_bytes(4)
        arrived_s[frame] = now_s
        assert queue.push(frame, now_s)
    left: list[bytes] = []
    clock_s = 0.0
    while queue.due_s() is not None:
        for frame in queue.pop_due(clock_s):
            assert clock_s >= arrived_s[frame] + delay_ms / 1000
            left.append(frame)
        clock_s += step_s
    assert left == list(arrived_s)
    assert queue.queued_bytes == 0


@given(reorder=st.floats(0, 1), seed=st.integers(0, 1 << 32), count=st.integers(0, 200))
def test_what_is_overtaken_arrives_all_the_same(reorder: float, seed: int, count: int) -> None:
    frames, gap_s = numbered(count), REORDER_S / 10
    left = passed(LineQueue(Fault(reorder=reorder, seed=seed)), frames, gap_s)
    assert sorted(left) == frames
    # By no more than were sent while it was held back.
    assert all(abs(at - int.from_bytes(frame)) <= 11 for at, frame in enumerate(left))


def test_a_share_is_overtaken() -> None:
    left = passed(LineQueue(Fault(reorder=0.05)), numbered(10_000), REORDER_S / 10)
    late = sum(after < before for before, after in itertools.pairwise(left))
    assert 300 < late < 700


@given(loss=st.floats(0, 1), seed=st.integers(0, 1 << 32))
def test_the_same_seed_loses_the_same_frames(loss: float, seed: int) -> None:
    runs = [passed(LineQueue(Fault(loss=loss, seed=seed)), numbered(100), 0.01) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0] == sorted(runs[0])


def test_a_share_is_lost() -> None:
    assert 9700 < len(passed(LineQueue(Fault(loss=0.02)), numbered(10_000), 0.01)) < 9900


def test_a_fault_can_change() -> None:
    queue = LineQueue(Fault(loss=1.0))
    assert not queue.push(b"lost", 0.0)
    queue.change(Fault(delay_ms=500))
    assert queue.push(b"late", 0.0)
    queue.change(Fault())
    assert queue.push(b"now", 0.1)
    assert list(queue.pop_due(0.1)) == [b"now"]
    assert list(queue.pop_due(0.5)) == [b"late"]


@pytest.mark.parametrize("wrong", [{"delay_ms": -1}, {"loss": 1.1}, {"reorder": -0.1}])
def test_faults_that_can_not_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LabError):
        Fault(**wrong)


def test_a_full_queue_drops_what_comes_and_takes_again_when_it_has_room() -> None:
    queue = LineQueue(Fault(1000), bytes_max=10)
    assert queue.push(b"x" * 6, 0.0)
    assert not queue.push(b"y" * 5, 0.0)
    assert queue.push(b"z" * 4, 0.0)
    assert list(queue.pop_due(0.999)) == []
    assert list(queue.pop_due(1.0)) == [b"x" * 6, b"z" * 4]
    assert queue.push(b"y" * 10, 1.0)
