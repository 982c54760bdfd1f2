"""An agent for one migration alone: its identity, its files, its ports, and its end.

    STATE/once/ID/      all of it, 0700
      tls/              an identity of an authority that signed two and is forgotten
      journal.sqlite    of this migration
      program/          this source, where the host has none
      agent.json        the ports, once they are listened on

      dismissed         the source needs it no more

It ends when its migration has: the memory is filled in, or all is undone. Its directory goes when
the source has heard of that, since until then it may come back and ask. While a copy is held the
agent stays, however long that is, and after a crash `once start` makes another one that goes on. It
shares nothing with an agent that the host may have besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from migrate.claim import claimant
from migrate.errors import MigrateError
from migrate.standing import status
from transport import sealed_files

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from migrate import config
    from migrate.agent.app import Agent

# From the start to the source's session: preflight of the source is in between. And how long a
# source that does not dismiss the agent is waited for, before it has to start it again to ask.
UNUSED_S: Final = 600.0
LOOK_S: Final = 0.5
START_DEADLINE_S: Final = 60.0
STOP_DEADLINE_S: Final = 60.0
_POLL_S: Final = 0.05
_PORTS: Final = "agent.json"
_DISMISSED: Final = "dismissed"
_LOG: Final = "agent.log"


class Listening(msgspec.Struct, frozen=True):
    """Where the agent listens. host: what this host calls itself, which its certificate proves."""

    host: str
    port: int
    data_port: int


class Ended(msgspec.Struct, frozen=True):
    """busy: migrations that keep the agent; empty when it and its directory are gone."""

    busy: tuple[str, ...]


def start(paths: config.HostPaths, migration_id: str) -> Listening:
    """Start the agent and wait until it listens; one that runs is left alone. Blocking. Raises
    MigrateError."""
    if claimant(paths.agent_claim) is None:
        (paths.state / _PORTS).unlink(missing_ok=True)
        _spawn(paths, ["--once", migration_id])
    return _await_listening(paths)


def stop(paths: config.HostPaths) -> Ended:
    """The source has heard all: end the agent and remove its directory, now or when the memory is
    filled in. Blocking, while it undoes. Raises OSError, JournalError."""
    deadline_s = time.monotonic() + STOP_DEADLINE_S
    while paths.state.exists():
        with contextlib.suppress(FileNotFoundError):
            (paths.state / _DISMISSED).touch(mode=0o600)
        busy = _busy(paths)
        if claimant(paths.agent_claim) is None and not busy:
            clear(paths)
        elif time.monotonic() > deadline_s:
            return Ended(busy or ("the agent",))
        else:
            time.sleep(_POLL_S)
    return Ended(())


async def until_ended(paths: config.HostPaths, agent: Agent) -> None:
    """Tell whoever started the agent that it listens. Returns when nobody needs it any more: it has
    no session, and was dismissed or is not used."""
    listening = Listening(socket.gethostname(), *agent.ports)
    sealed_files.replace(paths.state / _PORTS, msgspec.json.encode(listening))
    limit_s = time.monotonic() + UNUSED_S
    while True:
        if agent.is_busy:
            limit_s = time.monotonic() + UNUSED_S
        elif is_dismissed(paths) or time.monotonic() > limit_s:
            return
        await asyncio.sleep(LOOK_S)


def is_dismissed(paths: config.HostPaths) -> bool:
    """Whether the source has said that it needs the agent no more."""
    return (paths.state / _DISMISSED).exists()


def clear(paths: config.HostPaths) -> None:
    """Remove what there is of a migration that has ended."""
    for directory in (paths.run, paths.state):
        shutil.rmtree(directory, ignore_errors=True)
        # Another migration may be there.
        with contextlib.suppress(OSError):
            directory.parent.rmdir()


def _busy(paths: config.HostPaths) -> tuple[str, ...]:
    if not paths.journal.exists():
        return ()
    return tuple(one.migration_id for one in status(paths, None) if not one.ended)


def _spawn(paths: config.HostPaths, arguments: Sequence[str]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    with os.fdopen(os.open(paths.state / _LOG, flags, 0o600), "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "migrate", "agent", *arguments],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _await_listening(paths: config.HostPaths) -> Listening:
    deadline_s = time.monotonic() + START_DEADLINE_S
    while True:
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode(sealed_files.read(paths.state / _PORTS), type=Listening)
        if time.monotonic() > deadline_s:
            raise MigrateError(
                f"the agent of this migration does not start: {_last_line(paths.state / _LOG)}",
                host=socket.gethostname(),
            )
        time.sleep(_POLL_S)


def _last_line(path: Path) -> str:
    with contextlib.suppress(OSError):
        lines = path.read_text(errors="replace")[-2000:].strip().splitlines()
        return lines[-1][:300] if lines else "it says nothing"
    return "it has no log"
