"""Removes the roots that killed CRIUs have left in /tmp.

A restore builds the container's mount namespace below /tmp/.criu.mntns.XXXXXX and removes that
itself (`criu/mount.c`), unless it is killed. The container's root file system may be mounted in
there, so nothing is ever deleted inside.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

from migrate.mounts import unmount

_PATTERN = ".criu.mntns.*"


def sweep(directory: Path = Path("/tmp")) -> int:  # noqa: S108 - CRIU's choice
    """Remove what no living CRIU can be using; how many there were. Blocking.

    While any CRIU is alive nothing is removed: whose a directory is can't be told from outside.
    """
    # In this order: what a CRIU makes that begins after the listing is not in it.
    found = list(directory.glob(_PATTERN))
    if not found or any(_sees(one.pid) for one in _criu_processes()):
        return 0
    count = 0
    for path in found:
        with contextlib.suppress(OSError):
            unmount(path)
            path.rmdir()
            count += 1
    return count


def _criu_processes() -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["name"]) if one.info["name"] == "criu"]


def _sees(pid: int) -> bool:
    """Whether a process sees the same mounts, and so the same /tmp."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/ns/mnt").stat().st_ino == Path("/proc/self/ns/mnt").stat().st_ino
    return False
