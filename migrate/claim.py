"""Who drives one side of a migration: one process at a time, by a lock that the kernel frees.

A coordinator claims its migration, an agent its sessions and itself, a recovery what it finishes.
The lock (flock(2)) is on a file below RUN/claims and ends with its process, however that ends, so
whoever gets it knows that nobody else acts. Children do not inherit it. The file says the pid, for
people and for `migrate cancel`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING, Self

from migrate.errors import MigrateError

if TYPE_CHECKING:
    from pathlib import Path

_PID_BYTES_MAX = 32


class ClaimTakenError(MigrateError):
    """Another process drives this. `pid` is its process, 0 when it has not said so yet."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(f"{path.name} is in the hands of process {pid or '?'}")
        self.pid = pid


class Claim:
    """A claim that this process has. `take` it, `release` it."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @classmethod
    def take(cls, path: Path) -> Self:
        """Raises ClaimTakenError, or MigrateError when the file can't be made."""
        try:
            return cls(path, _lock(path))
        except BlockingIOError:
            raise ClaimTakenError(path, _pid(path)) from None
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


def claimant(path: Path) -> int | None:
    """The process that has the claim, 0 when it has not said its pid; None when it is free."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _pid(path)
    else:
        return None
    finally:
        os.close(fd)


def _lock(path: Path) -> int:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The former owner removes the file: a lock on one that has no name is worth nothing.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, str(os.getpid()).encode(), 0)
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _pid(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return int(file.read(_PID_BYTES_MAX))
    except (OSError, ValueError):
        return 0
