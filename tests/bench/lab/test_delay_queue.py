"""The queue of the delay line: order, due times, its limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bench.lab.delay_line import DelayQueue


@given(
    gaps_s=st.lists(st.floats(0, 1), max_size=30),
    delay_s=st.floats(0, 2),
    step_s=st.floats(0.01, 0.5),
)
def test_every_frame_leaves_once_in_order_and_never_early(
    gaps_s: list[float], delay_s: float, step_s: float
) -> None:
    queue = DelayQueue(delay_s)
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
            assert clock_s >= arrived_s[frame] + delay_s
            left.append(frame)
        clock_s += step_s
    assert left == list(arrived_s)
    assert queue.queued_bytes == 0


def test_a_full_queue_drops_what_comes_and_takes_again_when_it_has_room() -> None:
    queue = DelayQueue(delay_s=1.0, bytes_max=10)
    assert queue.push(b"x" * 6, 0.0)
    assert not queue.push(b"y" * 5, 0.0)
    assert queue.push(b"z" * 4, 0.0)
    assert list(queue.pop_due(0.999)) == []
    assert list(queue.pop_due(1.0)) == [b"x" * 6, b"z" * 4]
    assert queue.push(b"y" * 10, 1.0)
