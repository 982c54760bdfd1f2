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
    PACE_NOISE,
    RESTORE_EAGER_MS_PER_GIB,
    SETTLE_MS,
    SETTLE_ROUND_TRIPS,
    STARTED_CPU_MS,
    Workload,
    pace,
    predict,
)
from migrate.core.rounds_seen import PAGE_BYTES, History
from tests.migrate.core.rounds import MIB, Round, histories, history, memories

CONTAINER = Workload(memory_bytes=GIB)


@dataclass(frozen=True)
class Move:
    """One that was measured. rate_bytes_s: what its rounds had told of the way."""

    name: str
    workload: Workload
    remaining_bytes: int
    rate_bytes_s: int
    downtime_ms: float


MOVES = (
    Move(
        "memory 16 MiB, 50 MiB/s, unshaped",
        Workload(
            memory_bytes=17084416,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=26,
            lazy=True,
            round_trip_ms=0.44,
            pace=1.0,
            busy=0.04,
        ),
        remaining_bytes=828731,
        rate_bytes_s=296016651,
        downtime_ms=118,
    ),
    Move(
        "memory 256 MiB, 50 MiB/s, unshaped",
        Workload(
            memory_bytes=268988416,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=26,
            lazy=True,
            round_trip_ms=0.33,
            pace=1.0,
            busy=0.05,
        ),
        remaining_bytes=4945218,
        rate_bytes_s=244399994,
        downtime_ms=140,
    ),
    Move(
        "memory 256 MiB, 50 MiB/s, unshaped, eager",
        Workload(
            memory_bytes=268992512,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=26,
            lazy=False,
            round_trip_ms=0.27,
            pace=1.0,
            busy=0.04,
        ),
        remaining_bytes=3032853,
        rate_bytes_s=397231877,
        downtime_ms=273,
    ),
    Move(
        "memory 1024 MiB, 50 MiB/s, unshaped",
        Workload(
            memory_bytes=1075085312,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=25,
            lazy=True,
            round_trip_ms=0.39,
            pace=1.0,
            busy=0.07,
        ),
        remaining_bytes=23101440,
        rate_bytes_s=183271218,
        downtime_ms=175,
    ),
    Move(
        "memory 4096 MiB, 50 MiB/s, unshaped",
        Workload(
            memory_bytes=4299452416,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=25,
            lazy=True,
            round_trip_ms=0.51,
            pace=1.0,
            busy=0.07,
        ),
        remaining_bytes=14356440,
        rate_bytes_s=164155708,
        downtime_ms=292,
    ),
    Move(
        "memory 256 MiB, 50 MiB/s, 1 Gbit/s",
        Workload(
            memory_bytes=268984320,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=26,
            lazy=True,
            round_trip_ms=0.28,
            pace=1.0,
            busy=0.06,
        ),
        remaining_bytes=11809495,
        rate_bytes_s=117794840,
        downtime_ms=201,
    ),
    Move(
        "memory 64 MiB, 2 MiB/s, 100 Mbit/s, 20 ms",
        Workload(
            memory_bytes=67465216,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=26,
            lazy=True,
            round_trip_ms=41.63,
            pace=1.0,
            busy=0.03,
        ),
        remaining_bytes=503205,
        rate_bytes_s=11472999,
        downtime_ms=393,
    ),
    Move(
        "memory 256 MiB, 0 MiB/s, unshaped",
        Workload(
            memory_bytes=268726272,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=26,
            lazy=True,
            round_trip_ms=0.4,
            pace=1.0,
            busy=0.03,
        ),
        remaining_bytes=36864,
        rate_bytes_s=384123757,
        downtime_ms=138,
    ),
    Move(
        "memory 256 MiB, 200 MiB/s, unshaped",
        Workload(
            memory_bytes=268988416,
            shared_bytes=0,
            unwatched_bytes=20480,
            tasks=1,
            threads=5,
            mappings=26,
            lazy=True,
            round_trip_ms=0.52,
            pace=1.0,
            busy=0.08,
        ),
        remaining_bytes=59450418,
        rate_bytes_s=299645715,
        downtime_ms=280,
    ),
    Move(
        "redis 256 MiB, 8 MiB/s, unshaped",
        Workload(
            memory_bytes=348037120,
            shared_bytes=0,
            unwatched_bytes=1142784,
            tasks=1,
            threads=6,
            mappings=105,
            lazy=True,
            round_trip_ms=0.6,
            pace=1.15,
            busy=0.15,
        ),
        remaining_bytes=5057934,
        rate_bytes_s=364013490,
        downtime_ms=221,
    ),
    Move(
        "redis 256 MiB, 8 MiB/s, unshaped",
        Workload(
            memory_bytes=348049408,
            shared_bytes=0,
            unwatched_bytes=1142784,
            tasks=1,
            threads=6,
            mappings=105,
            lazy=True,
            round_trip_ms=0.95,
            pace=1.07,
            busy=0.21,
        ),
        remaining_bytes=8861813,
        rate_bytes_s=195565697,
        downtime_ms=223,
    ),
    Move(
        "redis 1024 MiB, 8 MiB/s, unshaped",
        Workload(
            memory_bytes=1382653952,
            shared_bytes=0,
            unwatched_bytes=1142784,
            tasks=1,
            threads=6,
            mappings=106,
            lazy=True,
            round_trip_ms=0.33,
            pace=1.03,
            busy=0.15,
        ),
        remaining_bytes=12496120,
        rate_bytes_s=173467812,
        downtime_ms=287,
    ),
    Move(
        "nginx 16 MiB, 0 MiB/s, unshaped",
        Workload(
            memory_bytes=4775936,
            shared_bytes=4096,
            unwatched_bytes=2371584,
            tasks=3,
            threads=3,
            mappings=179,
            lazy=True,
            round_trip_ms=0.24,
            pace=1.0,
            busy=0.2,
        ),
        remaining_bytes=88466,
        rate_bytes_s=134944944,
        downtime_ms=203,
    ),
    Move(
        "web 64 MiB, 0 MiB/s, unshaped",
        Workload(
            memory_bytes=317751296,
            shared_bytes=0,
            unwatched_bytes=2265088,
            tasks=4,
            threads=13,
            mappings=215,
            lazy=True,
            round_trip_ms=0.28,
            pace=1.0,
            busy=0.46,
        ),
        remaining_bytes=9549113,
        rate_bytes_s=559786865,
        downtime_ms=241,
    ),
    Move(
        "postgres 128 MiB, 0 MiB/s, unshaped",
        Workload(
            memory_bytes=146264064,
            shared_bytes=103407616,
            unwatched_bytes=21872640,
            tasks=15,
            threads=15,
            mappings=2854,
            lazy=True,
            round_trip_ms=2.18,
            pace=1.0,
            busy=0.5,
        ),
        remaining_bytes=3009253,
        rate_bytes_s=130558696,
        downtime_ms=1096,
    ),
)
"""The middle one of each row of docs/bench/results.jsonl of 2026-11-23, in the order of its moves,
with what its report says that it was predicted from."""


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
def test_a_move_that_was_measured_is_predicted_within_a_quarter(move: Move) -> None:
    pages = GIB // PAGE_BYTES
    past = History([Round(pages, 1000 * GIB / move.rate_bytes_s)])
    found = predict(past, move.workload, move.remaining_bytes)
    assert found.downtime_ms == pytest.approx(move.downtime_ms, rel=0.25)


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


def test_the_pace_grows_with_what_a_start_takes_beyond_noise() -> None:
    assert pace(STARTED_CPU_MS) == 1.0
    assert pace(PACE_NOISE * STARTED_CPU_MS) == pytest.approx(1.0)
    assert pace(STARTED_CPU_MS / PACE_NOISE) == pytest.approx(1.0)
    assert pace(10 * STARTED_CPU_MS) == pytest.approx(10 / PACE_NOISE)
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
        found = predict(past, kept, 30 * MIB)
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
