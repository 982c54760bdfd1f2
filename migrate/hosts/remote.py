"""A host as its operator reaches it: commands over SSH, as root, with answers that are judged."""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from migrate.errors import MigrateError, Unreachable
from migrate.hosts import bootstrap
from transport.ssh.errors import SshError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType
    from typing import Self

    from transport.ssh.asking import Asking
    from transport.ssh.connection import Completed, SshConnection

PROGRAM_ROOT: Final = "/opt/migrate"
ANSWER_DEADLINE_S: Final = 60.0
INSTALL_DEADLINE_S: Final = 600.0
"""To carry some 30 MB over a slow line."""
PACKAGES_DEADLINE_S: Final = 1200.0
_ANSWER_BYTES_MAX: Final = 1 << 20
# sh(1): the command was not found; no permission to run it.
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126

_Answer = TypeVar("_Answer")


class HostFacts(msgspec.Struct, frozen=True):
    """What `bootstrap.probe` found. programs: where each is, "" for nowhere. installed: the version
    below PROGRAM_ROOT, "" for none."""

    hostname: str
    uid: int
    python: tuple[int, int, int]
    machine: str
    glibc: str
    systemd: bool
    apt: bool
    programs: dict[str, str]
    criu: str
    distributions: dict[str, str]
    pycriu: bool
    installed: str


class RemoteHost:
    """An SSH connection that runs things as root. Blocking; close it."""

    def __init__(self, ssh: SshConnection) -> None:
        self.ssh = ssh
        self.destination = str(ssh.target)
        self._sudo: list[str] = []
        self._become_root()

    @classmethod
    def reach(cls, destination: str, asking: Asking) -> Self:
        """Connect. Raises MigrateError."""
        # paramiko has some 10 MB, and agents, which hardly ever come here, would keep them.
        from transport.ssh.connecting import connect

        try:
            return cls(connect(destination, asking))
        except SshError as error:
            raise translated(error) from error

    def probe(self, root: str = PROGRAM_ROOT) -> HostFacts:
        """Raises MigrateError, also for a host without Python."""
        return self._bootstrap(HostFacts, "probe", root)

    def install(self, version: str, archive: bytes, root: str = PROGRAM_ROOT) -> None:
        """Bring a bundle; one that is there already is only pointed to. Raises MigrateError."""
        self._bootstrap(dict, "install", root, version, data=archive, deadline_s=INSTALL_DEADLINE_S)

    def settle(self) -> None:
        """What lasts from one version to the next: an account, a name in the PATH. Raises
        MigrateError."""
        self._bootstrap(dict, "settle", PROGRAM_ROOT)

    def clear(self, directory: str) -> bool:
        """Remove what one migration brought; whether it is gone. Raises MigrateError."""
        return not self._bootstrap(dict, "clear", directory).get("there")

    def install_packages(self, packages: Sequence[str]) -> None:
        """By apt. Raises MigrateError with apt's last words."""
        options = ["-q", "-y", "-o", "DPkg::Lock::Timeout=300"]
        apt = ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", *options]
        for command in (["update"], ["install", "--no-install-recommends", *packages]):
            self.run([*apt, *command], deadline_s=PACKAGES_DEADLINE_S)

    def migrate(
        self,
        arguments: Sequence[str],
        answer: type[_Answer],
        *,
        stdin: bytes = b"",
        root: str = PROGRAM_ROOT,
        deadline_s: float = ANSWER_DEADLINE_S,
    ) -> _Answer:
        """What a command of the project that is installed there answers, JSON. Raises
        MigrateError."""
        command = [f"{root}/current/bin/migrate", *arguments]
        done = self.run(command, stdin=stdin, deadline_s=deadline_s)
        return self._decoded(done, answer, " ".join(arguments))

    def run(
        self, command: Sequence[str], *, stdin: bytes = b"", deadline_s: float = ANSWER_DEADLINE_S
    ) -> Completed:
        """A command as root that succeeds. Raises MigrateError."""
        done = self._run([*self._sudo, *command], stdin, deadline_s)
        if done.status != 0:
            raise self._failure(f"{command[0]} failed with status {done.status}", done)
        return done

    def close(self) -> None:
        """End the connection."""
        self.ssh.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _become_root(self) -> None:
        if self._run(["id", "-u"], b"", ANSWER_DEADLINE_S).stdout.strip() == b"0":
            return
        self._sudo = ["sudo", "-n", "--"]
        done = self._run([*self._sudo, "true"], b"", ANSWER_DEADLINE_S)
        if done.status != 0:
            self.close()
            user = self.ssh.target.user
            error = self._failure(f"{user} is not root, and sudo without a password fails", done)
            raise error.at(remedy="log in as root, or allow that sudo for the enrolment")

    def _bootstrap(
        self,
        answer: type[_Answer],
        *arguments: str,
        data: bytes = b"",
        deadline_s: float = ANSWER_DEADLINE_S,
    ) -> _Answer:
        script = inspect.getsource(bootstrap).encode()
        start = f"import sys; exec(sys.stdin.buffer.read({len(script)}))"
        command = [*self._sudo, "python3", "-I", "-c", start, *arguments]
        done = self._run(command, script + data, deadline_s)
        if done.status in (_NOT_FOUND, _NOT_EXECUTABLE):
            raise MigrateError(
                "there is no Python on this host",
                host=self.destination,
                remedy="install Python 3.11 or newer there (Debian: python3)",
            )
        if done.status != 0:
            raise self._failure(f"{arguments[0]} failed", done)
        return self._decoded(done, answer, arguments[0])

    def _run(self, command: Sequence[str], stdin: bytes, deadline_s: float) -> Completed:
        try:
            return self.ssh.run(
                [os.fspath(part) for part in command],
                stdin=stdin,
                deadline_s=deadline_s,
                output_bytes_max=_ANSWER_BYTES_MAX,
            )
        except SshError as error:
            raise translated(error) from error

    def _decoded(self, done: Completed, answer: type[_Answer], what: str) -> _Answer:
        try:
            return msgspec.json.decode(done.stdout, type=answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise MigrateError(
                f"{what} answers what can't be understood: {error}", host=self.destination
            ) from error

    def _failure(self, message: str, done: Completed) -> MigrateError:
        words = done.last_words
        return MigrateError(f"{message}: {words}" if words else message, host=self.destination)


def translated(error: SshError) -> MigrateError:
    """An error of SSH as one of the package's."""
    return Unreachable(str(error), remedy=error.remedy)
