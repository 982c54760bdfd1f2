"""The journal: what is in it survives, what cannot be is refused, and damage is not read."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from migrate.core.source_machine import VERDICTS
from migrate.core.states import SourceState as S
from migrate.core.states import TargetState as T
from migrate.core.table import Verdict
from migrate.errors import JournalError
from migrate.journal import (
    APPLICATION_ID,
    MAX_AGE_S,
    MAX_JSON_BYTES,
    SCHEMA_VERSION,
    WAL_BYTES_MAX,
    Journal,
    JournalWriter,
    Migration,
    Role,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

TO_COMMITTED = (S.PRECOPY, S.FROZEN, S.COMMITTED)
TO_DONE = (*TO_COMMITTED, S.RELEASING, S.DONE)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal.open(path) as opened:
        yield opened


def begin(
    journal: Journal, migration_id: str = "m1", role: Role = "source", created_wall_s: float = 100.0
) -> Migration:
    migration = Migration(
        migration_id, role, 1, "sheep", "runc", "beta", created_wall_s, {"cgroup": "/sheep"}
    )
    journal.begin(migration)
    return migration


def enter(
    journal: Journal,
    states: Sequence[str],
    migration_id: str = "m1",
    role: Role = "source",
    at_wall_s: float = 200.0,
) -> None:
    for state in states:
        journal.append(migration_id, role, state, "event", at_wall_s=at_wall_s)


def states(journal: Journal, migration_id: str = "m1", role: Role = "source") -> list[str]:
    return [record.state for record in journal.records(migration_id, role)]


# --- what it keeps, and how ---


def test_records_are_kept_in_order(journal: Journal, path: Path) -> None:
    migration = begin(journal)
    journal.append("m1", "source", S.PRECOPY, "preflight_passed", at_wall_s=5)
    journal.append("m1", "source", S.FROZEN, "target_prepared", at_wall_s=6.5, detail={"round": 3})
    with Journal.open(path) as again:
        assert again.migration("m1", "source") == migration
        first, second = again.records("m1", "source")
        assert (first.seq, first.state, first.event, first.at_wall_s, first.detail) == (
            0,
            "precopy",
            "preflight_passed",
            5.0,
            {},
        )
        assert (second.seq, second.state, second.at_wall_s) == (1, "frozen", 6.5)
        assert second.detail == {"round": 3}
        assert again.state("m1", "source") == "frozen"
        assert again.state("m2", "source") is None
        assert again.records("m2", "source") == []


def test_the_two_roles_of_one_migration_are_apart(journal: Journal) -> None:
    begin(journal)
    begin(journal, role="target")
    enter(journal, TO_COMMITTED)
    enter(journal, [T.RECEIVING], role="target")
    assert states(journal) == ["precopy", "frozen", "committed"]
    assert states(journal, role="target") == ["receiving"]


def test_every_sync_is_full(journal: Journal) -> None:
    execute = journal._connection.execute
    assert execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert execute("PRAGMA synchronous").fetchone() == (2,)
    assert execute("PRAGMA wal_autocheckpoint").fetchone() == (0,)


def test_only_the_owner_can_read_it(path: Path) -> None:
    path.parent.mkdir(mode=0o755)
    old = os.umask(0)
    try:
        with Journal.open(path) as journal:
            begin(journal)
            modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(old)
    assert modes["journal.sqlite"] == 0o600
    assert set(modes.values()) == {0o600}
    assert len(modes) == 3
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_facts_can_be_added(journal: Journal) -> None:
    begin(journal)
    journal.note("m1", "source", {"port": "v-sheep", "cgroup": "/other"})
    facts = journal.migration("m1", "source").facts
    assert facts == {"cgroup": "/other", "port": "v-sheep"}


def test_attempts_grow_over_restarts_and_pruning(path: Path) -> None:
    with Journal.open(path) as journal:
        assert [journal.claim_attempt(0.0), journal.claim_attempt(0.0)] == [1, 2]
        begin(journal)
        enter(journal, TO_DONE)
        assert journal.prune(1e12) == 1
    with Journal.open(path) as journal:
        assert journal.claim_attempt(0.0) == 3
        # By the clock, so that a journal that was replaced does not begin anew.
        assert journal.claim_attempt(2.5) == 2500
        assert journal.claim_attempt(1.0) == 2501


# --- what may follow what ---


def test_a_commit_behind_a_rollback_is_refused(journal: Journal) -> None:
    begin(journal)
    enter(journal, [S.PRECOPY, S.FROZEN, S.ROLLING_BACK])
    with pytest.raises(JournalError, match="committed cannot follow rolling_back"):
        enter(journal, [S.COMMITTED])
    assert states(journal) == ["precopy", "frozen", "rolling_back"]
    enter(journal, [S.ABORTED])


def test_a_process_that_was_overtaken_cannot_commit(journal: Journal, path: Path) -> None:
    begin(journal)
    enter(journal, [S.PRECOPY, S.FROZEN])
    with Journal.open(path) as recovery:
        enter(recovery, [S.ROLLING_BACK])
    with pytest.raises(JournalError, match="another process has decided"):
        enter(journal, [S.COMMITTED])


@pytest.mark.parametrize("state", ["frozen", "committed", "held", "receiving", "no_such", ""])
def test_states_that_cannot_come_first_are_refused(journal: Journal, state: str) -> None:
    begin(journal)
    with pytest.raises(JournalError, match="cannot follow nothing"):
        enter(journal, [state])


def test_the_same_state_again_is_not_written_again(journal: Journal) -> None:
    begin(journal)
    enter(journal, [S.PRECOPY, S.PRECOPY, S.FROZEN, S.FROZEN, S.COMMITTED, S.COMMITTED])
    assert states(journal) == ["precopy", "frozen", "committed"]


def test_a_migration_must_have_begun_once(journal: Journal) -> None:
    with pytest.raises(JournalError, match="knows no migration m1"):
        enter(journal, [S.PRECOPY])
    with pytest.raises(JournalError, match="knows no migration"):
        journal.note("m1", "source", {})
    begin(journal)
    with pytest.raises(JournalError, match="knows m1 as source already"):
        begin(journal)
    enter(journal, [S.PRECOPY])


def test_facts_have_a_limit_and_must_be_json(journal: Journal) -> None:
    begin(journal)
    with pytest.raises(JournalError, match="bytes of facts"):
        journal.note("m1", "source", {"x": "y" * MAX_JSON_BYTES})
    with pytest.raises(JournalError, match="cannot hold"):
        journal.note("m1", "source", {"x": object()})
    with pytest.raises(JournalError, match="bytes of facts"):
        journal.append(
            "m1", "source", "precopy", "e", at_wall_s=1, detail={"x": "y" * MAX_JSON_BYTES}
        )
    assert journal.migration("m1", "source").facts == {"cgroup": "/sheep"}


# --- what is asked of it ---


def test_unfinished_migrations(journal: Journal) -> None:
    for number, entered in enumerate([(), TO_COMMITTED, TO_DONE, (S.ABORTED,)]):
        begin(journal, f"m{number}", created_wall_s=float(number))
        enter(journal, entered, f"m{number}")
    begin(journal, "m1", role="target", created_wall_s=9)
    enter(journal, [T.RECEIVING, T.PREPARED, T.ABORTED], "m1", role="target")
    begin(journal, "m4", role="target", created_wall_s=10)
    enter(journal, [T.RECEIVING], "m4", role="target")
    found = [
        (migration.migration_id, migration.role, [record.state for record in records])
        for migration, records in journal.unfinished()
    ]
    assert found == [
        ("m0", "source", []),
        ("m1", "source", ["precopy", "frozen", "committed"]),
        ("m4", "target", ["receiving"]),
    ]


WAYS = [
    (),
    (S.ABORTED,),
    (S.PRECOPY,),
    (S.PRECOPY, S.ROLLING_BACK),
    (S.PRECOPY, S.ROLLING_BACK, S.ABORTED),
    (S.PRECOPY, S.FROZEN),
    TO_COMMITTED,
    (*TO_COMMITTED, S.ROLLING_BACK),
    (*TO_COMMITTED, S.RELEASING),
    TO_DONE,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way) or "nothing")
def test_the_verdict_on_the_frozen_tree(journal: Journal, path: Path, way: tuple[S, ...]) -> None:
    begin(journal)
    enter(journal, way)
    last = way[-1] if way else S.NEW
    with Journal.open_read_only(path) as guard:
        assert guard.verdict("m1", "source") is VERDICTS[last]
        assert guard.verdict("m2", "source") is Verdict.UNDO
        assert guard.verdict("m1", "target") is Verdict.HOLD


def test_a_new_migration_prunes(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else does: a host that is in service for years keeps so many and not more."""
    monkeypatch.setattr("migrate.journal.MAX_FINISHED", 3)
    for number in range(10):
        begin(journal, f"done{number}", created_wall_s=1000.0 + number)
        enter(journal, TO_DONE, f"done{number}", at_wall_s=1000.0 + number)
    kept = [number for number in range(10) if states(journal, f"done{number}")]
    # The last one finished after the last beginning.
    assert kept == [6, 7, 8, 9]
    begin(journal, "later", created_wall_s=1009.5 + MAX_AGE_S)
    assert not any(states(journal, f"done{number}") for number in range(10))


