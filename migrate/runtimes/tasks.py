"""The end of a container's tasks by their cgroup, which no runtime has to know of."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

from migrate.runtimes.base import RuntimeDriverError

# SIGKILL takes a task out of its cgroup in milliseconds, unless it hangs in the kernel.
KILL_DEADLINE_S = 10.0
KILL_POLL_S = 0.005
# A systemd container has some hundreds.
CGROUPS_MAX = 4096


def kill_all(cgroup: Path) -> None:
    """Kill every task in a cgroup and wait until it has none; one that is gone is fine."""
    limit_s = time.monotonic() + KILL_DEADLINE_S
    try:
        (cgroup / "cgroup.kill").write_text("1")
        while "populated 0" not in (cgroup / "cgroup.events").read_text():
            if time.monotonic() > limit_s:
                raise RuntimeDriverError(
                    f"the tasks in {cgroup} were killed and are not gone in {KILL_DEADLINE_S:g} s",
                    remedy="look for tasks in uninterruptible sleep (ps, state D)",
                )
            time.sleep(KILL_POLL_S)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RuntimeDriverError(f"the tasks in {cgroup} can't be killed: {error}") from error


def remove_cgroup(cgroup: Path) -> None:
    """Remove an empty cgroup and those below it, at most CGROUPS_MAX; one that is gone is fine."""
    below = itertools.islice(os.walk(cgroup, topdown=False), CGROUPS_MAX)
    try:
        for directory, _, _ in below:
            Path(directory).rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RuntimeDriverError(f"{cgroup} can't be removed: {error}") from error
