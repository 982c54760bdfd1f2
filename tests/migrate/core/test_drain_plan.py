"""What moves next when hosts are emptied: rooms, orders, groups, retries, deadlines."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.core.drain_facts import HostState, Resident, Wishes, wishes_of
from migrate.core.drain_plan import LOOKS_MAX, TRIES_MAX, Limits, Outcome, Planner, forecast
from migrate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migrate.core.drain_facts import Move

GIB = 1 << 30
NOW_S = 0.0


def host(name: str, gib: float = 64, **others: Any) -> HostState:
    return HostState(name, int(gib * GIB), **{"free_cpus": 64.0, **others})


def resident(name: str, gib: float = 1, **others: Any) -> Resident:
    wishes = {key: others.pop(key) for key in Wishes.__slots__ if key in others}
    size = int(gib * GIB)
    given: dict[str, Any] = {"host": "S", "memory_bytes": size, "needed_bytes": size}
    return Resident(name, **{**given, "wishes": Wishes(**wishes), **others})


def planner(
    hosts: Sequence[HostState],
    containers: Sequence[Resident],
    limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Planner:
    return Planner([*hosts, host("S", closed="is drained")], containers, limits)


def pairs(moves: Sequence[Move]) -> list[tuple[str, str]]:
    return [(move.container, move.target) for move in moves]


def drive(plan: Planner) -> list[tuple[str, str]]:
    """Every move arrives, all that are under way at once; the moves in their order."""
    done = []
    while not plan.is_over:
        done += pairs(plan.next_moves(NOW_S))
        for name in list(plan.under_way):
            plan.ended(name, Outcome.ARRIVED, seconds=1.0)
    return done


def test_the_shortest_interruption_goes_first_and_priority_before_it() -> None:
    guests = [
        resident("big", 8, policy="stop-and-copy"),
        resident("small", 1),
        resident("dear", 8, policy="stop-and-copy", priority=1),
    ]
    assert [name for name, _ in drive(planner([host("A")], guests))] == ["dear", "small", "big"]


def test_what_small_moves_take_is_not_the_rate_of_large_ones() -> None:
    """Twenty seconds each, of which a quarter for a round of a megabyte: a program of an operator,
    a slow host. A link that carries less than presumed is seen to when enough was copied."""
    limits = Limits(deadline_s=1200.0, rate_bytes_s=100.0 * (1 << 20))
    small = [resident(name, 1 / 1024, priority=1) for name in "abc"]
    plan = planner([host("A")], [*small, resident("large", 1), resident("last", 1)], limits)
    seconds = []
    for taken_s, copied_s in (*[(20.0, 0.25)] * 3, (122.4, 102.4), (0.0, 0.0)):
        (move,) = plan.next_moves(0.0)
        seconds.append(move.seconds)
        plan.ended(move.container, Outcome.ARRIVED, seconds=taken_s, copied_s=copied_s)
    assert 30 < seconds[3] < 50
    assert 90 < seconds[4] < 122.4


def test_what_stood_still_for_longer_last_time_goes_later() -> None:
    """Whatever is usual for its size; not where it is moved otherwise."""
    guests = [
        resident("was-slow", 1, past_downtime_ms=9e9),
        resident("was-quick", 64, past_downtime_ms=1.0),
        resident("writes", 1, dirty_bytes_s=float(GIB)),
        resident("stops", 1, policy="stop-and-copy", past_downtime_ms=0.5),
        resident("new", 1),
    ]
    order = [name for name, _ in drive(planner([host("A", 200)], guests))]
    assert order == ["was-quick", "new", "writes", "stops", "was-slow"]


def test_so_many_at_once_as_source_and_target_may() -> None:
    guests = [resident(f"c{number}") for number in range(6)]
    plan = planner([host("A"), host("B")], guests, Limits(per_source=3, per_target=2))
    moves = plan.next_moves(NOW_S)
    assert len(moves) == 3
    assert sorted(move.target for move in moves) in (["A", "A", "B"], ["A", "B", "B"])
    assert plan.next_moves(NOW_S) == []
    plan.ended(moves[0].container, Outcome.ARRIVED)
    assert len(plan.next_moves(NOW_S)) == 1


def test_one_that_fails_is_tried_elsewhere_and_then_stays() -> None:
    plan = planner([host(name, 9 - number) for number, name in enumerate("ABCD")], [resident("c")])
    tried = []
    for _ in range(TRIES_MAX):
        (move,) = plan.next_moves(NOW_S)
        tried.append(move.target)
        plan.ended("c", Outcome.UNDONE, why="it writes too much")
    assert tried == ["A", "B", "C"]
    assert plan.is_over
    assert plan.stays == {"c": "it writes too much"}


def test_a_target_that_is_lost_gets_nothing_more_and_costs_no_try() -> None:
    plan = planner(
        [host("A", 9), host("B", 8)], [resident("c"), resident("d")], Limits(per_source=2)
    )
    assert pairs(plan.next_moves(NOW_S)) == [("c", "A"), ("d", "B")]
    plan.lose("A", "does not answer")
    plan.ended("c", Outcome.TARGET_LOST, why="gone")
    plan.ended("d", Outcome.ARRIVED)
    assert pairs(plan.next_moves(NOW_S)) == [("c", "B")]
    plan.ended("c", Outcome.TARGET_LOST, why="gone")
    assert plan.next_moves(NOW_S) == []
    assert "A: does not answer" in plan.stays["c"]


def test_what_is_held_is_not_touched_again() -> None:
    plan = planner([host("A"), host("B")], [resident("c")])
    plan.next_moves(NOW_S)
    plan.ended("c", Outcome.HELD, why="nobody knows")
    assert plan.is_over
    assert plan.stays == {"c": "nobody knows"}


@pytest.mark.parametrize(
    ("guest", "why"),
    [
        (resident("c", 80), "too little memory"),
        (resident("c", cpus=65.0), "too few processors"),
        (resident("c", runtime="crun"), "no containers of crun"),
        (resident("c", criu=(4, 3)), "an older CRIU"),
        (resident("c", architecture="riscv64"), "is x86_64"),
        (resident("c", bridges=frozenset({"br9"})), "bridge"),
        (resident("c", requires=frozenset({"ssd"})), "the label ssd"),
        (resident("c", spread="db"), "anti-affinity"),
        (resident("c", policy="leave"), "its policy"),
        (resident("c", blocked="io_uring"), "io_uring"),
    ],
)
def test_what_no_host_can_take_stays_and_says_why(guest: Resident, why: str) -> None:
    plan = planner([host("A", criu=(4, 2), spread=frozenset({"db"}))], [guest])
    assert drive(plan) == []
    assert why in plan.stays["c"]


def test_what_is_to_stop_needs_no_host() -> None:
    plan = planner([], [resident("c", policy="stop")])
    (move,) = plan.next_moves(NOW_S)
    assert (move.target, move.policy) == ("", "stop")
    plan.ended("c", Outcome.ARRIVED)
    assert plan.is_over
    assert not plan.stays


def test_a_group_goes_to_one_host_in_its_order_with_room_for_all() -> None:
    guests = [
        resident("web", 2, group="shop", order=2),
        resident("db", 6, group="shop", order=1),
        resident("other", 5, priority=-1),
    ]
    plan = planner([host("A", 9), host("B", 7)], guests, Limits(per_source=3, per_target=3))
    first = plan.next_moves(NOW_S)
    assert sorted(pairs(first)) == [("db", "A"), ("other", "B")]
    plan.ended("other", Outcome.ARRIVED)
    assert plan.next_moves(NOW_S) == []
    plan.ended("db", Outcome.ARRIVED)
    assert pairs(plan.next_moves(NOW_S)) == [("web", "A")]


def test_a_group_whose_first_one_stays_stays() -> None:
    guests = [resident("db", group="shop"), resident("web", group="shop", order=1)]
    plan = planner([host("A")], guests, Limits(per_source=2, per_target=2))
    assert pairs(plan.next_moves(NOW_S)) == [("db", "A")]
    plan.ended("db", Outcome.UNDONE, why="it can't")
    assert plan.next_moves(NOW_S) == []
    assert "it can't" in plan.stays["db"]
    assert "db" in plan.stays["web"]


def test_of_one_anti_affinity_there_is_one_on_each_host() -> None:
    guests = [resident(name, spread="db") for name in ("c", "d", "e")]
    plan = planner([host("A"), host("B")], guests, Limits(per_source=3, per_target=3))
    assert len({target for _, target in drive(plan)}) == 2
    assert len(plan.stays) == 1


def test_nothing_begins_that_the_deadline_would_cut_off() -> None:
    guests = [resident("small", 0.1), resident("huge", 50)]
    plan = planner([host("A")], guests, Limits(deadline_s=30.0))
    assert pairs([one.move for one in forecast(plan)]) == [("small", "A")]
    assert "the deadline" in plan.stays["huge"]


def test_a_deadline_that_small_ones_would_waste_is_given_to_the_long_one() -> None:
    sizes = {"long": 5.0, "c": 0.6, "d": 0.6, "e": 0.6, "f": 0.6}
    guests = [resident(name, gib) for name, gib in sizes.items()]
    limits = Limits(per_source=2, per_target=2, deadline_s=60.0)
    plan = planner([host("A")], guests, limits)
    assert {one.move.container for one in forecast(plan)} == set(sizes)
    assert not plan.stays


def test_what_is_free_now_counts_when_nothing_is_under_way() -> None:
    plan = planner([host("A", 9)], [resident("c", 4), resident("d", 4)])
    plan.next_moves(NOW_S)
    plan.see(host("A", 1))
    plan.ended("c", Outcome.ARRIVED)
    plan.see(host("A", 1))
    assert plan.next_moves(NOW_S) == []
    assert "A: has too little memory" in plan.stays["d"]


def test_one_that_is_cordoned_meanwhile_takes_nothing_more() -> None:
    plan = planner([host("A")], [resident("c"), resident("d")])
    plan.next_moves(NOW_S)
    plan.see(host("A", closed="is cordoned"))
    plan.ended("c", Outcome.ARRIVED)
    plan.next_moves(NOW_S)
    assert "is cordoned" in plan.stays["d"]


def test_a_drain_that_is_stopped_lets_what_is_under_way_end() -> None:
    plan = planner([host("A")], [resident("c"), resident("d")])
    plan.next_moves(NOW_S)
    plan.stop("cancelled")
    assert not plan.is_over
    plan.ended("c", Outcome.ARRIVED)
    assert plan.is_over
    assert plan.stays == {"d": "cancelled"}


def test_behind_thousands_that_no_host_can_take_the_last_one_still_moves() -> None:
    """More wait than one question looks at: the next goes on there, and nothing is forgotten."""
    crowd = [resident(f"c{number}", runtime="crun") for number in range(3 * LOOKS_MAX)]
    last = [resident(f"d{number}", priority=-1) for number in range(3)]
    hosts = [host("A"), host("B", labels=frozenset({"ssd"}))]
    long = resident("long", requires=frozenset({"ssd"}), priority=2)
    plan = planner(hosts, [long, resident("short", priority=1), *crowd, *last], Limits(2, 1))
    assert pairs(plan.next_moves(NOW_S)) == [("long", "B"), ("short", "A")]
    plan.ended("short", Outcome.ARRIVED)
    questions = 1
    while not (begun := plan.next_moves(NOW_S)):
        questions += 1
        assert questions < len(crowd), "it was never looked at"
    assert questions > 1
    plan.ended(begun[0].container, Outcome.ARRIVED)
    plan.ended("long", Outcome.ARRIVED)
    assert dict(drive(plan)).keys() | {begun[0].container} == {"d0", "d1", "d2"}
    assert plan.stays.keys() == {one.name for one in crowd}


# ---- any hosts, any containers, any failures ----


def books(hosts: dict[str, HostState], there: dict[str, dict[str, Resident]]) -> None:
    """An account of its own: no host has more than it can, at this moment."""
    for name, guests in there.items():
        kept = list(guests.values())
        assert sum(one.needed_bytes for one in kept) <= hosts[name].free_bytes
        assert sum(one.cpus for one in kept) <= hosts[name].free_cpus
        keys = [one.wishes.spread for one in kept if one.wishes.spread]
        assert len(keys) == len(set(keys))
        assert all(not one.wishes.requires - hosts[name].labels for one in kept)


LABELS = st.frozensets(st.sampled_from(["ssd", "gpu"]))
HOSTS = st.lists(
    st.builds(
        lambda gib, cpus, labels, is_closed: (gib, cpus, labels, "is cordoned" * is_closed),
        st.integers(0, 12),
        st.integers(0, 8),
        LABELS,
        st.booleans(),
    ),
    max_size=6,
)
GUESTS = st.lists(
    st.builds(
        lambda gib, cpus, source, wishes: (gib, cpus, source, wishes),
        st.integers(0, 6),
        st.integers(0, 3),
        st.sampled_from(["S", "T"]),
        st.builds(
            Wishes,
            policy=st.sampled_from(["live", "live", "stop-and-copy", "stop", "leave"]),
            priority=st.integers(-1, 1),
            group=st.sampled_from(["", "", "g", "h"]),
            order=st.integers(0, 2),
            spread=st.sampled_from(["", "", "x"]),
            requires=st.one_of(st.just(frozenset()), LABELS),
        ),
    ),
    max_size=14,
)


@given(HOSTS, GUESTS, st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_every_container_ends_somewhere_and_no_host_has_too_much(
    hosts: list[Any],
    guests: list[Any],
    per_source: int,
    per_target: int,
    chance: random.Random,
) -> None:
    targets = {
        f"H{number}": HostState(f"H{number}", gib * GIB, float(cpus), labels=labels, closed=closed)
        for number, (gib, cpus, labels, closed) in enumerate(hosts)
    }
    containers = [
        resident(f"c{number}", gib, cpus=float(cpus), host=source)
        for number, (gib, cpus, source, _) in enumerate(guests)
    ]
    containers = [
        Resident(**{**{key: getattr(one, key) for key in Resident.__slots__}, "wishes": wishes})
        for one, (*_, wishes) in zip(containers, guests, strict=True)
    ]
    known = {one.name: one for one in containers}
    drained = [host("S", closed="is drained"), host("T", closed="is drained")]
    plan = Planner([*targets.values(), *drained], containers, Limits(per_source, per_target))
    there: dict[str, dict[str, Resident]] = {name: {} for name in targets}
    under_way: dict[str, Move] = {}
    gone: set[str] = set()
    lost: set[str] = set()
    tries = dict.fromkeys(known, 0)
    for _ in range(10 * (1 + len(containers)) * (1 + len(targets))):
        if plan.is_over:
            break
        for move in plan.next_moves(NOW_S):
            assert move.container not in gone | under_way.keys()
            assert move.target not in lost
            under_way[move.container] = move
            if move.target:
                assert not targets[move.target].closed
                there[move.target][move.container] = known[move.container]
        books(targets, there)
        for ends in (
            [move.target for move in under_way.values()],
            [move.source for move in under_way.values()],
        ):
            counts = Counter(name for name in ends if name)
            assert max(counts.values(), default=0) <= max(per_source, per_target)
        if not under_way:
            continue
        name = chance.choice(sorted(under_way))
        move = under_way.pop(name)
        outcome = chance.choice([Outcome.ARRIVED] * 3 + [Outcome.UNDONE, Outcome.TARGET_LOST])
        if outcome is Outcome.TARGET_LOST and move.target:
            lost.add(move.target)
            plan.lose(move.target, "does not answer")
        if outcome is Outcome.ARRIVED:
            gone.add(name)
        else:
            tries[name] += outcome is Outcome.UNDONE
            there.get(move.target, {}).pop(name, None)
        plan.ended(name, outcome, why="failed")
    assert plan.is_over
    assert gone | plan.stays.keys() == known.keys()
    assert not gone & plan.stays.keys()
    assert all(count <= TRIES_MAX for count in tries.values())


# ---- annotations ----


def test_annotations_say_what_a_container_wants() -> None:
    said = {
        "migrate.policy": "stop-and-copy",
        "migrate.priority": "-5",
        "migrate.group": "shop",
        "migrate.order": "2",
        "migrate.anti-affinity": "db",
        "migrate.requires": "ssd,zone=a",
        "migrate.dirty-rate": "3",
        "org.other": "x",
    }
    assert wishes_of(said) == Wishes(
        "stop-and-copy", -5, "shop", 2, "db", frozenset({"ssd", "zone=a"}), 3.0 * (1 << 20)
    )
    assert wishes_of({}) == Wishes()


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("policy", "move"),
        ("priority", "high"),
        ("priority", "1001"),
        ("order", "-1"),
        ("group", "a b"),
        ("anti-affinity", "x" * 65),
        ("requires", "a,/b"),
        ("requires", ",".join(f"w{number}" for number in range(17))),
        ("dirty-rate", "1e3"),
    ],
)
def test_an_annotation_that_is_not_understood_is_refused_by_its_name(key: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"migrate.{key}"):
        wishes_of({f"migrate.{key}": text})
