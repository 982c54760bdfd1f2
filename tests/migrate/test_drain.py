"""Around a drain: cordons, the operator's programs, the unit, and who gets a container back."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from migrate import cordon, drain, drain_history, drain_hooks, drain_state
from migrate.agent.drains import Drains
from migrate.claim import Claim
from migrate.config import HostPaths
from migrate.core import messages
from migrate.core.drain_facts import HostState, Resident
from migrate.drain_moves import Look, Moves
from migrate.drain_others import Others
from migrate.drain_report import exit_code, lines, progress
from migrate.drain_unit import unit_text
from migrate.errors import MigrateError, UsageError
from migrate.journal import Journal, JournalWriter, Migration
from migrate.policy import PolicyFile
from migrate.report import write_report
from migrate.told_rate import ToldRate, tell
from tests.lab.waiting import wait_until
from tests.migrate.stage import RECEIVED
from tests.migrate.test_report import moved
from transport.pace import Pace

if TYPE_CHECKING:
    from collections.abc import Callable

    from migrate.report import Report

TAKEN = (*RECEIVED, "committed")


@pytest.fixture
def paths(tmp_path: Path) -> HostPaths:
    return HostPaths(tmp_path / "run", tmp_path / "state", tmp_path / "config")


# ---- cordons ----


def test_a_cordoned_host_takes_nothing_but_what_it_has_asked_back(paths: HostPaths) -> None:
    assert cordon.refusals(paths, "m1") == []
    cordon.put(paths, cordon.Cordon())
    (refusal,) = cordon.refusals(paths, "m1")
    assert refusal.code == "cordoned"
    assert "uncordon" in refusal.remedy
    cordon.expect(paths, "m1")
    assert cordon.refusals(paths, "m1") == []
    assert len(cordon.refusals(paths, "m2")) == 1
    cordon.lift(paths)
    cordon.lift(paths)
    assert cordon.refusals(paths, "m2") == []


def test_a_cordon_that_can_not_be_read_is_one(paths: HostPaths) -> None:
    cordon.put(paths, cordon.Cordon())
    paths.cordon.write_text("{")
    (refusal,) = cordon.refusals(paths, "m1")
    assert refusal.code == "cordoned"


# ---- the operator's programs ----


def program(directory: Path, name: str, text: str, mode: int = 0o755) -> None:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)


def test_programs_are_asked_in_their_order_until_one_says_no(tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    assert drain_hooks.ask(hooks, "before", "c", "S", "T") == ""
    program(hooks, "1-first", f'echo "$@" >>{tmp_path}/said')
    assert drain_hooks.ask(hooks, "before", "c", "S", "T") == ""
    program(hooks, "2-no", "echo it is busy; exit 3")
    program(hooks, "3-last", f"echo last >>{tmp_path}/said")
    why = drain_hooks.ask(hooks, "after", "c", "S", "T")
    assert why == "after the move, 2-no ended with 3: it is busy"
    assert (tmp_path / "said").read_text() == "before c S T\nafter c S T\n"


def test_a_program_that_hangs_says_no_and_ends_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drain_hooks, "HOOK_DEADLINE_S", 3.0)
    program(tmp_path / "hooks", "slow", f"sleep 61.25 & echo $! >{tmp_path}/pid; wait")
    assert "took longer" in drain_hooks.ask(tmp_path / "hooks", "before", "c", "S", "T")
    pid = (tmp_path / "pid").read_text().strip()

    def has_ended() -> bool:
        try:
            return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True

    wait_until("its child ends", has_ended, deadline_s=20)


@pytest.mark.parametrize(("mode", "why"), [(0o775, "others than root"), (0o644, "no program")])
def test_what_others_could_write_is_not_run(tmp_path: Path, mode: int, why: str) -> None:
    program(tmp_path / "hooks", "it", f"touch {tmp_path}/ran", mode)
    assert why in drain_hooks.ask(tmp_path / "hooks", "before", "c", "S", "T")
    assert not (tmp_path / "ran").exists()


def test_a_program_that_is_gone_says_no(tmp_path: Path) -> None:
    """Asked after a move as well, where nobody else would say which it is, and the drain ended."""
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    why = drain_hooks.ask(tmp_path, "after", "c", "S", "T")
    assert why == "after the move, gone can't be run: No such file or directory"


# ---- the unit ----


def test_the_unit_drains_when_it_stops_and_is_waited_for() -> None:
    word = messages.Drain("start", ("A", "C"), 2, 300.0, ("/srv/a b",), 40)
    text = unit_text("/usr/bin/migrate", word)
    assert (
        "ExecStop=/usr/bin/migrate drain-node --at-shutdown --to A,C --max-parallel 2"
        " --deadline 300 --bandwidth 40 --shared '/srv/a b'\n"
    ) in text
    assert "TimeoutStopSec=420\n" in text
    assert "After=migrate-agent.service" in text


def test_a_unit_without_a_deadline_or_with_words_of_systemds_is_refused() -> None:
    with pytest.raises(UsageError, match="shutdown"):
        unit_text("/usr/bin/migrate", messages.Drain("start", ("A",)))
    with pytest.raises(UsageError, match="30 minutes"):
        unit_text("/usr/bin/migrate", messages.Drain("start", ("A",), 1, 1600.0))
    with pytest.raises(UsageError, match="%"):
        unit_text("/usr/bin/migrate", messages.Drain("start", ("A",), 1, 60.0, ("/srv/%h",)))


# ---- what is told ----


def test_a_drain_that_was_never_is_told_so_and_one_is_told_as_it_is(paths: HostPaths) -> None:
    assert "never drained" in lines(drain_state.read(paths))[0]
    moves = (
        messages.DrainMove(
            "a",
            "runc",
            1 << 20,
            "arrived",
            "B",
            seconds=2.0,
            downtime_ms=500.0,
            predicted_downtime_ms=240.4,
        ),
        messages.DrainMove("b", "runc", 1 << 20, "stays", why="io_uring"),
    )
    drain_state.write(paths, messages.Drained("A", "drain-1", phase="moving", moves=moves))
    state = drain_state.read(paths)
    text = "\n".join(lines(state))
    assert "was interrupted" in text
    assert "runs on B, after 2.0 s, downtime 500 ms, predicted 240 (asked for: 300)" in text
    assert "stays on A: io_uring" in text
    told: dict[str, str] = {}
    assert [line.move.container for line in progress(state, told)] == ["a", "b"]
    assert list(progress(state, told)) == []


@pytest.mark.parametrize(
    ("moves", "drained", "undrained"),
    [
        ([], 0, 0),
        ([("left", "its policy"), ("stopped", ""), ("home", "")], 0, 0),
        ([("arrived", "")], 0, 1),
        ([("arrived", "no answer")], 1, 1),
        ([("arrived", ""), ("stays", "io_uring")], 1, 1),
        ([("waiting", "")], 0, 0),
        ([("stays", "io_uring"), ("held", "it is committed")], 3, 3),
    ],
)
def test_exit_codes(moves: list[tuple[Any, str]], drained: int, undrained: int) -> None:
    told = [messages.DrainMove("c", "runc", 1, state, why=why) for state, why in moves]
    assert exit_code(told, empties=True) == drained
    assert exit_code(told, empties=False) == undrained


# ---- the bandwidth ----


class Moving:
    """Moves of which "first" arrives when it is looked at again, "other" when it has been told to
    take all that there is."""

    def __init__(self) -> None:
        self.told: dict[str, list[float | None]] = {}
        self._names: dict[str, str] = {}

    def begin(
        self, migration_id: str, name: str, _target: str, mib_s: float | None, _options: object
    ) -> None:
        self._names[migration_id] = name
        self.told[name] = [mib_s]

    def look(self, migration_id: str, mib_s: float | None) -> Look:
        told = self.told[self._names[migration_id]]
        told.append(mib_s)
        if told is self.told["first"]:
            return Look("arrived" if len(told) > 2 else "moving")
        return Look("arrived" if mib_s == 32.0 else "moving")


def resident(name: str) -> Resident:
    return Resident(name, socket.gethostname(), 1 << 20, 1 << 20)


async def drained(
    monkeypatch: pytest.MonkeyPatch,
    paths: HostPaths,
    order: messages.Drain,
    moves: Moving,
    residents: Callable[[], list[Resident]],
    free_bytes: Callable[[], int] = lambda: 1 << 40,
) -> None:
    """A drain to B, a host with much room, that succeeds."""

    async def told(*_: object) -> HostState:
        return HostState("B", free_bytes(), 64.0)

    monkeypatch.setattr(drain, "LOOK_S", 0.0)
    monkeypatch.setattr(drain, "Moves", lambda _: moves)
    monkeypatch.setattr(Others, "describe", told)
    monkeypatch.setattr(drain.Drain, "_residents", lambda _: (residents(), {}))
    async with asyncio.timeout(60):
        await drain.Drain(paths, {}, "drain-1", order).run()
    assert drain_state.read(paths).exit_code == 0


async def test_what_one_move_leaves_of_the_bandwidth_the_others_get(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    residents = [resident(name) for name in ("first", "other")]
    order, moves = messages.Drain("start", ("B",), 2, bandwidth_mib_s=32.0), Moving()
    await drained(monkeypatch, paths, order, moves, lambda: residents)
    assert moves.told["first"] == [16.0] * 3
    assert moves.told["other"] == [16.0] * (len(moves.told["other"]) - 1) + [32.0]


async def test_what_comes_while_a_host_is_emptied_leaves_as_well(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was on its way when the host was cordoned."""
    moves = Moving()

    def residents() -> list[Resident]:
        return [resident("first")] if "first" not in moves.told else [resident("late")]

    order = messages.Drain("start", ("B",), 1, bandwidth_mib_s=32.0)
    await drained(monkeypatch, paths, order, moves, residents)
    assert list(moves.told) == ["first", "late"]
    assert [one.state for one in drain_state.read(paths).moves] == ["arrived", "arrived"]


