"""Network namespaces by path: make, enter and remove them.

A namespace is entered by a thread of its own that ends with the work: nothing forks, and no other
thread of the process ever sees it. What the work opens there (sockets) stays there.

The layout of /run/netns is iproute2's (`ip-netns(8)`): each name is a file that the namespace is
bind-mounted on, and the directory is a shared mount, so that a removal reaches every mount
namespace.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from migrate.network_identity import NetworkError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

NETNS_DIRECTORY = Path("/run/netns")
OWN_NETNS = Path("/proc/self/ns/net")

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}")
_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SHARED = 0x100000
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def path_of(name: str) -> Path:
    """The path of the namespace called `name`; raises NetworkError for what can't be a name."""
    if _NAME.fullmatch(name) is None:
        raise NetworkError(f"{name[:80]!r} can't be a network namespace's name")
    return NETNS_DIRECTORY / name


def run_in(netns: Path, work: Callable[[], T]) -> T:
    """Run `work` in a thread inside `netns`; its result or its exception. Blocking."""

    def inside() -> T:
        fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call(_libc.setns(fd, _CLONE_NEWNET), f"setns {netns}")
        finally:
            os.close(fd)
        return work()

    return _in_thread(inside)


def create(name: str, existing: Path | None = None) -> Path:
    """A new, empty network namespace, or a name for an existing one. Raises NetworkError, also when
    the name is taken."""
    path = path_of(name)
    try:
        _share_directory()
        path.touch(mode=0o444, exist_ok=False)
    except FileExistsError as error:
        raise NetworkError(f"the network namespace {path} exists already") from error
    except OSError as error:
        raise NetworkError(f"{path} can't be made: {error}") from error

    def inside() -> None:
        if existing is not None:
            _mount(str(existing), path, _MS_BIND)
            return
        _call(_libc.unshare(_CLONE_NEWNET), "unshare")
        # /proc/self is the process; only this thread is in the new namespace.
        _mount(f"/proc/self/task/{threading.get_native_id()}/ns/net", path, _MS_BIND)

    try:
        _in_thread(inside)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise NetworkError(f"{path} can't be made: {error}") from error
    return path


def remove(netns: Path) -> None:
    """Unmount and unlink a namespace below /run/netns. It ends with its last task. Idempotent."""
    if netns.parent != NETNS_DIRECTORY:
        raise NetworkError(f"{netns} is not below {NETNS_DIRECTORY}, so it is not removed")
    path = path_of(netns.name)
    if _libc.umount2(os.fsencode(path), _MNT_DETACH) != 0:
        code = ctypes.get_errno()
        # EINVAL: a file that nothing is mounted on, of a creation that was interrupted.
        if code not in (errno.EINVAL, errno.ENOENT):
            raise NetworkError(f"{path} can't be unmounted: {os.strerror(code)}")
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise NetworkError(f"{path} can't be removed: {error}") from error


def inode(netns: Path) -> tuple[int, int]:
    """(device, inode): two paths with the same are the same namespace. Raises OSError."""
    status = netns.stat()
    return status.st_dev, status.st_ino


def _share_directory() -> None:
    NETNS_DIRECTORY.mkdir(parents=True, exist_ok=True)
    try:
        _mount("", NETNS_DIRECTORY, _MS_SHARED | _MS_REC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # Not a mount point yet: make it one (iproute2 `netns_add` does the same).
        _mount(str(NETNS_DIRECTORY), NETNS_DIRECTORY, _MS_BIND | _MS_REC)
        _mount("", NETNS_DIRECTORY, _MS_SHARED | _MS_REC)


def _mount(source: str, target: Path, flags: int) -> None:
    result = _libc.mount(source.encode(), os.fsencode(target), b"none", flags, None)
    _call(result, f"mount {target}")


def _call(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _in_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - carried to the caller's thread
            errors.append(error)

    thread = threading.Thread(target=target, name="netns")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]
