"""The agent as a service of this host: started, stopped, and what stands in the way of both.

Where systemd is, it is a unit; elsewhere a process of its own session, whose pid is in its claim.
What an operator's `migrate hosts` asks of a host over SSH is answered from here.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from migrate import standing, systemd
from migrate.agent.unit import unit_text
from migrate.claim import claimant
from migrate.errors import MigrateError
from transport.errors import TransportError
from transport.identity import HostIdentity, IdentityPaths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from migrate import config

UNIT: Final = "migrate-agent.service"
UNIT_PATH: Final = systemd.UNITS / UNIT
LOG_PATH: Final = Path("/var/log/migrate-agent.log")
# It reads its modules, and compiles them the first time: half a minute of an emulated processor,
# which it may have to share. It reads its journal, and goes on with former sessions.
START_DEADLINE_S: Final = 180.0
# config.STOP_DEADLINE_S for the sessions that are undone, and as much for the rest.
STOP_DEADLINE_S: Final = 60.0
CHANGE_DEADLINE_S: Final = 3 * systemd.DEADLINE_S + STOP_DEADLINE_S + START_DEADLINE_S
"""Of `start` and `remove`, for who waits for either over SSH."""
_POLL_S: Final = 0.05
_VERSIONS: Final = "versions"


class IdentityState(msgspec.Struct, frozen=True):
    """name, serial (hex), until (Unix time) of this host's identity; crl: the number of the latest
    revocation list; authority: its certificate (PEM). problem: why it can't be used, else ""."""

    name: str = ""
    serial: str = ""
    until_wall_s: float = 0.0
    crl: int = -1
    authority: str = ""
    problem: str = ""


class ServiceState(msgspec.Struct, frozen=True):
    """version: of the program that answers. agent_version: of the agent that runs, "" if that is
    another installation. busy: migrations that a restart would disturb. wall_s: the clock."""

    hostname: str
    version: str
    agent_pid: int
    agent_version: str
    listens: bool
    busy: tuple[str, ...]
    identity: IdentityState
    wall_s: float


class Started(msgspec.Struct, frozen=True):
    """how: running (it was already), started, restarted, or busy: an older one runs on."""

    how: str
    state: ServiceState


def state(paths: config.HostPaths, port: int) -> ServiceState:
    """What is up with the agent of this host. Raises JournalError."""
    agent = claimant(paths.agent_claim)
    pid = agent.pid if agent is not None else 0
    unfinished = standing.status(paths, None)
    return ServiceState(
        hostname=socket.gethostname(),
        version=_version_in(sys.prefix),
        agent_pid=pid,
        agent_version=_version_in(_command_line(pid)) if pid else "",
        listens=_listens(port),
        busy=tuple(
            one.migration_id for one in unfinished if one.role == "target" and not one.ended
        ),
        identity=_identity(paths),
        wall_s=time.time(),
    )


def start(paths: config.HostPaths, port: int) -> Started:
    """Have the agent of this installation run. One of another version is restarted unless it
    serves a session. Blocking. Raises MigrateError."""
    before = state(paths, port)
    has_changed = _write_unit() if systemd.is_here() else False
    is_ours = before.agent_version == before.version
    if before.agent_pid and is_ours and not has_changed:
        return Started("running", before)
    if before.agent_pid and before.busy:
        return Started("busy", before)
    if before.agent_pid:
        stop(paths)
    if systemd.is_here():
        systemd.systemctl("enable", "--quiet", "--now", UNIT, unit=UNIT)
    else:
        _spawn()
    _await_start(paths, port)
    return Started("restarted" if before.agent_pid else "started", state(paths, port))


def stop(paths: config.HostPaths) -> None:
    """End the agent; sessions that hold nothing are undone by it. Blocking. Raises MigrateError."""
    if systemd.is_here() and UNIT_PATH.exists():
        systemd.systemctl("stop", UNIT, unit=UNIT)
    agent = claimant(paths.agent_claim)
    if agent is None or not agent.pid:
        return
    with _process(agent.pid) as descriptor:
        if descriptor is not None:
            signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_DEADLINE_S
    while claimant(paths.agent_claim) is not None:
        if time.monotonic() > deadline_s:
            raise MigrateError(f"the agent (process {agent.pid}) does not end")
        time.sleep(_POLL_S)


def remove(paths: config.HostPaths) -> None:
    """The agent is stopped and starts no more, and this host has no identity from now on."""
    stop(paths)
    if systemd.is_here() and UNIT_PATH.exists():
        systemd.systemctl("disable", "--quiet", UNIT, unit=UNIT)
        UNIT_PATH.unlink(missing_ok=True)
        systemd.systemctl("daemon-reload", unit=UNIT)
    directory = _files(paths).directory
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)


def _identity(paths: config.HostPaths) -> IdentityState:
    files = _files(paths)
    try:
        identity = HostIdentity.load(files)
        authority = files.ca.read_text()
    except (TransportError, OSError) as error:
        return IdentityState(problem=str(error))
    return IdentityState(
        name=identity.owner.name,
        serial=f"{identity.owner.serial:x}",
        until_wall_s=identity.expires.timestamp(),
        crl=identity.revocations.number,
        authority=authority,
    )


def _files(paths: config.HostPaths) -> IdentityPaths:
    return IdentityPaths(paths.config / "tls")


def _write_unit() -> bool:
    """Whether the unit had to be written."""
    text = unit_text(Path(sys.prefix).parents[1] / "current" / "bin" / "migrate")
    if UNIT_PATH.exists() and UNIT_PATH.read_text() == text:
        return False
    UNIT_PATH.write_text(text)
    systemd.systemctl("daemon-reload", unit=UNIT)
    return True


def _spawn() -> None:
    """Without an init system that would look after it."""
    descriptor = os.open(LOG_PATH, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "migrate", "agent"],
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _await_start(paths: config.HostPaths, port: int) -> None:
    deadline_s = time.monotonic() + START_DEADLINE_S
    while claimant(paths.agent_claim) is None or not _listens(port):
        if time.monotonic() > deadline_s:
            words = _last_words()
            raise MigrateError(f"the agent does not start: {words}", remedy="see its log there")
        time.sleep(_POLL_S)


def _last_words() -> str:
    if systemd.is_here():
        return f"journalctl -u {UNIT} says why"
    with contextlib.suppress(OSError):
        lines = LOG_PATH.read_text(errors="replace")[-2000:].splitlines()
        return lines[-1][:300] if lines else "it says nothing"
    return "it says nothing"


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def _version_in(text: str) -> str:
    """VERSION of a path …/versions/VERSION/… in it."""
    _, found, rest = text.partition(f"/{_VERSIONS}/")
    return rest.partition("/")[0].split()[0] if found and rest else ""


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except (OSError, UnicodeDecodeError):
        return ""


@contextlib.contextmanager
def _process(pid: int) -> Iterator[int | None]:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)
