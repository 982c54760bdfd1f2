"""The journal: what state each migration of this host has reached, on disk before it is acted on.

SQLite, write-ahead log, synchronous=FULL: `append` returns after the record is synced.

    migrations   (migration_id, role) attempt container runtime peer created_wall_s facts
    transitions  (migration_id, role, seq) state event at_wall_s detail digest
    counters     name value: the newest attempt of this host; `floor/PEER`: the newest attempt of a
                 source among those that were forgotten, which stays when its migrations do not

`facts` is what a recovery needs to know (cgroup, ports, directories), `detail` what a person may
want to; both JSON objects. A record is only appended where the state machine's table leads from
the last one to it (`MAY_FOLLOW`), within one transaction, so that two processes that both believe
to be in charge cannot both decide. A file that is damaged, of another program or of another version
is refused; nothing here repairs or guesses.

A `Journal` belongs to the thread that opened it. `JournalWriter` gives it a thread of its own, for
asyncio. The guard opens it read-only, which is cheap: no check of the whole file.
"""

from __future__ import annotations

import asyncio
import hashlib
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import msgspec

from migrate.core import source_machine, target_machine
from migrate.core.states import SOURCE_TERMINAL, TARGET_TERMINAL, SourceState, TargetState
from migrate.errors import JournalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from types import TracebackType

    from migrate.core.table import Verdict

Role: TypeAlias = Literal["source", "target"]
Facts: TypeAlias = dict[str, Any]
ResultT = TypeVar("ResultT")

APPLICATION_ID: Final = 0x446F6C79
"""The bytes "Doly" in the file's header: this file is no other program's database."""
SCHEMA_VERSION: Final = 1

BUSY_TIMEOUT_S: Final = 5.0
"""Two processes may write (agent and command line); each holds the lock for one sync."""
MAX_JSON_BYTES: Final = 64 * 1024
"""Of facts or detail: paths, names and one error message; more is a mistake."""
MAX_RECORDS: Final = 64
"""Of one migration and role; the tables allow no more than eight."""
MAX_AGE_S: Final = 90 * 86400.0
"""How long a finished migration can still be asked about by its peer."""
WAL_BYTES_MAX: Final = 1 << 20
"""What the write-ahead log keeps after a reader has made it grow; a migration writes 0.1 MiB."""
MAX_FINISHED: Final = 1000
"""Finished migrations kept: about 2 KiB each."""

_TABLES: Final = """
CREATE TABLE migrations (
    migration_id TEXT NOT NULL, role TEXT NOT NULL, attempt INTEGER NOT NULL,
    container TEXT NOT NULL, runtime TEXT NOT NULL, peer TEXT NOT NULL,
    created_wall_s REAL NOT NULL, facts TEXT NOT NULL,
    PRIMARY KEY (migration_id, role)
) WITHOUT ROWID, STRICT;
CREATE TABLE transitions (
    migration_id TEXT NOT NULL, role TEXT NOT NULL, seq INTEGER NOT NULL,
    state TEXT NOT NULL, event TEXT NOT NULL, at_wall_s REAL NOT NULL, detail TEXT NOT NULL,
    digest BLOB NOT NULL,
    PRIMARY KEY (migration_id, role, seq),
    FOREIGN KEY (migration_id, role) REFERENCES migrations ON DELETE CASCADE
) WITHOUT ROWID, STRICT;
CREATE TABLE counters (name TEXT PRIMARY KEY NOT NULL, value INTEGER NOT NULL) STRICT;
INSERT INTO counters VALUES ('attempt', 0);
"""
_ALL: Final = "SELECT * FROM migrations ORDER BY created_wall_s, migration_id, role"
_LATEST: Final = (
    "SELECT * FROM migrations ORDER BY created_wall_s DESC, migration_id, role LIMIT {:d}"
)
_TERMINAL: Final = ", ".join(f"'{state}'" for state in sorted(SOURCE_TERMINAL | TARGET_TERMINAL))
_UNFINISHED: Final = f"""
SELECT * FROM migrations AS one WHERE NOT EXISTS (
    SELECT 1 FROM transitions AS last
    WHERE last.migration_id = one.migration_id AND last.role = one.role AND last.state IN
    ({_TERMINAL})
) ORDER BY created_wall_s, migration_id, role
"""  # noqa: S608  (names of states)
_FORGOTTEN: Final = f"""
SELECT migration_id, role FROM (
    SELECT migration_id, role, at_wall_s,
        row_number() OVER (ORDER BY at_wall_s DESC, migration_id, role) AS number
    FROM transitions WHERE state IN ({_TERMINAL})
) WHERE number > ? OR at_wall_s < ?
"""  # noqa: S608  (names of states)
_RAISE_FLOORS: Final = f"""
INSERT INTO counters SELECT 'floor/' || peer, max(attempt) FROM migrations
WHERE role = 'target' AND (migration_id, role) IN ({_FORGOTTEN}) GROUP BY peer
ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)
"""  # noqa: S608
_FORGET: Final = f"DELETE FROM migrations WHERE (migration_id, role) IN ({_FORGOTTEN})"  # noqa: S608
_ONE_MIGRATION: Final = "SELECT * FROM migrations WHERE migration_id = ? AND role = ?"


