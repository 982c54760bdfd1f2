"""The cgroup v2 freezer of one container, by its directory.

We freeze before CRIU does: CRIU's own freezer polls in steps of 100 ms (`criu/seize.c:
freeze_processes`), and finds nothing to wait for when the cgroup is frozen already.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

MOUNT = Path("/sys/fs/cgroup")


def freeze(cgroup: Path, deadline_s: float) -> int:
    """Freeze every task below `cgroup`; returns when the kernel said so (monotonic, µs).

    Blocking, about a millisecond. Raises TimeoutError after `deadline_s`, with the cgroup thawed
    again: a task in an uninterruptible wait can't be frozen.
    """
    limit_s = time.monotonic() + deadline_s
    (cgroup / "cgroup.freeze").write_text("1")
    fd = os.open(cgroup / "cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    try:
        poller = select.poll()
        # A change of cgroup.events is announced as POLLPRI (kernel: Documentation/admin-guide/
        # cgroup-v2.rst, "populated").
        poller.register(fd, select.POLLPRI | select.POLLERR)
        while b"frozen 1" not in os.pread(fd, 4096, 0):
            left_s = limit_s - time.monotonic()
            if left_s <= 0:
                thaw(cgroup)
                raise TimeoutError(f"{cgroup} was not frozen within {deadline_s:g} s")
            poller.poll(min(left_s, 0.1) * 1000)
    finally:
        os.close(fd)
    return time.monotonic_ns() // 1000


def is_frozen(cgroup: Path) -> bool:
    """Whether it was told to freeze; one that is gone was not."""
    try:
        return (cgroup / "cgroup.freeze").read_text().strip() == "1"
    except OSError:
        return False


def own_name() -> str:
    """This process's cgroup below the mount, "/…"; "/" without cgroup v2."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    # The line of cgroup v2 begins with the hierarchy 0 and names no controller (cgroups(7)).
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")


def own() -> Path:
    """The directory of this process's cgroup."""
    return MOUNT / own_name().lstrip("/")


def thaw(cgroup: Path) -> None:
    """Let the tasks below `cgroup` run; a cgroup that is gone is fine."""
    try:
        (cgroup / "cgroup.freeze").write_text("0")
    except FileNotFoundError:
        return


@contextlib.contextmanager
def thawed(cgroup: Path) -> Iterator[None]:
    """Let the tasks below a frozen cgroup run for a while. Behind it they freeze again, none of
    them having left the kernel if something else stopped it meanwhile."""
    thaw(cgroup)
    try:
        yield
    finally:
        refreeze(cgroup)


def refreeze(cgroup: Path) -> None:
    """Have the tasks below `cgroup` freeze before they execute anything more, as far as they do not
    just now. Waits for nothing; a cgroup that is gone is fine."""
    with contextlib.suppress(FileNotFoundError):
        (cgroup / "cgroup.freeze").write_text("1")
