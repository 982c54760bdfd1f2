"""A tmpfs for one session: memory that only this migration can fill, and that is gone with it."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MS_NOSUID, _MS_NODEV = 2, 4
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def mount_tmpfs(directory: Path, size_bytes: int) -> None:
    """Mount a tmpfs of at most `size_bytes`, 0700. Raises OSError.

    It allows execution, which /run may not: the gate and the hook are programs in it.
    """
    options = f"mode=0700,size={size_bytes}".encode()
    flags = _MS_NOSUID | _MS_NODEV
    if _libc.mount(b"tmpfs", os.fsencode(directory), b"tmpfs", flags, options) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mounting a tmpfs on {directory}: {os.strerror(code)}")


def is_full(directory: Path) -> bool:
    """Whether not one page more can be written there. A program that fails for this can't even say
    so, when its log lies there too."""
    return os.statvfs(directory).f_bavail == 0


def unmount(directory: Path) -> None:
    """Unmount, lazily, whatever is mounted on `directory`; nothing is fine. Raises OSError."""
    while _libc.umount2(os.fsencode(directory), _MNT_DETACH) == 0:
        continue
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOENT):
        raise OSError(code, f"unmounting {directory}: {os.strerror(code)}")
