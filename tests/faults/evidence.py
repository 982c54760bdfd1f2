"""What there is to see when a point has failed, before its lab is gone."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.lab.host import Host
from migrate.errors import JournalError
from migrate.journal import Journal
from tests.lab.invariants import AGENT_LOG

JOURNAL: Final = "/var/lib/migrate/journal.sqlite"
COPIES_MAX: Final = 5
LOG_LINES: Final = 60
_MIGRATIONS_MAX: Final = 3
_PROCESSES: Final = ["ps", "-eo", "pid,ppid,stat,wchan:20,cgroup,args", "--forest"]
_LOGS: Final = f"""\
for file in {AGENT_LOG} /run/migrate/sessions/*/work/*.log; do
    [ ! -s "$file" ] || {{ echo "---- $file"; tail -n {LOG_LINES} "$file"; }}
done
ls -laR /run/migrate
"""


@contextlib.contextmanager
def journal_of(host: Host) -> Iterator[Journal]:
    """The journal of a host as it is now, to read; raises JournalError.

    A copy: SQLite resolves links, and the one that leads into a host names this machine's own file.
    One that was folded back while it was copied does not agree with itself; the next one does.
    """
    source = host.path(JOURNAL)
    with contextlib.ExitStack() as stack:
        for tries_left in reversed(range(COPIES_MAX)):
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for file in source.parent.glob(f"{source.name}*"):
                if not file.name.endswith("-shm"):
                    shutil.copyfile(file, directory / file.name)
            try:
                journal = stack.enter_context(Journal.open(directory / source.name))
            except JournalError:
                if not tries_left:
                    raise
            else:
                break
        yield journal


def unfinished(host: Host) -> list[str]:
    """A line for each migration that a host's journal has not seen the end of."""
    with journal_of(host) as journal:
        return [
            f"{known.migration_id} as {known.role} is {records[-1].state if records else 'new'}"
            for known, records in journal.unfinished()
        ]


def gather(host: Host) -> str:
    """Journal, processes and logs of a host, as text."""
    parts = [f"==== {host.name}"]
    with contextlib.suppress(JournalError), journal_of(host) as journal:
        for known, _ in journal.history(_MIGRATIONS_MAX):
            records = journal.records(known.migration_id, known.role)
            states = " ".join(f"{one.state}({one.event})" for one in records)
            parts.append(f"{known.migration_id} {known.role} attempt {known.attempt}: {states}")
    for command in (_PROCESSES, ["sh", "-c", _LOGS]):
        done = host.run(command, check=False)
        parts.append(done.stdout + done.stderr)
    return "\n".join(parts)
