"""A directory that is lent to a process which is not trusted with it, and taken back for good.

    lent       the borrower gets a descriptor of a mount that is nowhere in the tree, with the
               directory as its root: `..` ends there, and no path of the host leads in or out
    taken      the kernel makes that mount read-only, which it refuses (EBUSY) as long as one file
               is open for writing through it; afterwards nothing that the borrower has kept writes
    inherited  what lies there now is looked at, given to root, and moved to where root wants it

open_tree(2), mount_setattr(2): Linux 5.14. Knows nothing of what is in the files.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import threading
import time
from typing import TYPE_CHECKING, Final

from migrate.errors import MigrateError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

# asm-generic/unistd.h: the same for every architecture that is new enough to have them.
_SYS_OPEN_TREE: Final = 428
_SYS_MOUNT_SETATTR: Final = 442
# fcntl.h, linux/mount.h
_AT_EMPTY_PATH: Final = 0x1000
_OPEN_TREE_CLONE: Final = 1
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _NOSYMFOLLOW = 1, 2, 4, 8, 0x200000

# The borrower closes its files first; what it has in its hands then is one call of write(2).
_WRITTEN_DEADLINE_S: Final = 2.0
_POLL_S: Final = 0.002

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class LendingError(MigrateError):
    """A directory could not be lent, or what came back is not what may be in it."""


class StillWrittenError(LendingError):
    """The borrower has a file open for writing, though it was told to close all."""


class LentDirectory:
    """See the module. `directory` belongs to `owner` (a uid, also a gid) until it is taken back."""

    def __init__(self, directory: Path, owner: int) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        try:
            directory.mkdir(mode=0o700)
            os.chown(directory, owner, owner)
            self._tree = _clone(directory)
        except OSError as error:
            raise LendingError(
                f"{directory} can't be lent: {error}", remedy="needs Linux 5.14"
            ) from error

    def descriptor(self) -> int:
        """For the borrower, the caller's to close. Raises LendingError after `close`."""
        with self._lock:
            if self._tree < 0:
                raise LendingError(f"{self._directory} is not lent any more")
            return os.dup(self._tree)

    def take_back(self, deadline_s: float = _WRITTEN_DEADLINE_S) -> None:
        """Nobody writes there any more, by whatever descriptor. Blocking. StillWrittenError."""
        cutoff_s = time.monotonic() + deadline_s
        while True:
            try:
                _set_attributes(self._tree, _RDONLY)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise LendingError(f"{self._directory} can't be taken back: {error}") from error
                if time.monotonic() > cutoff_s:
                    raise StillWrittenError(f"{self._directory} is being written to") from error
                time.sleep(_POLL_S)
            else:
                return

    def inherit(self, heir: Path, is_expected: Callable[[str], bool], files_max: int) -> list[str]:
        """Move what has been written to `heir`, a directory of this owner, after `take_back`; the
        names. Blocking.

        Raises LendingError for anything but plain files of expected names, each with one name.
        """
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        to = os.open(heir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with os.scandir(descriptor) as entries:
                names = [entry.name for entry in entries]
            if len(names) > files_max:
                raise LendingError(f"{len(names)} files have arrived, {files_max} may")
            for name in names:
                found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                is_plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
                if not is_plain or not is_expected(name):
                    raise LendingError(f"{name[:128]!r} is no file that may arrive")
                os.chown(name, 0, 0, dir_fd=descriptor, follow_symlinks=False)
                os.chmod(name, 0o600, dir_fd=descriptor)
                os.rename(name, name, src_dir_fd=descriptor, dst_dir_fd=to)
        except OSError as error:
            raise LendingError(f"{self._directory} can't be taken over: {error}") from error
        finally:
            os.close(descriptor)
            os.close(to)
        return names

    def close(self) -> None:
        """Give up the mount; the borrower's descriptor keeps it, read-only or not. Idempotent."""
        with self._lock:
            tree, self._tree = self._tree, -1
        if tree >= 0:
            os.close(tree)


def _clone(directory: Path) -> int:
    path = ctypes.c_char_p(os.fsencode(directory))
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    tree = _checked(_libc.syscall(ctypes.c_long(_SYS_OPEN_TREE), ctypes.c_int(-100), path, flags))
    try:
        _set_attributes(tree, _NOSUID | _NODEV | _NOEXEC | _NOSYMFOLLOW)
    except OSError:
        os.close(tree)
        raise
    return tree


def _set_attributes(tree: int, attributes: int) -> None:
    # struct mount_attr: set, clear, propagation, user namespace
    attr = struct.pack("=QQQQ", attributes, 0, 0, 0)
    _checked(
        _libc.syscall(
            ctypes.c_long(_SYS_MOUNT_SETATTR),
            ctypes.c_int(tree),
            ctypes.c_char_p(b""),
            ctypes.c_uint(_AT_EMPTY_PATH),
            ctypes.c_char_p(attr),
            ctypes.c_size_t(len(attr)),
        )
    )


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
