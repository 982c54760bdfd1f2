"""The systemd unit that empties this host at each shutdown or reboot, installed by choice.

It does nothing when it starts. When it stops it drains, and it stops before the agent and the
network do, since it comes after them. Containers in scopes of systemd's are ended beside it;
those of a runtime without systemd's cgroups are left to it.
"""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING, Final

from migrate import systemd
from migrate.drain_moves import bandwidth_options
from migrate.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.core.messages import Drain

UNIT: Final = "migrate-drain.service"
# What is under way at the deadline ends by itself, well or badly.
GRACE_S: Final = 120
_TEXT: Final = """\
[Unit]
Description=Moves containers away before a shutdown
After=migrate-agent.service network-online.target
Wants=network-online.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
ExecStop={command}
TimeoutStopSec={timeout_s}

[Install]
WantedBy=multi-user.target
"""


def unit_text(program: str, word: Drain) -> str:
    """For the drain that `word` asks for. Raises UsageError without a deadline."""
    if word.deadline_s is None:
        raise UsageError("a shutdown waits for its end", remedy="say how long: --deadline SECONDS")
    command = [program, "drain-node", "--to", ",".join(word.to)]
    command += ["--max-parallel", str(word.parallel), "--deadline", f"{word.deadline_s:g}"]
    command += bandwidth_options(word.bandwidth_mib_s)
    command += [part for path in word.shared for part in ("--shared", path)]
    if any("%" in part or "$" in part for part in command):
        raise UsageError("a unit can't have % or $ in its command")
    timeout_s = int(word.deadline_s) + GRACE_S
    return _TEXT.format(command=shlex.join(command), timeout_s=timeout_s)


def install(word: Drain, directory: Path = systemd.UNITS) -> str:
    """Write the unit and enable it; what was done. Blocking. Raises MigrateError."""
    program = shutil.which("migrate")
    if program is None or not directory.is_dir():
        raise UsageError("this host has no systemd, or no migrate in PATH")
    path = directory / UNIT
    path.write_text(unit_text(program, word))
    for arguments in (("daemon-reload",), ("enable", "--now", UNIT)):
        systemd.systemctl(*arguments, unit=UNIT)
    return f"{path}: this host is drained at each shutdown (systemctl disable {UNIT} ends that)"
