"""A migration to a host that is in no fleet: `migrate CONTAINER --to USER@HOST`, the source's side.

1. SSH to the host; the program is brought there if it has none
2. an authority in memory signs an identity for each side, and is forgotten
3. the host starts an agent for this migration alone (`agent/once.py`)
4. the migration, as any other. Its connections go to the host's ports where they can be reached,
   through SSH where not; it is the same TLS inside
5. the agent ends; on both hosts what there was of it goes

STATE/once/ID/            0700
  tls/                    this side's identity
  way.json                how to come back: as long as the migration is in doubt
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from migrate.agent import once as agents
from migrate.agent.once import Ended, Listening
from migrate.commands.terminal import terminal
from migrate.errors import JournalError, MigrateError, Unreachable
from migrate.hosts import bundle, enrolment
from migrate.hosts.remote import PROGRAM_ROOT, RemoteHost
from migrate.identity import identity_errors, own_identity
from migrate.standing import status
from migrate.way import DIRECT, Way
from transport import sealed_files, tls
from transport.authority import Authority
from transport.enrolment import enrol_here
from transport.errors import TransportError
from transport.identity import Role
from transport.ssh.asking import Asking
from transport.ssh.forwarding import Forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from migrate import config

# Programs start, identities are made: seconds, on a slow host some more.
START_DEADLINE_S: Final = 120.0
# A port that a firewall drops packets for is tried for so long.
REACH_DEADLINE_S: Final = 4.0
REMOTE_ONCE: Final = "/var/lib/migrate/once"
_WAY: Final = "way.json"


class _Return(msgspec.Struct, frozen=True):
    """destination: for SSH. root: of the program there."""

    destination: str
    root: str
    listening: Listening


@dataclass(frozen=True, slots=True)
class _Session:
    """What is open: the connection, and the ways to the agent's ports."""

    way: Way
    is_tunnelled: bool