class Migration(msgspec.Struct, frozen=True):
    """One migration in the eyes of one of its two hosts. created_wall_s: Unix time."""

    migration_id: str
    role: Role
    attempt: int
    container: str
    runtime: str
    peer: str
    created_wall_s: float
    facts: Facts = {}


class Record(msgspec.Struct, frozen=True):
    """One transition: the state that was entered, by which event. at_wall_s: Unix time."""

    migration_id: str
    role: Role
    seq: int
    state: str
    event: str
    at_wall_s: float
    detail: Facts = {}


class Journal:
    """An open journal; see the module. Use `open` or `open_read_only`; close it."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self.path = path

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open for writing, create it (0600, in a directory 0700) if there is none, and check the
        whole of it. Raises JournalError."""
        with _translated(path):
            _make_private(path)
            connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        journal = cls(connection, path)
        try:
            with _translated(path):
                journal._set_up()
        except BaseException:
            connection.close()
            raise
        return journal

    @classmethod
    def open_read_only(cls, path: Path) -> Journal:
        """Open an existing journal for reading. Raises JournalError."""
        with _translated(path):
            uri = f"file:{quote(str(path))}?mode=ro"
            connection = sqlite3.connect(
                uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
            )
        journal = cls(connection, path)
        try:
            with _translated(path):
                journal._check_identity()
        except BaseException:
            connection.close()
            raise
        return journal

    def close(self) -> None:
        """Close it. Idempotent."""
        self._connection.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- writing ---

    def claim_attempt(self, now_wall_s: float) -> int:
        """The next attempt number of this host: it always grows, over pruning and restarts, and by
        the clock also over a journal that was lost. Peers refuse what comes with an older one."""
        with self._writing():
            row = self._connection.execute(
                "UPDATE counters SET value = max(value + 1, ?) WHERE name = 'attempt'"
                " RETURNING value",
                (int(now_wall_s * 1000),),
            ).fetchone()
        return int(row[0])

    def newest_attempt(self, container: str, peer: str) -> int:
        """The highest attempt of `peer` to bring `container` here; 0 when there was none.

        Of migrations that are forgotten, the highest of that peer for any container: its attempts
        grow over all of them, so what comes with a lower one is older than they are.
        """
        with _translated(self.path):
            (attempt,) = self._connection.execute(
                "SELECT max("
                "(SELECT coalesce(max(attempt), 0) FROM migrations"
                " WHERE role = 'target' AND container = ? AND peer = ?),"
                " (SELECT coalesce(max(value), 0) FROM counters WHERE name = 'floor/' || ?))",
                (container, peer, peer),
            ).fetchone()
        return int(attempt)

    def begin(self, migration: Migration) -> None:
        """Enter a migration; its transitions can be appended then. Raises JournalError if it is
        known already. Also prunes, and folds the write-ahead log back, so that no later sync has
        to."""
        facts = _json(migration.facts)
        with self._writing():
            key = (migration.migration_id, migration.role)
            if self._connection.execute(_ONE_MIGRATION, key).fetchone() is not None:
                raise JournalError(f"the journal knows {key[0]} as {key[1]} already")
            self._connection.execute(
                "INSERT INTO migrations VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    migration.migration_id,
                    migration.role,
                    migration.attempt,
                    migration.container,
                    migration.runtime,
                    migration.peer,
                    migration.created_wall_s,
                    facts,
                ),
            )
            self._forget(migration.created_wall_s - MAX_AGE_S, MAX_FINISHED)
        with _translated(self.path):
            self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()

    def note(self, migration_id: str, role: Role, facts: Mapping[str, Any]) -> None:
        """Add to the facts of a migration, replacing those of the same name."""
        with self._writing():
            known = self._migration(migration_id, role)
            self._connection.execute(
                "UPDATE migrations SET facts = ? WHERE migration_id = ? AND role = ?",
                (_json({**known.facts, **facts}), migration_id, role),
            )

    def append(
        self,
        migration_id: str,
        role: Role,
        state: str,
        event: str,
        *,
        at_wall_s: float,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Append a transition; returns when it is on disk. The state that is the last one already
        is not written again. Raises JournalError if the table does not lead from the last one to
        it, or if it cannot be written (then it is not known whether it was)."""
        text = _json(detail or {})
        with self._writing():
            self._migration(migration_id, role)
            records = self._records(migration_id, role)
            last = records[-1].state if records else None
            if last == state:
                return
            if not _may_follow(role, last, state):
                raise JournalError(
                    f"{state} cannot follow {last or 'nothing'} in the journal of {migration_id}",
                    phase=last or "",
                    remedy="another process has decided this migration: see what its journal says",
                )
            key = (migration_id, role, len(records), str(state), str(event), float(at_wall_s), text)
            self._connection.execute(
                "INSERT INTO transitions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*key, _digest(key))
            )

    def prune(
        self, now_wall_s: float, *, max_age_s: float = MAX_AGE_S, max_finished: int = MAX_FINISHED
    ) -> int:
        """Forget finished migrations that are too old or too many; returns how many. An unfinished
        one is never forgotten. `begin` does it too."""
        with self._writing():
            return self._forget(now_wall_s - max_age_s, max_finished)

    # --- reading ---

    def migration(self, migration_id: str, role: Role) -> Migration:
        """One migration. Raises JournalError if it is not known."""
        with _translated(self.path):
            return self._migration(migration_id, role)

    def records(self, migration_id: str, role: Role) -> list[Record]:
        """Its transitions, oldest first; none if it is not known."""
        with _translated(self.path):
            return self._records(migration_id, role)

    def state(self, migration_id: str, role: Role) -> str | None:
        """The last recorded state; None if there is none. What `Ask` is answered with."""
        records = self.records(migration_id, role)
        return records[-1].state if records else None

    def unfinished(self) -> list[tuple[Migration, list[Record]]]:
        """Migrations whose end is not recorded, with their transitions, oldest first."""
        with _translated(self.path):
            return [
                (migration, self._records(migration.migration_id, migration.role))
                for migration in self._migrations(_UNFINISHED)
            ]

    def history(self, migrations_max: int) -> list[tuple[Migration, list[Record]]]:
        """The latest migrations, whatever has become of them, with their transitions; the newest
        last."""
        with _translated(self.path):
            found = self._migrations(_LATEST.format(migrations_max))
            return [(one, self._records(one.migration_id, one.role)) for one in reversed(found)]

    def verdict(self, migration_id: str, role: Role) -> Verdict:
        """What becomes of what CRIU holds here when whoever drove it is gone."""
        state = self.state(migration_id, role)
        if role == "source":
            return source_machine.VERDICTS[SourceState(state) if state else SourceState.NEW]
        return target_machine.VERDICTS[TargetState(state) if state else TargetState.OPEN]

    # --- inner ---

    def _set_up(self) -> None:
        execute = self._connection.execute
        mode = execute("PRAGMA journal_mode = WAL").fetchone()[0]
        if mode != "wal":
            raise JournalError(f"{self.path} is on a file system without shared memory ({mode})")
        execute("PRAGMA synchronous = FULL")
        execute("PRAGMA foreign_keys = ON")
        # Folding the log back costs a second sync of the whole file: not within a handover.
        execute("PRAGMA wal_autocheckpoint = 0")
        execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
        with self._writing():
            is_new = execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
            if is_new:
                for statement in _TABLES.split(";\n"):
                    execute(statement)
                execute(f"PRAGMA application_id = {APPLICATION_ID}")
                execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._check_identity()
        found = [row[0] for row in execute("PRAGMA quick_check(3)")]
        if found != ["ok"]:
            raise _damaged(self.path, "; ".join(str(line) for line in found))
        for migration in self._migrations():
            self._records(migration.migration_id, migration.role)

    def _check_identity(self) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise JournalError(f"{self.path} is not a journal of migrations")
        if version != SCHEMA_VERSION:
            raise JournalError(
                f"{self.path} has version {version}, this program knows {SCHEMA_VERSION}",
                remedy="use the version that wrote it until no migration is unfinished",
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction that excludes other writers from its first read on."""
        with _translated(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _forget(self, older_than_wall_s: float, max_finished: int) -> int:
        """Within a transaction, and a millisecond: somebody in a handover may be waiting."""
        limits = (max_finished, older_than_wall_s)
        self._connection.execute(_RAISE_FLOORS, limits)
        return self._connection.execute(_FORGET, limits).rowcount

    def _migrations(self, query: str = _ALL) -> list[Migration]:
        rows = self._connection.execute(query)
        return [self._read(Migration, row, facts_at=7) for row in rows.fetchall()]

    def _migration(self, migration_id: str, role: Role) -> Migration:
        row = self._connection.execute(_ONE_MIGRATION, (migration_id, role)).fetchone()
        if row is None:
            raise JournalError(f"the journal knows no migration {migration_id} as {role}")
        return self._read(Migration, row, facts_at=7)

    def _records(self, migration_id: str, role: Role) -> list[Record]:
        rows = self._connection.execute(
            "SELECT * FROM transitions WHERE migration_id = ? AND role = ? ORDER BY seq LIMIT ?",
            (migration_id, role, MAX_RECORDS + 1),
        ).fetchall()
        last: str | None = None
        records = []
        for number, (*key, digest) in enumerate(rows):
            record = self._read(Record, key, facts_at=6)
            is_whole = _digest(tuple(key)) == digest and record.seq == number < MAX_RECORDS
            if not is_whole or not _may_follow(role, last, record.state):
                raise _damaged(self.path, f"record {number} of {migration_id}")
            last = record.state
            records.append(record)
        return records

    def _read(self, kind: type[ResultT], row: Sequence[Any], *, facts_at: int) -> ResultT:
        try:
            values = [*row[:facts_at], msgspec.json.decode(row[facts_at])]
            names = kind.__struct_fields__  # type: ignore[attr-defined]
            return msgspec.convert(dict(zip(names, values, strict=True)), kind)
        except (msgspec.MsgspecError, ValueError) as error:
            raise _damaged(self.path, str(error)) from error


class JournalWriter:
    """A journal with a thread of its own: what is asked for first is on disk first.

    Opens the journal when it is made (blocking). A call that is cancelled may still be carried out.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._is_closed = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        try:
            self._journal = self._thread.submit(Journal.open, path).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def call(self, read_or_write: Callable[[Journal], ResultT]) -> ResultT:
        """Run a function with the journal in its thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, read_or_write, self._journal)

    async def begin(
        self,
        migration_id: str,
        role: Role,
        *,
        attempt: int,
        container: str,
        runtime: str,
        peer: str,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """See `Journal.begin`; the time is now."""
        migration = Migration(
            migration_id, role, attempt, container, runtime, peer, self._clock(), dict(facts or {})
        )
        await self.call(lambda journal: journal.begin(migration))

    async def note(self, migration_id: str, role: Role, **facts: Any) -> None:
        """See `Journal.note`."""
        await self.call(lambda journal: journal.note(migration_id, role, facts))

    async def record(
        self,
        migration_id: str,
        role: Role,
        state: str,
        event: str,
        **detail: Any,
    ) -> None:
        """See `Journal.append`; the time is now."""
        at_wall_s = self._clock()
        await self.call(
            lambda journal: journal.append(
                migration_id, role, state, event, at_wall_s=at_wall_s, detail=detail
            )
        )

    async def claim_attempt(self) -> int:
        """See `Journal.claim_attempt`."""
        now_wall_s = self._clock()
        return await self.call(lambda journal: journal.claim_attempt(now_wall_s))

    def close(self) -> None:
        """Finish what was asked for and close. Blocking, idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._thread.submit(self._journal.close).result()
            self._thread.shutdown()


def _may_follow(role: Role, last: str | None, state: str) -> bool:
    try:
        if role == "source":
            before = SourceState(last) if last else SourceState.NEW
            return SourceState(state) in source_machine.MAY_FOLLOW[before]
        earlier = TargetState(last) if last else TargetState.OPEN
        return TargetState(state) in target_machine.MAY_FOLLOW[earlier]
    except (ValueError, KeyError):
        return False


def _digest(key: Sequence[Any]) -> bytes:
    return hashlib.blake2b(msgspec.json.encode(key), digest_size=8).digest()


def _json(value: Mapping[str, Any]) -> str:
    try:
        data = msgspec.json.encode(value, order="sorted")
    except (TypeError, msgspec.MsgspecError) as error:
        raise JournalError(f"the journal cannot hold {value!r}: {error}") from error
    if len(data) > MAX_JSON_BYTES:
        raise JournalError(f"{len(data)} bytes of facts, the journal takes {MAX_JSON_BYTES}")
    return data.decode()


def _make_private(path: Path) -> None:
    """The file, readable by its owner alone, in a directory that is so as well."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.touch(mode=0o600)
    path.chmod(0o600)


def _damaged(path: Path, what: str) -> JournalError:
    return JournalError(
        f"{path} is damaged: {what}",
        remedy="keep the file, find out on both hosts where each container is, then move it away",
    )


def _remedy(path: Path, error: sqlite3.OperationalError) -> str:
    if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
        return f"free space in {path.parent}"
    return "is the disk full, the directory writable, another process stuck in it?"


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # used from another thread, or after `close`: nothing is wrong with the file
    except sqlite3.OperationalError as error:
        raise JournalError(
            f"{path} cannot be used: {error}", remedy=_remedy(path, error)
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, str(error)) from error
    except OSError as error:
        raise JournalError(f"{path} cannot be used: {error}") from error