def test_a_reader_that_stays_costs_no_more_disk_afterwards(journal: Journal, path: Path) -> None:
    """While it reads, nothing that it may still look at is folded back."""
    log = path.with_name(f"{path.name}-wal")
    with Journal.open_read_only(path) as reader:
        reader._connection.execute("BEGIN")
        assert reader.unfinished() == []
        for number in range(60):
            begin(journal, f"m{number}")
            enter(journal, TO_DONE, f"m{number}")
        assert log.stat().st_size > WAL_BYTES_MAX
        reader._connection.execute("COMMIT")
    for number in range(2):
        begin(journal, f"after{number}")
    assert log.stat().st_size <= WAL_BYTES_MAX


def test_what_is_forgotten_is_not_taken_again(journal: Journal) -> None:
    """The attempts of a source grow, over all of its containers: an old one comes back in vain."""
    for number, peer, container in (
        (5, "alpha", "sheep"),
        (7, "alpha", "goat"),
        (9, "beta", "cow"),
    ):
        journal.begin(Migration(f"m{number}", "target", number, container, "runc", peer, 1.0))
        for state in (T.RECEIVING, T.ABORTED):
            journal.append(f"m{number}", "target", state, "event", at_wall_s=float(number))
    assert journal.newest_attempt("sheep", "alpha") == 5
    assert journal.newest_attempt("pig", "alpha") == 0
    assert journal.prune(0.0, max_finished=1) == 2
    for container in ("sheep", "goat", "pig"):
        assert journal.newest_attempt(container, "alpha") == 7
    assert journal.newest_attempt("cow", "beta") == 9
    assert journal.newest_attempt("cow", "alph") == 0
    journal.begin(Migration("m10", "target", 10, "sheep", "runc", "alpha", 1.0))
    assert journal.newest_attempt("sheep", "alpha") == 10
    assert journal.prune(1e12) == 1
    assert journal.newest_attempt("pig", "beta") == 9
    assert journal.newest_attempt("pig", "alpha") == 7