class OneShot:
    """From `enter` to `leave` there is an agent for this migration on the host."""

    def __init__(
        self,
        destination: str,
        migration_id: str,
        paths: config.HostPaths,
        asking: Asking,
        tell: Callable[[str], None],
    ) -> None:
        self._destination = destination
        self._id = migration_id
        self._paths = paths
        self._asking = asking
        self._tell = tell
        self._directory = paths.once(migration_id).state
        self._open = contextlib.ExitStack()
        self._host: RemoteHost | None = None
        self._root = PROGRAM_ROOT
        self._is_left = False
        self.way = Way()
        self.listening = Listening("", 0, 0)

    @property
    def paths(self) -> config.HostPaths:
        """This host's, with the identity of this migration."""
        return self._paths.with_identity(self._directory / "tls")

    def __enter__(self) -> Self:
        """Raises MigrateError; then nothing is left on either host."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._own_directory())
            self._host = stack.enter_context(RemoteHost.reach(self._destination, self._asking))
            stack.callback(self._dismiss)
            self._begin(self._host)
            session = reach(self._host, self.listening, self.paths, stack)
            self._open = stack.pop_all()
        self.way = session.way
        through = "through SSH, since its ports can't be reached" if session.is_tunnelled else "TLS"
        self._tell(f"{self.listening.host}: an agent for this migration runs; data by {through}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_in_doubt():
            # What is needed to come back stays, here and there.
            self._is_left = True
            self._open.pop_all()
            return
        self._open.close()

    def _begin(self, host: RemoteHost) -> None:
        facts = host.probe()
        made = bundle.make()
        if facts.installed != made.version:
            self._root = f"{REMOTE_ONCE}/{self._id}/program"
        self._remember()
        if facts.installed != made.version:
            enrolment.provide(host, facts, enrolment.Wishes(), self._tell, self._root)
        authority = Authority.temporary()
        place = ["--config", f"{REMOTE_ONCE}/{self._id}"]
        enrolment.give_identity(host, self._root, facts.hostname, authority, into=place)
        with identity_errors():
            enrol_here(self.paths.tls, authority, socket.gethostname(), Role.HOST)
        self.listening = host.migrate(
            ["once", "start", self._id], Listening, root=self._root, deadline_s=START_DEADLINE_S
        )
        self._remember()

    def _remember(self) -> None:
        """How to come back, if this process should not live to clear up."""
        back = _Return(self._destination, self._root, self.listening)
        sealed_files.replace(self._directory / _WAY, msgspec.json.encode(back))

    @contextlib.contextmanager
    def _own_directory(self) -> Iterator[None]:
        """It is locked as long as it is in use, and goes when nothing is left on the host."""
        sealed_files.make_directory(self._directory)
        with _locked(self._directory):
            try:
                yield
            finally:
                if not self._is_left:
                    agents.clear(self._paths.once(self._id))

    def _dismiss(self) -> None:
        assert self._host is not None
        try:
            dismiss(self._host, self._id, self._root)
        except Unreachable:
            # The connection has been idle for the whole of the migration: another one may do.
            self._dismiss_anew()
        except MigrateError as error:
            self._leave(error)

    def _dismiss_anew(self) -> None:
        try:
            with RemoteHost.reach(self._destination, self._asking) as host:
                dismiss(host, self._id, self._root)
        except MigrateError as error:
            self._leave(error)

    def _leave(self, error: MigrateError) -> None:
        self._is_left = True
        self._tell(
            f"{self._destination}: what was brought there is left ({error.message});"
            " to remove it: migrate recover"
        )

    def _is_in_doubt(self) -> bool:
        try:
            return self._id in _unfinished(self._paths)
        except JournalError:
            return True


def dismiss(host: RemoteHost, migration_id: str, root: str) -> None:
    """The agent may end. Raises MigrateError when it, or what it had, stays."""
    directory = f"{REMOTE_ONCE}/{migration_id}"
    # What was not brought completely has had no agent, and has no program to ask.
    if host.clear(directory):
        return
    ended = host.migrate(
        ["once", "stop", migration_id], Ended, root=root, deadline_s=START_DEADLINE_S
    )
    if ended.busy:
        raise MigrateError(f"its agent is still at {', '.join(ended.busy)}, and ends after it")


def reach(
    host: RemoteHost, listening: Listening, paths: config.HostPaths, stack: contextlib.ExitStack
) -> _Session:
    """The way to the agent's ports: itself if its control and data port answer by TLS, else by
    listeners of the stack. Raises MigrateError."""
    address = host.ssh.target.host
    ports = (listening.port, listening.data_port)
    is_direct = not (host.ssh.target.jumps or host.ssh.target.proxy_command)
    if is_direct and all(_answers(address, port, listening.host, paths) for port in ports):
        return _Session(Way({port: (address, port) for port in ports}), is_tunnelled=False)
    places = {}
    for port in ports:
        forward = stack.enter_context(Forward(host.ssh, "127.0.0.1", port))
        places[port] = ("127.0.0.1", forward.port)
    way = Way(places)
    if not _answers(*way.to("", listening.port), listening.host, paths):
        raise MigrateError(
            f"neither the ports of {address} can be reached, nor are they by SSH",
            host=listening.host,
            remedy=f"open {ports[0]} and {ports[1]}, or allow it in sshd (AllowTcpForwarding yes)",
        )
    return _Session(way, is_tunnelled=True)


def way_back(
    paths: config.HostPaths, migration_id: str, port: int, stack: contextlib.ExitStack
) -> tuple[Way, config.HostPaths]:
    """How to ask the target of a former migration, at the control port that it had: for one to a
    host of no fleet by SSH again, where its agent is started again if it has to be.

    The stack ends it. Blocking. Raises MigrateError.
    """
    directory = paths.once(migration_id).state
    back = _read(directory)
    if back is None:
        return DIRECT, paths
    own = paths.with_identity(directory / "tls")
    host = stack.enter_context(RemoteHost.reach(back.destination, Asking(terminal())))
    listening = host.migrate(
        ["once", "start", migration_id], Listening, root=back.root, deadline_s=START_DEADLINE_S
    )
    session = reach(host, listening, own, stack)
    return Way({port: session.way.to(listening.host, listening.port)}), own


def sweep(paths: config.HostPaths, asking: Asking, tell: Callable[[str], None]) -> None:
    """What migrations to hosts of no fleet have left here and there, and nobody needs any more.
    Blocking. Raises JournalError."""
    unfinished = _unfinished(paths)
    for directory in sorted(paths.once("x").state.parent.glob("*")):
        migration_id, back = directory.name, _read(directory)
        if back is None or migration_id in unfinished:
            continue
        try:
            with _locked(directory), RemoteHost.reach(back.destination, asking) as host:
                dismiss(host, migration_id, back.root)
        except BlockingIOError:
            continue  # it is under way
        except MigrateError as error:
            tell(f"{migration_id}: what it left on {back.listening.host} stays: {error.message}")
        else:
            agents.clear(paths.once(migration_id))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Raises BlockingIOError where another process has it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _read(directory: Path) -> _Return | None:
    try:
        return msgspec.json.decode(sealed_files.read(directory / _WAY), type=_Return)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        raise MigrateError(f"{directory / _WAY} can't be read: {error}") from error


def _answers(address: str, port: int, name: str, paths: config.HostPaths) -> bool:
    context = own_identity(paths).client_context()
    try:
        tls.connect(address, port, context, server_name=name, deadline_s=REACH_DEADLINE_S).close()
    except (TransportError, ssl.SSLError):
        return False
    return True


def _unfinished(paths: config.HostPaths) -> set[str]:
    """Migrations of this host that have not ended."""
    return {one.migration_id for one in status(paths, None) if not one.ended}
