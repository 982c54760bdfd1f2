"""Removes what a lab leaves: its processes, its cgroups, its state directory, and a switch of the
kernel that a migration turns for moments, which hosts that are killed leave as it is.

Used by a keeper that ends in order, and by the next lab command for labs whose keeper was killed.
A lab is alive exactly as long as somebody holds the lock in its state directory; only its keeper
does. Only processes inside the lab's own cgroup are ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bench.lab import paths
from bench.lab.errors import LabError

LOCK = "lock"
# Killed processes leave their cgroup when they have been reaped; a dump of gigabytes may have to
# be torn down first.
KILL_DEADLINE_S = 20.0
POLL_S = 0.005
# See migrate/grace_periods.py. In the state directory of a lab that has found it off:
GRACE_PERIODS = Path("/sys/kernel/rcu_expedited")
GRACE_PERIODS_OFF = "grace-periods-off"


@contextlib.contextmanager
def sweeping() -> Iterator[None]:
    """Held while labs are made known or removed, so that nobody sweeps a lab half made."""
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    with paths.SWEEP_LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def take_lock(state: Path) -> int | None:
    """The lock of a lab, as a descriptor to keep open; None when another process holds it.

    The file then contains the holder's pid.
    """
    descriptor = os.open(state / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def note_grace_periods(state: Path) -> None:
    """Of a lab that begins."""
    with contextlib.suppress(OSError):
        if GRACE_PERIODS.read_text() == "0\n":
            (state / GRACE_PERIODS_OFF).touch()


def is_alive(state: Path) -> bool:
    try:
        descriptor = os.open(state / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def sweep() -> list[str]:
    """Removes the remains of labs whose keeper is gone; their names. Call inside `sweeping()`."""
    if not paths.STATE_BASE.is_dir():
        return []
    dead = [path.name for path in paths.STATE_BASE.iterdir() if not is_alive(path)]
    for name in dead:
        remove(name)
    with contextlib.suppress(OSError):
        paths.STATE_BASE.rmdir()
    return sorted(dead)


def remove(lab: str) -> None:
    """Ends everything in the lab's cgroup and removes its directories, if they exist.

    The state directory last: as long as it is there, a sweep finds the rest.
    """
    cgroup = paths.cgroup_path(lab)
    if cgroup.is_dir():
        end_cgroup(cgroup)
    state = paths.state_path(lab)
    if (state / GRACE_PERIODS_OFF).exists():
        with contextlib.suppress(OSError):
            GRACE_PERIODS.write_text("0")
    if state.is_dir():
        for entry in state.iterdir():
            if entry.name != LOCK:
                _remove_tree(entry)
        _remove_tree(state)


def end_cgroup(cgroup: Path) -> None:
    """Kills every process in a cgroup and below, and removes the directories (cgroups(7))."""
    with contextlib.suppress(FileNotFoundError):
        (cgroup / "cgroup.kill").write_text("1")
    deadline = time.monotonic() + KILL_DEADLINE_S
    while cgroup.is_dir():
        blocked = _remove_empty(cgroup)
        if blocked is None:
            return
        if time.monotonic() > deadline:
            raise LabError(f"{blocked} still has processes {KILL_DEADLINE_S:g} s after their kill")
        time.sleep(POLL_S)


def _remove_empty(cgroup: Path) -> Path | None:
    """Removes a cgroup from the leaves up; the first one that still has processes, if any."""
    for directory in [Path(found) for found, _, _ in os.walk(cgroup, topdown=False)]:
        try:
            directory.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
            return directory
    return None


def _remove_tree(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