def test_prune_forgets_the_old_and_the_many_but_nothing_unfinished(journal: Journal) -> None:
    for number in range(5):
        begin(journal, f"done{number}")
        enter(journal, TO_DONE, f"done{number}", at_wall_s=1000.0 + number)
    begin(journal, "open")
    enter(journal, TO_COMMITTED, "open", at_wall_s=1.0)
    begin(journal, "empty")
    assert journal.prune(2000.0, max_age_s=1000.0, max_finished=3) == 2
    assert [states(journal, f"done{number}") != [] for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    assert journal.prune(2004.0, max_age_s=1000.5, max_finished=3) == 2
    assert states(journal, "done4")
    assert len(journal.unfinished()) == 2
    (left,) = journal._connection.execute("SELECT count(*) FROM transitions").fetchone()
    assert left == len(TO_DONE) + len(TO_COMMITTED)


# --- other processes ---

WRITER = """
import sys
from pathlib import Path
from migrate.journal import Journal, Migration
journal = Journal.open(Path(sys.argv[1]))
journal.begin(Migration("m1", "source", 1, "sheep", "runc", "beta", 1.0))
for state in ("precopy", "frozen", "committed"):
    journal.append("m1", "source", state, "event", at_wall_s=2.0)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process with the journal open, behind its third record."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_a_guard_reads_what_another_process_writes(
    writer: subprocess.Popen[str], path: Path
) -> None:
    with Journal.open_read_only(path) as guard:
        assert guard.verdict("m1", "source") is Verdict.HOLD
        with Journal.open(path) as other:
            enter(other, [S.ROLLING_BACK])
        assert guard.verdict("m1", "source") is Verdict.UNDO


def test_a_guard_reads_what_a_killed_process_has_written(
    writer: subprocess.Popen[str], path: Path
) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert path.with_name("journal.sqlite-wal").stat().st_size > 0
    with Journal.open_read_only(path) as guard:
        assert guard.verdict("m1", "source") is Verdict.HOLD
    with Journal.open(path) as recovery:
        ((_, records),) = recovery.unfinished()
        assert [record.state for record in records] == list(TO_COMMITTED)


def test_a_guard_reads_what_a_process_has_closed(path: Path) -> None:
    with Journal.open(path) as journal:
        begin(journal)
        enter(journal, TO_COMMITTED)
    assert not path.with_name("journal.sqlite-wal").exists()
    with Journal.open_read_only(path) as guard:
        assert guard.verdict("m1", "source") is Verdict.HOLD


def test_a_guard_cannot_write(journal: Journal, path: Path) -> None:
    begin(journal)
    with Journal.open_read_only(path) as guard, pytest.raises(JournalError, match="readonly"):
        enter(guard, [S.PRECOPY])


def test_a_guard_makes_no_journal(path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be used"):
        Journal.open_read_only(path)
    assert not path.parent.exists()


def test_a_record_that_does_not_fit_is_an_error_and_leaves_the_rest(journal: Journal) -> None:
    begin(journal)
    enter(journal, [S.PRECOPY])
    (pages,) = journal._connection.execute("PRAGMA page_count").fetchone()
    journal._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalError, match="full"):
        journal.append(
            "m1", "source", "frozen", "e", at_wall_s=1, detail={"x": "y" * (MAX_JSON_BYTES // 2)}
        )
    assert states(journal) == ["precopy"]
    journal._connection.execute("PRAGMA max_page_count = 1000000")
    enter(journal, [S.FROZEN])
    assert states(journal) == ["precopy", "frozen"]


# --- damage ---


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("this is no database, but long enough to be read as one " * 100)
    for opens in (Journal.open, Journal.open_read_only):
        with pytest.raises(JournalError, match="damaged: file is not a database"):
            opens(path)


def test_a_database_of_something_else_is_refused(path: Path) -> None:
    path.parent.mkdir()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE sheep (name TEXT)")
    other.close()
    for opens in (Journal.open, Journal.open_read_only):
        with pytest.raises(JournalError, match="not a journal of migrations"):
            opens(path)


def test_another_version_is_refused(path: Path) -> None:
    Journal.open(path).close()
    other = sqlite3.connect(path)
    assert other.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    other.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    other.close()
    for opens in (Journal.open, Journal.open_read_only):
        with pytest.raises(JournalError, match=f"version {SCHEMA_VERSION + 1}"):
            opens(path)


def filled(path: Path) -> None:
    with Journal.open(path) as journal:
        begin(journal)
        enter(journal, TO_COMMITTED)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE transitions SET state = 'rolling_back' WHERE seq = 2",
        "UPDATE transitions SET at_wall_s = 7 WHERE seq = 0",
        "UPDATE transitions SET detail = '{' WHERE seq = 1",
        "UPDATE transitions SET digest = x'00' WHERE seq = 1",
        "UPDATE transitions SET seq = 9 WHERE seq = 2",
        "DELETE FROM transitions WHERE seq = 0",
        "DELETE FROM transitions WHERE seq = 1",
        "UPDATE migrations SET facts = '[]'",
        "UPDATE migrations SET role = 'both'",
    ],
)
def test_a_changed_record_is_not_believed(path: Path, statement: str) -> None:
    filled(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute(statement)
    other.close()
    with pytest.raises(JournalError, match="is damaged"):
        Journal.open(path)
    if "transitions" in statement:
        with (
            Journal.open_read_only(path) as guard,
            pytest.raises(JournalError, match="is damaged"),
        ):
            guard.verdict("m1", "source")


def test_a_damaged_page_is_not_believed(path: Path) -> None:
    """Every page of the file, one at a time, overwritten in its middle and its head."""
    filled(path)
    whole = path.read_bytes()
    pages = len(whole) // 4096
    assert pages >= 4
    for page in range(pages):
        broken = bytearray(whole)
        broken[page * 4096 : page * 4096 + 64] = b"\xff" * 64
        path.write_bytes(broken)
        with pytest.raises(JournalError, match=r"damaged|not a journal"):
            Journal.open(path)


def test_a_file_that_was_cut_is_not_believed(path: Path) -> None:
    filled(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 4096])
    with pytest.raises(JournalError, match="damaged"):
        Journal.open(path)


def test_it_belongs_to_one_thread(journal: Journal) -> None:
    with ThreadPoolExecutor(1) as other, pytest.raises(sqlite3.ProgrammingError, match="thread"):
        other.submit(journal.state, "m1", "source").result()


# --- from asyncio ---


async def test_the_writer_keeps_the_order_in_which_it_was_asked(path: Path) -> None:
    writer = JournalWriter(path, clock=lambda: 77.0)
    try:
        attempt = await writer.claim_attempt()
        await writer.begin(
            "m1", "source", attempt=attempt, container="sheep", runtime="runc", peer="beta"
        )
        await asyncio.gather(
            *(writer.record("m1", "source", state, "event", round=1) for state in TO_DONE)
        )
        await writer.note("m1", "source", port="v-sheep")
        records = await writer.call(lambda journal: journal.records("m1", "source"))
        assert [record.state for record in records] == list(TO_DONE)
        assert {record.at_wall_s for record in records} == {77.0}
        assert records[0].detail == {"round": 1}
        facts = await writer.call(lambda journal: journal.migration("m1", "source").facts)
        assert facts == {"port": "v-sheep"}
        names = await writer.call(lambda _: threading.current_thread().name)
        assert names.startswith("journal")
    finally:
        writer.close()
        writer.close()


async def test_the_writer_passes_errors_on(path: Path) -> None:
    writer = JournalWriter(path)
    try:
        with pytest.raises(JournalError, match="knows no migration"):
            await writer.record("m1", "source", S.PRECOPY, "event")
    finally:
        writer.close()


def test_a_writer_that_cannot_open_leaves_no_thread(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("no database at all " * 100)
    before = threading.active_count()
    with pytest.raises(JournalError):
        JournalWriter(path)
    assert threading.active_count() == before
