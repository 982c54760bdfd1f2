"""What could not be written into the journal at once: a real journal that another process locks."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import journal
from migrate.core.states import TargetState as S
from migrate.errors import JournalError
from migrate.journal import JournalWriter
from migrate.ledger import Ledger


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.sqlite"


@pytest.fixture
def writer(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JournalWriter]:
    monkeypatch.setattr(journal, "BUSY_TIMEOUT_S", 0.0)
    writer = JournalWriter(path)
    yield writer
    writer.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


async def begun(writer: JournalWriter) -> Ledger:
    await writer.begin("m1", "target", attempt=1, container="c", runtime="runc", peer="A", facts={})
    ledger = Ledger(writer, "m1", "target")
    for state in (S.RECEIVING, S.PREPARED, S.COMMITTED):
        await ledger.record(state, "e")
    return ledger


async def states(writer: JournalWriter) -> list[str]:
    records = await writer.call(lambda journal: journal.records("m1", "target"))
    return [record.state for record in records]


async def test_what_is_owed_is_written_before_the_next_record(
    writer: JournalWriter, path: Path
) -> None:
    ledger = await begun(writer)
    with locked(path):
        with pytest.raises(JournalError):
            await ledger.record(S.RUNNING, "e")
        ledger.owe(S.RUNNING, "e")
        with pytest.raises(JournalError):
            await ledger.record(S.DONE, "e")
    await ledger.record(S.DONE, "e")
    assert await states(writer) == ["receiving", "prepared", "committed", "running", "done"]


async def test_the_last_record_can_be_written_late(writer: JournalWriter, path: Path) -> None:
    ledger = await begun(writer)
    ledger.owe(S.RUNNING, "e")
    ledger.owe(S.DONE, "e")
    with locked(path), pytest.raises(JournalError):
        await ledger.settle()
    assert (await states(writer))[-1] == "committed"
    await ledger.settle()
    await ledger.settle()
    assert (await states(writer))[-2:] == ["running", "done"]


async def test_a_record_that_failed_is_not_owed_by_itself(
    writer: JournalWriter, path: Path
) -> None:
    """A commit that could not be written must not come behind its rollback."""
    ledger = await begun(writer)
    with locked(path), pytest.raises(JournalError):
        await ledger.record(S.ABORTED, "e")
    await ledger.record(S.RUNNING, "e")
    assert (await states(writer))[-2:] == ["committed", "running"]
