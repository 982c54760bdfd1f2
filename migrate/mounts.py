"""A tmpfs for one session: memory that only this migration can fill, and that is gone with it.

It is not swapped out where the kernel can leave that (`noswap`, Linux 6.4:
Documentation/filesystems/tmpfs.rst): what lies there is the memory of a container, and a swap
device keeps what was written to it.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_MS_RDONLY, _MS_NOSUID, _MS_NODEV = 1, 2, 4
_MS_BIND = 4096
_MS_PRIVATE = 1 << 18
_MNT_DETACH = 2
# The same on all architectures but alpha (include/uapi/asm-generic/unistd.h).
_SYS_FSOPEN, _SYS_FSCONFIG = 430, 431
_FSOPEN_CLOEXEC, _FSCONFIG_SET_FLAG = 1, 0

_libc = ctypes.CDLL(None, use_errno=True)


def mount_tmpfs(directory: Path, size_bytes: int) -> None:
    """Mount a tmpfs of at most `size_bytes`, 0700. Raises OSError.

    It allows execution, which /run may not: the gate and the hook are programs in it.
    """
    options = f"mode=0700,size={size_bytes}{',noswap' if keeps_from_swap() else ''}".encode()
    _mount("tmpfs", directory, b"tmpfs", _MS_NOSUID | _MS_NODEV, options)


def mount_empty(directory: Path) -> None:
    """Mount a tmpfs that nobody can write to, with the options it has by default. Mounts of it
    elsewhere stay when this one goes: it is nobody's peer. Raises OSError."""
    _mount("tmpfs", directory, b"tmpfs", _MS_RDONLY)
    _mount("none", directory, None, _MS_PRIVATE)


def mount_again(directory: Path, on: Path) -> None:
    """Have what is in `directory` in the directory `on` too; its file system stays until it is
    unmounted from both. Raises OSError."""
    _mount(directory, on, None, _MS_BIND)


def _mount(
    what: Path | str, on: Path, kind: bytes | None, flags: int, options: bytes | None = None
) -> None:
    """mount(2). Raises OSError."""
    if _libc.mount(os.fsencode(what), os.fsencode(on), kind, flags, options) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mounting {what} on {on}: {os.strerror(code)}")


@cache
def keeps_from_swap() -> bool:
    """Whether a tmpfs of this kernel can be kept from being swapped out; asked of the kernel, which
    mounts nothing for it. Not in a user namespace (mm/shmem.c)."""
    context = _libc.syscall(_SYS_FSOPEN, b"tmpfs", _FSOPEN_CLOEXEC)
    if context < 0:
        return False
    try:
        flag = _libc.syscall(_SYS_FSCONFIG, context, _FSCONFIG_SET_FLAG, b"noswap", None, 0)
        return bool(flag == 0)
    finally:
        os.close(context)


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
