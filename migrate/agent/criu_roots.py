"""Removes the roots that killed CRIUs have left in /tmp.

A restore builds the container's mount namespace below /tmp/.criu.mntns.XXXXXX and removes that
itself (`criu/mount.c`), unless it is killed. The container's root file system may be mounted in
there, so nothing is ever deleted inside.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from migrate.mounts import unmount
from migrate.processes import running

if TYPE_CHECKING:
    from collections.abc import Callable

_PATTERN = ".criu.mntns.*"


def is_criu_alive() -> bool:
    """Whether any CRIU runs on this host; a held one is in the mounts of its container."""
    for process, _ in running():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "criu":
                return True
    return False


def sweep(
    directory: Path = Path("/tmp"),  # noqa: S108 - CRIU's choice
    is_busy: Callable[[], bool] = is_criu_alive,
) -> int:
    """Remove what no living CRIU can be using; how many there were. Blocking.

    While any CRIU is alive nothing is removed: whose a directory is can't be told from outside, and
    a CRIU that does not find its own gives its restore up.
    """
    # In this order: what a CRIU makes that begins after the listing is not in it.
    found = list(directory.glob(_PATTERN))
    if not found or is_busy():
        return 0
    count = 0
    for path in found:
        with contextlib.suppress(OSError):
            unmount(path)
            path.rmdir()
            count += 1
    return count
