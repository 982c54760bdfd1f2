"""Who drives one side of a migration: one process at a time, by a lock that the kernel frees.

A coordinator claims its migration, an agent its sessions and itself, a recovery what it finishes.
The lock (flock(2)) is on a file below RUN/claims and ends with its process, however that ends, so
whoever gets it knows that nobody else acts. Children do not inherit it. The file says who has it,
for people and for `migrate cancel`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Literal, NamedTuple, Self, TypeAlias

from migrate.errors import MigrateError

if TYPE_CHECKING:
    from pathlib import Path

Kind: TypeAlias = Literal["coordinator", "agent", "recovery", "drain"]
_TEXT_BYTES_MAX = 64


class Claimant(NamedTuple):
    """Who has a claim. pid is 0 as long as it has not said so."""

    pid: int
    kind: str

    def __str__(self) -> str:
        return f"the {self.kind} with pid {self.pid}" if self.pid else "a process"


class ClaimTakenError(MigrateError):
    """Another process drives this."""

    def __init__(self, path: Path, claimant: Claimant) -> None:
        super().__init__(f"{path.name} is in the hands of {claimant}")


class Claim:
    """A claim that this process has. `take` it, `release` it."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def take(cls, path: Path, kind: Kind) -> Self:
        """Raises ClaimTakenError, or MigrateError when the file can't be made."""
        try:
            return cls(path, _lock(path, kind))
        except BlockingIOError:
            raise ClaimTakenError(path, _read(path)) from None
        except OSError as error:
            raise MigrateError(
                f"{path} can't be claimed: {error.strerror}",
                remedy=f"is there room on the file system of {path.parent}?",
            ) from error

    def release(self) -> None:
        """Give it up. Idempotent."""
        if self._fd >= 0:
            # While it is locked: nobody can have taken a file of that name meanwhile.
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def claimant(path: Path) -> Claimant | None:
    """Who has the claim; None when it is free."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _read(path)
    else:
        return None
    finally:
        os.close(fd)


def _lock(path: Path, kind: Kind) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former owner removes the file: a lock on one that has no name is worth nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()} {kind}".encode(), 0)
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _read(path: Path) -> Claimant:
    try:
        with path.open("rb") as file:
            pid, kind = file.read(_TEXT_BYTES_MAX).decode().split()
        return Claimant(int(pid), kind)
    except (OSError, ValueError):
        return Claimant(0, "")
