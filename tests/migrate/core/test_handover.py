"""Never two, never none: the two machines in every world that faults can lead them into."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.migrate.core.handover_world import (
    START,
    Protocol,
    Search,
    Violation,
    check,
    faults,
    settled,
    steps,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.migrate.core.handover_world import World

FAULTS = 2
"""In the complete search: about 180 000 worlds. It has been run with 3 as well (1.3 million)."""

WALKS = 60
WALK_FAULTS = 8
SETTLING_STEPS = 3000
"""A walk that takes chances needs some hundred steps to settle; this is far beyond any."""


def test_without_faults_every_run_ends_done_on_both_sides() -> None:
    search = Search(Protocol(), faults=0)
    search.run()
    assert [(end.source.state, end.target.state) for end in search.ends] == [("done", "done")]
    assert all(settled(end) for end in search.ends)


def test_with_faults_no_two_run_none_is_lost_and_all_can_settle() -> None:
    search = Search(Protocol(), FAULTS)
    search.run()
    stuck = search.unsettleable()
    assert not stuck, search.way(stuck[0])
    assert all(settled(end) for end in search.ends)
    # The search has been everywhere, so that the rules above were checked where it matters.
    assert {world.source.state for world in search.worlds} >= {
        *("in_doubt", "aborted", "done", "lost")
    }
    assert {world.target.state for world in search.worlds} >= {"in_doubt", "aborted", "done"}
    given_back = [
        world
        for world in search.worlds
        if world.source.log == "rolling_back" and world.target.log == "committed"
    ]
    assert not given_back
    assert len(search.worlds) > 50_000


@pytest.mark.parametrize("seed", range(WALKS))
def test_walks_with_many_faults_settle(seed: int) -> None:
    protocol, chance = Protocol(), random.Random(seed)
    world, way = START._replace(faults=WALK_FAULTS), []
    for _ in range(SETTLING_STEPS):
        bad = faults(protocol, world)
        choices = bad if bad and chance.random() < 0.08 else steps(protocol, world)
        if not choices and settled(world):
            break
        label, world = chance.choice(choices)
        way.append(label)
        try:
            check(protocol, world)
        except Violation as violation:
            pytest.fail(f"seed {seed}: {violation}\n" + "\n".join(way))
    assert settled(world), f"seed {seed}: {world}"


# --- the search finds what is wrong, shown by protocols that are ---


def _source(state: str, kind: str, after: str, *acts: str) -> Callable[[Protocol], None]:
    def change(protocol: Protocol) -> None:
        protocol.source[state, kind] = (after, acts)

    return change


def _target(state: str, kind: str, after: str, *acts: str) -> Callable[[Protocol], None]:
    def change(protocol: Protocol) -> None:
        protocol.target[state, kind] = (after, acts)

    return change


def _commit_behind_a_rollback(protocol: Protocol) -> None:
    protocol.source_follow["rolling_back"].add("committed")
    protocol.source_follow["aborted"].add("committed")


def _restart_forgets_the_commit(protocol: Protocol) -> None:
    protocol.source_recovery["committed", "recovery"] = ("rolling_back", ("rollback",))


def _restart_undoes_what_is_gone(protocol: Protocol) -> None:
    protocol.source_recovery_without_tree["frozen", "recovery"] = ("rolling_back", ("rollback",))


def _guard_thaws_a_committed_tree(protocol: Protocol) -> None:
    protocol.source_verdicts["committed"] = "undo"


def _guard_kills_a_committed_tree(protocol: Protocol) -> None:
    protocol.source_verdicts["committed"] = "let_go"


def _agent_speaks_for_a_living_coordinator(protocol: Protocol) -> None:
    protocol.decided.add("committed")


def _holder_lets_an_uncommitted_copy_go(protocol: Protocol) -> None:
    protocol.target_verdicts["prepared"] = "let_go"


def _target_restart_drops_a_committed_copy(protocol: Protocol) -> None:
    protocol.target_recovery["committed", "recovery"] = ("aborting", ("discard",))


def _target_forgets_that_it_may_hold(protocol: Protocol) -> None:
    protocol.target_recorded.discard("prepared")


UNSAFE = {
    "resumes when the link breaks": _target("held", "link_lost", "committed", "resume"),
    "resumes before the record": _target("held", "commit_received", "committed", "resume"),
    "resumes when the source is undecided": _target(
        "in_doubt", "source_undecided", "committed", "resume"
    ),
    "discards what it runs": _target("running", "link_lost", "aborting", "discard"),
    "sends the commit before the record": _source(
        "restoring", "target_held", "committed", "send_commit", "record_commit"
    ),
    "lets its tree die with the commit": _source(
        "held", "commit_recorded", "releasing", "send_commit", "release"
    ),
    "rolls back when the link breaks": _source(
        "committed", "link_lost", "rolling_back", "rollback"
    ),
    "rolls back without evidence": _source("in_doubt", "link_back", "rolling_back", "rollback"),
    "rolls back when cancelled": _source("committed", "cancelled", "rolling_back", "rollback"),
    "cannot be cancelled while held": _source("held", "cancelled", "held"),
    "does not expect a late dump": lambda protocol: protocol.source.__delitem__(
        ("rolling_back", "dumped")
    ),
    "records a commit behind a rollback": _commit_behind_a_rollback,
    "forgets the commit": _restart_forgets_the_commit,
    "gives back what went down with its host": _restart_undoes_what_is_gone,
    "thaws a committed tree": _guard_thaws_a_committed_tree,
    "kills a committed tree": _guard_kills_a_committed_tree,
    "speaks for a coordinator that lives": _agent_speaks_for_a_living_coordinator,
    "lets a copy go that is not committed": _holder_lets_an_uncommitted_copy_go,
    "drops a committed copy": _target_restart_drops_a_committed_copy,
    "forgets that it may hold": _target_forgets_that_it_may_hold,
}


@pytest.mark.parametrize("flaw", UNSAFE)
def test_search_finds_what_is_unsafe(flaw: str) -> None:
    protocol = Protocol()
    UNSAFE[flaw](protocol)

    def search_until_found() -> None:
        for budget in range(FAULTS + 1):
            Search(protocol, budget).run()

    with pytest.raises(Violation):
        search_until_found()


STUCK: dict[str, Callable[[Protocol], object]] = {
    "does not commit to the only copy": _source("lost", "target_held", "lost", "hold"),
    "does not take the container back": _source("in_doubt", "target_aborted", "in_doubt", "hold"),
    "does not ask again": lambda protocol: (
        _source("in_doubt", "deadline_passed", "in_doubt", "hold")(protocol),
        _source("in_doubt", "link_back", "in_doubt", "hold")(protocol),
        _target("in_doubt", "deadline_passed", "in_doubt", "hold")(protocol),
        _target("in_doubt", "link_back", "in_doubt", "hold")(protocol),
    ),
    "does not resume after a restart": lambda protocol: protocol.target_recovery.__setitem__(
        ("committed", "recovery"), ("committed", ("hold",))
    ),
}


@pytest.mark.parametrize("flaw", STUCK)
def test_search_finds_what_never_settles(flaw: str) -> None:
    protocol = Protocol()
    STUCK[flaw](protocol)
    search = Search(protocol, faults=1)
    search.run()
    assert search.unsettleable()


def test_a_violation_shows_the_way_to_it() -> None:
    protocol = Protocol()
    UNSAFE["rolls back when the link breaks"](protocol)
    with pytest.raises(Violation, match=r"(?s)\nsource << !lost\n.*World\("):
        Search(protocol, faults=1).run()


def test_start_is_not_settled() -> None:
    world: World = START
    assert not settled(world)
