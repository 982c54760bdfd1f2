"""Wheels of what a host's Python lacks, got by this host's pip: from a directory, or an index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from migrate.errors import MigrateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migrate.hosts.bundle import Requirement
    from migrate.hosts.remote import HostFacts

DOWNLOAD_DEADLINE_S: Final = 600.0
# manylinux wheels are for glibc of 2.5 and newer (PEP 600).
_GLIBC_MINOR_MIN: Final = 5


def fetch(
    wanted: Sequence[Requirement], facts: HostFacts, into: Path, source: Path | None
) -> list[Path]:
    """The wheels of `wanted` and of what they need, for that host. `source`: a directory of wheels
    instead of the index that pip is configured for. Blocking. Raises MigrateError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-input", "--only-binary", ":all:", "--dest", str(into)]
    command += ["--implementation", "cp", "--python-version", ".".join(map(str, facts.python[:2]))]
    for platform in platforms(facts.machine, facts.glibc):
        command += ["--platform", platform]
    if source is not None:
        command += ["--no-index", "--find-links", str(source)]
    try:
        done = subprocess.run(
            [*command, *(one.text for one in wanted)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise MigrateError("pip download hangs", remedy="give a directory: --wheels") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise MigrateError(f"pip got no wheels: {lines[-1] if lines else 'it gives no reason'}")
    return sorted(into.glob("*.whl"))


def platforms(machine: str, glibc: str) -> list[str]:
    """The platform tags that run there, e.g. manylinux_2_36_x86_64 and all older ones."""
    major, _, minor = glibc.partition(".")
    newest = int(minor) if major == "2" and minor.isdecimal() else _GLIBC_MINOR_MIN
    tags = [f"manylinux_2_{one}_{machine}" for one in range(newest, _GLIBC_MINOR_MIN - 1, -1)]
    old = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    tags += [f"{name}_{machine}" for minor_min, name in old.items() if newest >= minor_min]
    return [*tags, f"linux_{machine}"]
