"""Marks of two clocks into parts of one downtime, and how the clocks are related."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core.clock_relation import (
    MAX_SAMPLES,
    ClockRelation,
    PingSample,
    best_sample,
)
from migrate.core.downtime import DowntimeParts, Marks, MarksError, downtime_parts

SAME = ClockRelation(offset_us=0, error_us=0)
MARKS = Marks(
    unplug=1_000,
    frozen=1_010,
    dumped=1_130,
    final_acked=1_150,
    rootfs_done=1_155,
    held=1_260,
    commit=1_275,
    resumed=1_285,
)


def test_each_part_is_the_time_that_nothing_before_it_explains() -> None:
    parts = downtime_parts(MARKS, SAME)
    assert parts == DowntimeParts(10, 120, 20, 5, 105, 15, 10)
    assert parts.downtime_us == 285
    assert parts.stopped_us == 275


def test_what_ends_before_the_dump_costs_nothing() -> None:
    early = replace(MARKS, final_acked=1_020, rootfs_done=1_015)
    parts = downtime_parts(early, SAME)
    assert (parts.dump_us, parts.final_delta_us, parts.rootfs_us) == (120, 0, 0)
    assert parts.restore_us == 130
    assert parts.downtime_us == 285


def test_rootfs_counts_only_beyond_the_final_delta() -> None:
    parts = downtime_parts(replace(MARKS, final_acked=1_150, rootfs_done=1_140), SAME)
    assert (parts.final_delta_us, parts.rootfs_us) == (20, 0)
    parts = downtime_parts(replace(MARKS, final_acked=1_100, rootfs_done=1_200), SAME)
    assert (parts.final_delta_us, parts.rootfs_us) == (0, 70)


def test_a_migration_without_final_delta_and_rootfs() -> None:
    parts = downtime_parts(replace(MARKS, final_acked=None, rootfs_done=None), SAME)
    assert (parts.final_delta_us, parts.rootfs_us, parts.restore_us) == (0, 0, 130)


def test_the_target_has_its_own_clock() -> None:
    shift = 5_000_000_000
    marks = replace(
        MARKS, held=MARKS.held + shift, commit=MARKS.commit + shift, resumed=MARKS.resumed + shift
    )
    relation = ClockRelation(offset_us=shift, error_us=50)
    assert downtime_parts(marks, relation) == downtime_parts(MARKS, SAME)


def test_a_disorder_within_the_clocks_error_is_no_time() -> None:
    marks = replace(MARKS, rootfs_done=1_270)
    parts = downtime_parts(marks, ClockRelation(offset_us=0, error_us=10))
    assert parts.restore_us == 0
    assert parts.downtime_us == 270 + 15 + 10
    with pytest.raises(MarksError, match="10 µs before the source had sent everything"):
        downtime_parts(marks, ClockRelation(offset_us=0, error_us=9))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"frozen": 999}, "frozen is 1 µs before unplug"),
        ({"dumped": 1_009}, "dumped is 1 µs before frozen"),
        ({"final_acked": 1_000}, "final_acked is 10 µs before frozen"),
        ({"rootfs_done": 1_009}, "rootfs_done is 1 µs before frozen"),
        ({"commit": 1_259}, "commit is 1 µs before held"),
        ({"resumed": 1_274}, "resumed is 1 µs before commit"),
    ],
)
def test_a_wrong_order_on_one_clock_is_refused(change: dict[str, int], complaint: str) -> None:
    with pytest.raises(MarksError, match=complaint):
        downtime_parts(replace(MARKS, **change), ClockRelation(0, 1_000_000))


def test_marks_are_found_by_their_names() -> None:
    source = {"unplug": 1_000, "frozen": 1_010, "dumped": 1_130, "held": 1, "other": 5}
    target = {"held": 1_260, "commit": 1_275, "resumed": 1_285, "frozen": 1, "restore": 1_200}
    marks = Marks.from_names(source, target)
    assert marks == replace(MARKS, final_acked=None, rootfs_done=None)
    with pytest.raises(MarksError, match="commit"):
        Marks.from_names(source, {"held": 1, "resumed": 2})


def test_parts_in_milliseconds_have_the_names_of_the_report() -> None:
    named = downtime_parts(MARKS, SAME).as_ms()
    assert list(named) == [
        "freeze",
        "dump",
        "final_delta",
        "rootfs",
        "restore",
        "handover",
        "resume",
    ]
    assert named["dump"] == 0.12


spans = st.integers(0, 10**9)


@given(
    st.integers(0, 10**15),
    st.tuples(*[spans] * 7),
    st.integers(-(10**15), 10**15),
    st.none() | spans,
    st.none() | spans,
)
def test_parts_are_never_negative_and_sum_to_the_whole(
    start: int, lengths: tuple[int, ...], offset: int, final: int | None, rootfs: int | None
) -> None:
    freeze, dump, _, _, restore, handover, resume = lengths
    frozen = start + freeze
    dumped = frozen + dump
    final_acked = None if final is None else frozen + final
    rootfs_done = None if rootfs is None else frozen + rootfs
    ready = max(dumped, final_acked or 0, rootfs_done or 0)
    held = ready + restore + offset
    marks = Marks(
        unplug=start,
        frozen=frozen,
        dumped=dumped,
        final_acked=final_acked,
        rootfs_done=rootfs_done,
        held=held,
        commit=held + handover,
        resumed=held + handover + resume,
    )
    parts = downtime_parts(marks, ClockRelation(offset, 0))
    assert parts.downtime_us == marks.resumed - offset - start
    assert min(parts.as_ms().values()) >= 0
    assert (parts.dump_us, parts.restore_us) == (dump, restore)


# --- the clocks ---


def test_the_shortest_round_trip_decides() -> None:
    samples = [
        PingSample(0, 1_000_000_500, 2_000),
        PingSample(10_000, 1_000_010_100, 10_200),
        PingSample(20_000, 1_000_020_900, 21_000),
    ]
    assert best_sample(samples) is samples[1]
    relation = ClockRelation.from_samples(samples)
    assert relation == ClockRelation(offset_us=1_000_000_000, error_us=100)
    assert relation.to_source(1_000_010_100) == 10_100


def test_an_odd_round_trip_rounds_the_error_up() -> None:
    assert ClockRelation.from_samples([PingSample(0, 50, 3)]) == ClockRelation(49, 2)


def test_samples_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="0 clock samples"):
        ClockRelation.from_samples([])
    with pytest.raises(ValueError, match="before it left"):
        ClockRelation.from_samples([PingSample(5, 5, 4)])
    with pytest.raises(ValueError, match="samples"):
        ClockRelation.from_samples([PingSample(0, 0, 1)] * (MAX_SAMPLES + 1))


@given(
    st.integers(-(10**15), 10**15),
    st.lists(st.tuples(spans, st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1),
)
def test_the_true_offset_is_within_the_error(
    offset: int, pings: list[tuple[int, int, int]]
) -> None:
    """However unequal the two ways of a ping are."""
    samples = [PingSample(at, at + out + offset, at + out + back) for at, out, back in pings]
    relation = ClockRelation.from_samples(samples)
    assert abs(relation.offset_us - offset) <= relation.error_us
    assert relation.error_us == (min(out + back for _, out, back in pings) + 1) // 2


def test_more_samples_never_make_it_worse() -> None:
    chance = random.Random(7)
    samples: list[PingSample] = []
    errors: list[int] = []
    for at in range(50):
        out, back = chance.randrange(1000), chance.randrange(1000)
        samples.append(PingSample(at * 10_000, at * 10_000 + out, at * 10_000 + out + back))
        errors.append(ClockRelation.from_samples(samples).error_us)
    assert errors == sorted(errors, reverse=True)
