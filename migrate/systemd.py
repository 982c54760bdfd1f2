"""The host's service manager, where there is one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from migrate.errors import MigrateError

UNITS: Final = Path("/etc/systemd/system")
DEADLINE_S: Final = 90.0


def is_here() -> bool:
    """sd_booted(3)."""
    return Path("/run/systemd/system").is_dir()


def is_shutting_down() -> bool:
    """Whether this host is, for a reboot or for good: all ways there start shutdown.target
    (systemd.special(7)). Blocking. Raises MigrateError."""
    target = "shutdown.target"
    job = systemctl("show", "--property=Job", "--value", target, unit=target)
    # Of a unit that nothing is to become of, older ones say 0 and others nothing.
    return job not in ("", "0")


def systemctl(act: str, *arguments: str, unit: str) -> str:
    """What it says. Blocking, for up to DEADLINE_S. `unit`: whose log says why. Raises
    MigrateError."""
    try:
        done = subprocess.run(
            ["systemctl", act, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MigrateError(f"systemctl {act} failed: {error}") from error
    if done.returncode != 0:
        raise MigrateError(
            f"systemctl {act} failed: {done.stderr.strip()[-300:]}",
            remedy=f"journalctl -u {unit}",
        )
    return done.stdout.strip()
