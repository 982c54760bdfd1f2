"""The processes that a migration consists of, found on a lab host by what belongs to it alone.

All processes of a host are in its cgroup. The ones of a migration have its session's directory in
their command line; CRIU, which is not told it there, has files of it open. Of several that look
alike (CRIU and the tasks that it forks) the one that started the others is meant.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.lab.host import Host
from tests.faults.points import Victim

SESSIONS: Final = "/run/migrate/sessions"


@dataclass(frozen=True)
class Process:
    """One process; pids are those that this machine sees."""

    pid: int
    parent: int
    name: str
    words: tuple[str, ...]

    def has_open(self, directory: str) -> bool:
        """Whether it has a file below this directory of its host open."""
        links = [str(fd.readlink()) for fd in Path(f"/proc/{self.pid}/fd").iterdir()]
        return any(link.startswith(f"{directory}/") for link in links)


def processes(host: Host) -> Iterator[Process]:
    """Every process on a host."""
    # A walk that comes to a cgroup that has just been removed goes on.
    for directory, _, _ in os.walk(host.cgroup):
        with contextlib.suppress(OSError):
            for pid in Path(directory, "cgroup.procs").read_text().split():
                with contextlib.suppress(OSError):
                    yield _process(int(pid))


def _process(pid: int) -> Process:
    directory = Path("/proc", str(pid))
    words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
    # Behind the command's name, which may contain anything: state, parent (proc(5)).
    head, _, fields = (directory / "stat").read_text().rpartition(")")
    return Process(pid, int(fields.split()[1]), head.partition("(")[2], tuple(words))


def find(host: Host, victim: Victim, migration: str) -> int | None:
    """The process of a migration on that host; None when there is none."""
    role = (
        "source" if victim in (Victim.GUARD, Victim.SOURCE_RUNC, Victim.SOURCE_CRIU) else "target"
    )
    session = f"{SESSIONS}/{migration}.{role}"
    alike = []
    for process in processes(host):
        # One that ends meanwhile is not meant.
        with contextlib.suppress(OSError):
            alike += [process] if _is(process, victim, session) else []
    pids = {one.pid for one in alike}
    first = [one.pid for one in alike if one.parent not in pids]
    return first[0] if first else None


def front(host: Host) -> int | None:
    """What the agent of that host has for the network; None when it is just being replaced."""
    pids = [one.pid for one in processes(host) if "migrate.agent.front" in one.words]
    return pids[0] if pids else None


def _is(process: Process, victim: Victim, session: str) -> bool:
    words = process.words
    by_word = any(session in word for word in words)
    program = Path(words[0]).name
    match victim:
        case Victim.GUARD:
            # It is told by a pipe whom it guards. A host has one: one migration at a time.
            return "migrate.guard" in words
        case Victim.SOURCE_RUNC:
            return program == "runc" and "checkpoint" in words and by_word
        case Victim.TARGET_RUNC:
            return program == "runc" and "restore" in words and by_word
        case Victim.SOURCE_CRIU | Victim.TARGET_CRIU:
            # The gate becomes CRIU, which makes its command line what it likes.
            is_gate = "swrk" in words and by_word
            return is_gate or (process.name == "criu" and process.has_open(session))
        case Victim.PAGER_KEEPER | Victim.PAGER_WORKER:
            # Each has been the other's parent at some time; they differ in what they are called.
            return process.name == victim and by_word
        case _:
            raise ValueError(f"{victim} is not found by its session")


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process, if it still is there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
