"""What `migrate status` and `log` say of every state on both sides: real journals, claims, cgroups'
files and marks of CRIU's hook."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from migrate import cli, config, standing
from migrate.claim import Claim, Kind
from migrate.core import source_machine, target_machine
from migrate.core.messages import Side
from migrate.core.states import SOURCE_TERMINAL, TARGET_TERMINAL, SourceState, TargetState
from migrate.errors import JournalError, UsageError
from migrate.journal import Journal, Migration, Role
from tests.lab.waiting import wait_until
from tests.migrate.stage import COPIED, GIVEN, MIGRATION, PEER, RECEIVED, Stage

HERE = socket.gethostname()
TAKEN = (*RECEIVED, "committed")
# States that the journal has, each by the records that lead to it.
WAYS: dict[Role, list[tuple[str, ...]]] = {
    "source": [
        (),
        ("precopy",),
        COPIED,
        GIVEN,
        (*GIVEN, "releasing"),
        (*GIVEN, "releasing", "done"),
        (*COPIED, "rolling_back"),
        (*COPIED, "rolling_back", "aborted"),
    ],
    "target": [
        (),
        ("receiving",),
        RECEIVED,
        TAKEN,
        (*TAKEN, "running"),
        (*TAKEN, "running", "done"),
        (*RECEIVED, "aborted"),
    ],
}
EVERY = [(role, way) for role, ways in WAYS.items() for way in ways]


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.close()


@contextlib.contextmanager
def driven(stage: Stage, role: Role = "source", kind: Kind = "coordinator") -> Iterator[None]:
    with Claim.take(stage.paths.claim(MIGRATION, role), kind):
        yield


@contextlib.contextmanager
def agent(stage: Stage) -> Iterator[None]:
    """An agent runs here."""
    with Claim.take(stage.paths.agent_claim, "agent"):
        yield


@contextlib.contextmanager
def held(stage: Stage, role: Role) -> Iterator[None]:
    """A process that is called as CRIU is, with the marks that its hook leaves."""
    hold = stage.paths.session(MIGRATION, role) / "work" / "hold"
    hold.mkdir(parents=True, exist_ok=True)
    program = stage.paths.run / "criu"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([program, "600"]) as criu:
        name = Path(f"/proc/{criu.pid}/comm")
        wait_until("it is called criu", lambda: name.read_text() == "criu\n")
        (hold / "criu.pid").write_text(str(criu.pid))
        (hold / f"seen.{'post-dump' if role == 'source' else 'post-restore'}").touch()
        try:
            yield
        finally:
            criu.kill()


def seen(stage: Stage) -> Side:
    (one,) = standing.status(stage.paths, MIGRATION)
    return one


# ---- every state ----


@pytest.mark.parametrize("has_agent", [True, False])
@pytest.mark.parametrize("has_driver", [True, False])
@pytest.mark.parametrize(("role", "way"), EVERY)
def test_every_state_is_told(
    stage: Stage, role: Role, way: tuple[str, ...], has_driver: bool, has_agent: bool
) -> None:
    """One that has ended claims nothing about now; any other says what is up, and what to do if
    nobody does it."""
    stage.enter(*way, role=role)
    kind: Kind = "coordinator" if role == "source" else "agent"
    with contextlib.ExitStack() as stack:
        if has_driver:
            stack.enter_context(driven(stage, role, kind))
        if has_agent:
            stack.enter_context(agent(stage))
        one = seen(stage)
        lines = standing.status_lines([one])
    state = way[-1] if way else "begun"
    assert (one.state, one.role, one.container, one.peer) == (state, role, "web", PEER)
    assert one.ended is (state in (*SOURCE_TERMINAL, *TARGET_TERMINAL))
    assert bool(one.driver) is has_driver
    assert one.meaning
    if one.ended:
        assert not one.container_state
        assert not one.remedy
        assert len(lines) == 2
        assert one.meaning in lines[1]
    else:
        assert f"    {one.meaning}" in lines[2]
        assert one.container_state in lines[1]
        if not has_driver and not has_agent:
            assert one.remedy
        assert [line for line in lines if "remedy:" in line] == (
            [f"    remedy: {one.remedy}"] if one.remedy else []
        )


def test_every_recorded_state_is_among_them() -> None:
    told = {role: {way[-1] for way in ways if way} for role, ways in WAYS.items()}
    assert told == {
        "source": {*source_machine.RECORDED, SourceState.COMMITTED},
        "target": {*target_machine.RECORDED, TargetState.COMMITTED},
    }


# ---- where it is, is looked at ----


def test_a_frozen_container_is_told_as_long_as_it_is(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*COPIED)
    with driven(stage):
        assert seen(stage).container_state == f"stands still on {HERE}"
        (stage.cgroup / "cgroup.freeze").write_text("0")
        assert seen(stage).container_state == f"runs on {HERE}"


def test_a_pulse_of_a_container_that_is_slowed_is_not_told(stage: Stage) -> None:
    """As long as somebody is there who ends it."""
    stage.freeze()
    stage.enter("precopy", brake={"cgroup": str(stage.cgroup), "words": ["0.5"]})
    with driven(stage):
        assert seen(stage).container_state == f"runs on {HERE}"
    assert seen(stage).container_state == f"stands still on {HERE}"


@pytest.mark.parametrize("role", ["source", "target"])
def test_what_is_held_is_told_as_long_as_it_is(stage: Stage, role: Role) -> None:
    stage.enter(*(GIVEN if role == "source" else RECEIVED), role=role)
    with agent(stage):
        with held(stage, role):
            one = seen(stage)
            assert one.container_state == f"is held on {HERE}"
            assert f"bring {PEER} back" in one.remedy
            assert f"at once: migrate recover {MIGRATION}" in one.remedy
        assert seen(stage).container_state == ""


def test_a_copy_that_was_let_go_is_not_held(stage: Stage) -> None:
    stage.enter(*TAKEN, role="target")
    hold = stage.paths.session(MIGRATION, "target") / "work" / "hold"
    with agent(stage), driven(stage, "target", "agent"), held(stage, "target"):
        assert seen(stage).container_state == f"is held on {HERE}"
        (hold / "committed").touch()
        assert seen(stage).container_state == ""


def test_a_copy_of_which_nobody_knows_whether_it_ran(stage: Stage) -> None:
    """The host was started anew: there is an agent, and it has no session of it."""
    stage.enter(*TAKEN, role="target")
    with agent(stage):
        one = seen(stage)
    assert "went down before it was known" in one.meaning
    assert "--force-target" in one.remedy
    assert "--force-source" in one.remedy


def test_a_container_whose_memory_was_lost(stage: Stage) -> None:
    stage.enter(*TAKEN, "running", role="target", stopped="3 pages were lost")
    with agent(stage), driven(stage, "target", "agent"):
        one = seen(stage)
    assert (one.container_state, one.meaning) == (f"is frozen on {HERE}", "3 pages were lost")
    assert one.remedy.endswith("--force-target")


def test_facts_that_make_no_sense_do_not_keep_it_from_being_told(stage: Stage) -> None:
    stage.enter(*COPIED, guard="no plan")
    assert seen(stage).container_state == f"runs on {HERE}"


# ---- which ones ----


def enter_many(paths: config.HostPaths, count: int, *, open_one: str) -> None:
    with Journal.open(paths.journal) as journal:
        journal.begin(Migration(open_one, "source", 1, "web", "runc", "b", 1.0))
        for number in range(count):
            name = f"m-{number:02}"
            journal.begin(Migration(name, "source", 1, "web", "runc", "b", 10.0 + number))
            journal.append(name, "source", "aborted", "test", at_wall_s=20.0 + number)


def test_the_latest_and_those_that_are_open(stage: Stage) -> None:
    enter_many(stage.paths, standing.FINISHED_MAX + 3, open_one="old")
    shown = [one.migration_id for one in standing.status(stage.paths, None)]
    assert shown == ["old", *(f"m-{number:02}" for number in range(3, 13))]
    (one,) = standing.status(stage.paths, "m-00")
    assert one.state == "aborted"


def test_both_sides_of_one_migration_on_one_host(stage: Stage) -> None:
    stage.enter(*GIVEN)
    stage.enter(*RECEIVED, role="target")
    assert [one.role for one in standing.status(stage.paths, MIGRATION)] == ["source", "target"]
    lines = standing.log_lines(stage.paths, MIGRATION)
    assert lines[0] == f"{MIGRATION} as source: web (runc) to {PEER}, attempt 7"
    assert lines[5] == f"{MIGRATION} as target: web (runc) from {PEER}, attempt 7"
    words = [line.split()[2:] for line in lines[1:5]]
    assert words == [["begun"], *([state, "by", "test"] for state in GIVEN)]


@pytest.mark.parametrize("has_journal", [True, False])
def test_an_unknown_one(stage: Stage, has_journal: bool) -> None:
    if has_journal:
        stage.enter(*GIVEN)
    for ask in (standing.status, standing.log_lines):
        with pytest.raises(UsageError, match="knows no migration 'nothing'"):
            ask(stage.paths, "nothing")


def test_a_damaged_journal_is_refused(stage: Stage) -> None:
    stage.enter(*GIVEN)
    stage.paths.journal.write_bytes(b"SQLite format 3\0" + b"\xff" * 8192)
    with pytest.raises(JournalError, match="damaged"):
        standing.status(stage.paths, None)


def test_lines_are_in_columns_and_fit_a_small_terminal(stage: Stage) -> None:
    stage.enter(*GIVEN)
    stage.enter(*RECEIVED, role="target")
    header, first, *_ = lines = standing.status_lines(standing.status(stage.paths, None))
    assert header.index("state") == first.index("committed")
    rows = [line for line in lines if not line.startswith("    ")]
    assert len(rows) == 3
    assert max(map(len, rows)) <= 80


# ---- the commands ----


@pytest.fixture
def command(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    """`migrate` on this host."""
    monkeypatch.setattr(config, "HostPaths", lambda: stage.paths)
    return CliRunner()


def test_status_as_json(stage: Stage, command: CliRunner) -> None:
    stage.enter(*GIVEN)
    told = command.invoke(cli.cli, ["status", "--json"])
    (one,) = json.loads(told.output)
    assert msgspec.convert(one, Side) == seen(stage)


def test_status_of_a_host_that_has_seen_none(command: CliRunner) -> None:
    assert command.invoke(cli.cli, ["status"]).output == "no migration is known here\n"
    assert command.invoke(cli.cli, ["status", "--json"]).output == "[]\n"


@pytest.mark.parametrize("words", [["status"], ["log"], ["cancel"], ["recover"]])
def test_an_unknown_id_is_wrong_usage(
    command: CliRunner,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command is not None
    monkeypatch.setattr("sys.argv", ["migrate", *words, "nothing"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "knows no migration 'nothing'" in capsys.readouterr().err
