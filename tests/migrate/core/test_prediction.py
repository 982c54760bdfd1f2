"""The prediction: moves that were measured, and what each input does to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.core.prediction import (
    COLLECT_MS,
    DUMP_SHARED_MS_PER_GIB,
    GIB,
    HANDOVER_MS,
    PACE_MAX,
    PACE_MIN,
    PREPARED_MS,
    RESTORE_EAGER_MS_PER_GIB,
    SETTLE_MS,
    SETTLE_ROUND_TRIPS,
    Workload,
    pace,
    predict,
)
from migrate.core.rounds_seen import History
from tests.migrate.core.rounds import MIB, Round, histories, history, memories

CONTAINER = Workload(memory_bytes=GIB)


@dataclass(frozen=True)
class Move:
    """One that was measured. rounds: (pages with content, ms) of each until the freeze, the last
    of which was begun `wait_ms` after the one before, when both sides had made ready."""

    name: str
    workload: Workload
    rounds: tuple[tuple[int, float], ...]
    wait_ms: float
    prepared_ms: float
    downtime_ms: float


MOVES = (
    Move(
        "memory 16 MiB, 50 MiB/s, unshaped",
        Workload(
            memory_bytes=16896000,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        ((4120, 54.2), (3006, 48.7)),
        wait_ms=394,
        prepared_ms=327,
        downtime_ms=165,
    ),
    Move(
        "memory 1024 MiB, 50 MiB/s, unshaped",
        Workload(
            memory_bytes=1074896896,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        ((262421, 3396.1), (20904, 403.0), (5037, 103.7), (6799, 119.9)),
        wait_ms=416,
        prepared_ms=346,
        downtime_ms=224,
    ),
    Move(
        "redis 256 MiB, 8 MiB/s, unshaped",
        Workload(
            memory_bytes=347336704,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=6,
            mappings=105,
            unwatched_bytes=1142784,
            busy=0.3,
        ),
        ((84520, 2087.3), (1163, 104.9), (2876, 139.4)),
        wait_ms=663,
        prepared_ms=551,
        downtime_ms=324,
    ),
    Move(
        "redis 1024 MiB, 8 MiB/s, unshaped",
        Workload(
            memory_bytes=1380356096,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=6,
            mappings=105,
            unwatched_bytes=1142784,
            busy=0.3,
        ),
        ((336722, 8739.8), (2762, 109.2), (4320, 158.5)),
        wait_ms=678,
        prepared_ms=562,
        downtime_ms=487,
    ),
    Move(
        "memory 4096 MiB, 50 MiB/s, unshaped",
        Workload(
            memory_bytes=4299264000,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        ((1049620, 20283.3), (139076, 3363.8), (38564, 807.2), (19653, 373.8)),
        wait_ms=674,
        prepared_ms=559,
        downtime_ms=524,
    ),
    Move(
        "memory 256 MiB, 50 MiB/s, unshaped",
        Workload(
            memory_bytes=268800000,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        ((65620, 960.3), (5991, 154.2), (7385, 157.6)),
        wait_ms=467,
        prepared_ms=388,
        downtime_ms=246,
    ),
    Move(
        "memory 256 MiB, 50 MiB/s, unshaped, eager restore",
        Workload(
            memory_bytes=268800000,
            lazy=False,
            round_trip_ms=0.3,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        ((65620, 908.4), (5382, 117.2), (1481, 37.4), (5309, 101.7)),
        wait_ms=387,
        prepared_ms=322,
        downtime_ms=443,
    ),
    Move(
        "nginx 16 MiB, 0 MiB/s, unshaped",
        Workload(
            memory_bytes=4771840,
            lazy=True,
            round_trip_ms=0.3,
            tasks=3,
            threads=3,
            mappings=179,
            unwatched_bytes=2371584,
            busy=0.35,
        ),
        ((586, 15.4), (23, 5.2)),
        wait_ms=572,
        prepared_ms=475,
        downtime_ms=240,
    ),
    Move(
        "web 64 MiB, 0 MiB/s, unshaped",
        Workload(
            memory_bytes=317554688,
            lazy=True,
            round_trip_ms=0.3,
            tasks=4,
            threads=13,
            mappings=215,
            unwatched_bytes=2265088,
            busy=0.3,
        ),
        ((76975, 1716.6), (486, 34.0), (460, 155.4)),
        wait_ms=589,
        prepared_ms=489,
        downtime_ms=348,
    ),
    Move(
        "postgres 128 MiB, 0 MiB/s, unshaped",
        Workload(
            memory_bytes=174321664,
            lazy=True,
            round_trip_ms=0.3,
            tasks=15,
            threads=15,
            mappings=2817,
            unwatched_bytes=21872640,
            shared_bytes=132984832,
            busy=0.35,
        ),
        ((4752, 155.9), (396, 30.2), (372, 29.2), (388, 24.0), (520, 48.8)),
        wait_ms=943,
        prepared_ms=783,
        downtime_ms=1630,
    ),
    Move(
        "memory 256 MiB, 0 MiB/s, unshaped",
        Workload(
            memory_bytes=268541952,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        ((65557, 938.9), (7, 1.8), (7, 4.0)),
        wait_ms=425,
        prepared_ms=353,
        downtime_ms=222,
    ),
    Move(
        "memory 256 MiB, 200 MiB/s, unshaped",
        Workload(
            memory_bytes=268800000,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        (
            (65620, 974.5),
            (23385, 494.7),
            (16198, 354.9),
            (14202, 290.3),
            (12268, 205.1),
            (24489, 538.3),
        ),
        wait_ms=406,
        prepared_ms=338,
        downtime_ms=562,
    ),
    Move(
        "memory 256 MiB, 50 MiB/s, 1 Gbit/s",
        Workload(
            memory_bytes=268804096,
            lazy=True,
            round_trip_ms=0.3,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        ((65621, 2260.3), (13675, 472.6), (4772, 170.6), (7733, 272.5)),
        wait_ms=469,
        prepared_ms=389,
        downtime_ms=277,
    ),
    Move(
        "memory 64 MiB, 2 MiB/s, 100 Mbit/s, 20 ms",
        Workload(
            memory_bytes=67276800,
            lazy=True,
            round_trip_ms=41,
            tasks=1,
            threads=5,
            mappings=26,
            unwatched_bytes=20480,
            busy=0.03,
        ),
        ((16420, 5908.4), (1644, 660.9), (355, 236.3), (590, 248.9)),
        wait_ms=912,
        prepared_ms=348,
        downtime_ms=453,
    ),
)
"""The third of five of each row of docs/bench/results.jsonl of 2026-11-23. Threads, mappings and
the bytes of pg's segments were looked at in containers like those. prepared_ms was not kept: it is
0.83 of what passed between the announcement and the last round, without it, as in 12 moves that
kept both (0.77 to 0.89). busy is a guess by what each does."""


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
def test_a_move_that_was_measured_is_predicted_within_a_quarter(move: Move) -> None:
    past = History([Round(number, ms) for number, ms in move.rounds[:-1]])
    number, ms = move.rounds[-1]
    past.add(Round(number, ms), wait_ms=move.wait_ms)
    workload = replace(move.workload, pace=pace(move.prepared_ms))
    left = past.dirtied_bytes(ms, workload.private_bytes)
    assert predict(past, workload, left).downtime_ms == pytest.approx(move.downtime_ms, rel=0.25)


def test_the_parts_are_the_whole() -> None:
    found = predict(history((1024, 1000)), CONTAINER, 50 * MIB)
    parts = [getattr(found, name) for name in found.__slots__]
    assert found.downtime_ms == pytest.approx(sum(parts))
    assert all(part > 0 for part in parts if part != found.rootfs_ms)


def test_a_slower_machine_is_slower_in_everything() -> None:
    """But for what the link takes, which was measured."""
    fast, slow = (predict(History(), replace(CONTAINER, pace=by), 0) for by in (1.0, 2.0))
    assert slow.dump_ms == 2 * fast.dump_ms
    assert slow.resume_ms == 2 * fast.resume_ms
    assert slow.downtime_ms < 2 * fast.downtime_ms


def test_the_pace_grows_with_what_the_preparations_take() -> None:
    assert pace(PREPARED_MS) == 1.0
    assert 1.0 < pace(2 * PREPARED_MS) < 1.5
    assert pace(10 * PREPARED_MS) == pytest.approx(5.0)
    assert (pace(0.0), pace(1e9)) == (PACE_MIN, PACE_MAX)


def test_round_trips_count_where_one_side_waits_for_the_other() -> None:
    near, far = (predict(History(), replace(CONTAINER, round_trip_ms=ms), 0) for ms in (0.0, 40.0))
    assert far.dump_ms == near.dump_ms
    assert far.handover_ms == HANDOVER_MS + 40
    assert far.final_delta_ms == near.final_delta_ms + 40 * SETTLE_ROUND_TRIPS
    assert far.downtime_ms == pytest.approx(near.downtime_ms + 40 * (SETTLE_ROUND_TRIPS + 2.5))


def test_threads_and_tasks_are_dumped_and_restored_one_by_one() -> None:
    one, many = (
        predict(History(), replace(CONTAINER, tasks=n, threads=n, mappings=100 * n), 0)
        for n in (1, 16)
    )
    assert many.dump_ms > one.dump_ms + 15 * 3
    assert many.restore_ms > one.restore_ms + 15 * 4


def test_the_final_delta_counts_with_what_it_takes_longer_than_the_dump() -> None:
    past = history((1000, 1000))
    little, more, much = (predict(past, CONTAINER, n * MIB) for n in (0, 50, 1000))
    settle_ms = SETTLE_MS + 0.5 * SETTLE_ROUND_TRIPS
    assert little.final_delta_ms == more.final_delta_ms == pytest.approx(settle_ms)
    assert much.final_delta_ms == pytest.approx(1000 + COLLECT_MS - much.dump_ms + settle_ms)
    # What is sent beside the dump makes it longer, but not without end.
    assert little.dump_ms < more.dump_ms < much.dump_ms
    assert predict(past, CONTAINER, 2000 * MIB).dump_ms == much.dump_ms


def test_what_nobody_watched_is_sent_behind_the_dump() -> None:
    past = history((1000, 1000))
    unwatched = replace(CONTAINER, unwatched_bytes=20 * MIB)
    assert predict(past, unwatched, 0).final_delta_ms == pytest.approx(
        predict(past, CONTAINER, 0).final_delta_ms + 20
    )


def test_a_container_that_stands_still_leaves_its_processors_to_the_sender() -> None:
    past = history((1000, 1000))
    took = [
        predict(past, Workload(GIB, GIB, busy=busy), 0).final_delta_ms - SETTLE_MS
        for busy in (0.0, 0.2, 0.5, 0.9)
    ]
    assert took[1] == pytest.approx(took[0] * 0.8, rel=0.01)
    assert took[2] == took[3] == pytest.approx(took[0] * 0.5, rel=0.01)


def test_shared_memory_is_dumped_sent_and_restored_in_the_downtime() -> None:
    past = history((1000, 1000))
    private, shared = (predict(past, Workload(2 * GIB, some), 0) for some in (0, GIB))
    assert shared.dump_ms > private.dump_ms + 0.8 * DUMP_SHARED_MS_PER_GIB
    assert shared.restore_ms == pytest.approx(private.restore_ms + RESTORE_EAGER_MS_PER_GIB)
    assert shared.final_delta_ms == pytest.approx(private.final_delta_ms + 1024)


def test_an_eager_restore_depends_on_memory() -> None:
    eager = replace(CONTAINER, lazy=False)
    assert predict(History(), eager, 0).restore_ms > RESTORE_EAGER_MS_PER_GIB


def test_what_is_kept_on_this_host_waits_for_no_link_and_no_restore() -> None:
    kept = replace(CONTAINER, is_kept=True)
    for past in (history((1000, 1000)), history((100, 100_000))):
        found = predict(past, kept, 50 * MIB)
        assert (found.final_delta_ms, found.restore_ms, found.handover_ms) == (0, 0, 0)
        assert predict(past, kept, 500 * MIB).final_delta_ms == pytest.approx(1000 - found.dump_ms)


@settings(max_examples=200)
@given(histories, memories, st.integers(0, GIB), st.integers(0, GIB))
def test_more_left_never_predicts_less_downtime(
    past: History, memory_bytes: int, some: int, more: int
) -> None:
    workload = Workload(memory_bytes=memory_bytes)
    less = predict(past, workload, some).downtime_ms
    assert predict(past, workload, some + more).downtime_ms >= less - 1e-6


@settings(max_examples=200)
@given(histories, memories, st.integers(0, GIB), st.booleans())
def test_more_memory_never_predicts_less_downtime(
    past: History, memory_bytes: int, more: int, lazy: bool
) -> None:
    """At the same time left to send after the dump: a longer dump may hide the sending."""
    small = predict(past, Workload(memory_bytes=memory_bytes, lazy=lazy), 0)
    large = predict(past, Workload(memory_bytes=memory_bytes + more, lazy=lazy), 0)
    assert large.downtime_ms >= small.downtime_ms - 1e-6