async def test_what_a_target_needs_only_while_a_container_arrives_is_for_the_next_one(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a host that had room for one that arrives and one that is there, not for two arriving."""
    gib, moves, here = 1 << 30, Moving(), socket.gethostname()
    residents = [Resident(name, here, 6 * gib, 12 * gib) for name in ("first", "other")]
    order = messages.Drain("start", ("B",), 1, bandwidth_mib_s=32.0)

    def free_bytes() -> int:
        return (20 - 6 * len(moves.told)) * gib

    await drained(monkeypatch, paths, order, moves, lambda: residents, free_bytes)
    assert [one.state for one in drain_state.read(paths).moves] == ["arrived", "arrived"]


class Time(threading.Event):
    """A clock that whoever waits on it moves."""

    now_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.now_s += timeout or 0.0
        return False

    def send(self, pace: Pace, until_s: float) -> int:
        """As much as may leave until then, in bytes."""
        sent = 0
        while self.now_s < until_s:
            pace.wait_for(1 << 17)
            sent += 1 << 17
        return sent


def test_a_move_sends_what_it_is_told_to_while_it_runs(tmp_path: Path) -> None:
    """By the bytes that leave in ten seconds of a clock that nobody waits for. A file that is not
    there, or that nothing can be read from, changes nothing."""
    time_, path, mib = Time(), tmp_path / "rates" / "m1", 1 << 20
    pace = Pace(ToldRate(path, 4.0 * mib, lambda: time_.now_s), time_, lambda: time_.now_s)
    about = pytest.approx
    assert time_.send(pace, 10.0) == about(40 * mib, abs=2 * mib)
    tell(path, 8)
    assert time_.send(pace, 20.0) == about(80 * mib, abs=2 * mib)
    tell(path, 16.5)
    assert time_.send(pace, 30.0) == about(165 * mib, abs=5 * mib)
    path.write_text("nan")
    assert time_.send(pace, 40.0) == about(165 * mib, abs=5 * mib)
    path.unlink()
    assert time_.send(pace, 50.0) == about(165 * mib, abs=5 * mib)


def test_what_a_downtime_was_predicted_from_may_rise_and_does_not_fall(tmp_path: Path) -> None:
    time_, path, mib = Time(), tmp_path / "m1", 1 << 20
    rate = ToldRate(path, 4.0 * mib, lambda: time_.now_s)
    rate.hold()
    for told, expected in ((2, 4), (8, 8), (2, 4)):
        tell(path, told)
        time_.now_s += 1.0
        assert rate() == expected * mib


# ---- what earlier moves tell ----


def report_of(paths: HostPaths, migration_id: str, report: Report, at_s: int) -> None:
    """As a move leaves it, with what it has said."""
    path = paths.drain / f"{migration_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(report, path)
    path.with_suffix(".log").touch()
    os.utime(path, (at_s, at_s))


def test_the_last_move_of_a_container_tells_how_it_writes_and_stood_still(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drain_history.read(paths) == {}
    report, changed = moved(), msgspec.structs.replace
    drain_state.write(paths, messages.Drained("A", "drain-1", phase="moving"))
    report_of(paths, "m1", changed(report, downtime_ms=9.0), 1)
    report_of(paths, "m2", report, 2)
    report_of(paths, "m3", changed(report, container="slow", tracker="none"), 3)
    report_of(paths, "m4", changed(report, container="none", rounds=()), 4)
    (paths.drain / "m5.json").write_text("{")
    # Ten pages travelled in the second round, which were written in the 12.5 ms of the first.
    written = 10 * 4096 / 0.0125
    assert drain_history.read(paths) == {"sheep": (written, 280.7), "slow": (written, None)}
    monkeypatch.setattr(drain_history, "KEPT_MAX", 4)
    drain_history.read(paths)
    assert sorted(path.stem for path in paths.drain.glob("m*.log")) == ["m2", "m3", "m4"]
    assert drain_state.read(paths).drain_id == "drain-1"


# ---- who gets a container back ----


def arrived(paths: HostPaths, migration_id: str, peer: str, *states: str) -> None:
    with Journal.open(paths.journal) as journal:
        now_s = time.time()
        journal.begin(Migration(migration_id, "target", 1, "c", "runc", peer, now_s))
        for state in states:
            journal.append(migration_id, "target", state, "test", at_wall_s=now_s)


async def test_a_container_is_given_back_to_the_host_it_came_from_last(
    paths: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived(paths, "m1", "former", *TAKEN, "running", "done")
    arrived(paths, "m2", "home", *TAKEN, "running", "done")
    arrived(paths, "m3", "liar", *RECEIVED, "aborted")
    begun: list[tuple[object, ...]] = []
    monkeypatch.setattr(Moves, "begin", lambda _, *said: begun.append(said))
    journal = JournalWriter(paths.journal)
    try:
        drains = Drains(paths, {}, journal, PolicyFile(paths.policy))
        with pytest.raises(MigrateError, match="did not come here from former"):
            await drains.told(messages.GiveBack("g1", "c"), "former")
        with pytest.raises(MigrateError, match="did not come here from home"):
            await drains.told(messages.GiveBack("g1", "other"), "home")
        arrived(paths, "m4", "home", *TAKEN, "running", "done")
        assert not begun
        answer = await drains.told(messages.GiveBack("g1", "c", 2.5), "home")
        assert begun == [("g1", "c", "home", 2.5)]
        assert isinstance(answer, messages.GivingBack)
        await drains.told(messages.GiveBack("g1", "c"), "home")
        assert len(begun) == 1
        with pytest.raises(MigrateError, match="no migration to former"):
            await drains.told(messages.GiveBack("g1", "c"), "former")
        with pytest.raises(UsageError, match="3 moves can't share 2 MiB/s"):
            await drains.asked(messages.Drain("start", ("B",), 3, bandwidth_mib_s=2))
        with pytest.raises(UsageError, match="there is no drain of"):
            await drains.asked(messages.Drain("resume"))
        with (
            Claim.take(paths.drain_claim, "drain"),
            pytest.raises(UsageError, match="is under way"),
        ):
            await drains.asked(messages.Drain("start", ("B",)))
        with pytest.raises(MigrateError, match="no word of one host"):
            await drains.told(messages.Drain("start", ("B",)), "home")
    finally:
        journal.close()
