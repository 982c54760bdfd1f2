"""A control group of this machine for a test's own processes, which can be frozen."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path

from tests.lab.waiting import wait_until


def cgroup2() -> Path:
    """Where this machine has mounted cgroup v2."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if after.startswith("cgroup2 "):
            return Path(before.split()[4])
    raise AssertionError("this machine has no cgroup v2")


@contextlib.contextmanager
def cgroup_of_its_own() -> Iterator[Path]:
    """An empty cgroup; its processes have to be ended before it goes."""
    path = cgroup2() / f"dolly-test-{secrets.token_hex(4)}"
    path.mkdir()
    yield path
    (path / "cgroup.freeze").write_text("0")
    wait_until("the cgroup is empty", lambda: not (path / "cgroup.procs").read_text())
    path.rmdir()
