"""The systemd unit that empties this host at each shutdown or reboot, installed by choice.

It does nothing when it starts. When it stops because the host shuts down, it drains; when it alone
is stopped or restarted, it doesn't (`--at-shutdown`). systemd stops units in the reverse of the
order in which they start, so what a drain needs is named in After: the agent, the network, names
of hosts, what is mounted from elsewhere; and what lets operators look on. Containers whose cgroup
is in a scope of systemd's, or of somebody's login, would be ended beside it: a drop-in for all
scopes has them end after it. Containers in cgroups without systemd live until all units have
stopped.
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
# Below the directory of units: scope.d is read for every scope (systemd.unit(5)).
SCOPES: Final = "scope.d/migrate-drain.conf"
# What is under way at the deadline ends by itself, well or badly.
GRACE_S: Final = 120
# A shutdown that takes longer is forced, in the middle of whatever goes on then (JobTimeoutSec of
# systemd's reboot.target and poweroff.target); other units take some of it.
SHUTDOWN_S: Final = 1800
OTHER_UNITS_S: Final = 180
DEADLINE_S_MAX: Final = SHUTDOWN_S - OTHER_UNITS_S - GRACE_S
_TEXT: Final = """\
[Unit]
Description=Moves containers away when this host shuts down
After=migrate-agent.service network.target network-online.target nss-lookup.target remote-fs.target
After=ssh.service sshd.service systemd-user-sessions.service
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
_SCOPES_TEXT: Final = f"""\
[Unit]
Before={UNIT}
"""


def unit_text(program: str, word: Drain) -> str:
    """For the drain that `word` asks for. Raises UsageError for a deadline that a shutdown can't
    keep."""
    if word.deadline_s is None:
        raise UsageError("a shutdown waits for its end", remedy="say how long: --deadline SECONDS")
    if word.deadline_s > DEADLINE_S_MAX:
        raise UsageError(
            f"systemd forces a shutdown that takes more than {SHUTDOWN_S // 60} minutes",
            remedy=f"--deadline {DEADLINE_S_MAX} at most, or run drain-node before the shutdown",
        )
    command = [program, "drain-node", "--at-shutdown", "--to", ",".join(word.to)]
    command += ["--max-parallel", str(word.parallel), "--deadline", f"{word.deadline_s:g}"]
    command += bandwidth_options(word.bandwidth_mib_s)
    command += [part for path in word.shared for part in ("--shared", path)]
    command += ["--move-back"] if word.move_back else []
    if any("%" in part or "$" in part for part in command):
        raise UsageError("a unit can't have % or $ in its command")
    timeout_s = int(word.deadline_s) + GRACE_S
    return _TEXT.format(command=shlex.join(command), timeout_s=timeout_s)


def install(word: Drain, directory: Path = systemd.UNITS) -> str:
    """Write the unit and enable it; what was done. Blocking. Raises MigrateError."""
    program = shutil.which("migrate")
    if program is None or not directory.is_dir():
        raise UsageError("this host has no systemd, or no migrate in PATH")
    path, scopes = directory / UNIT, directory / SCOPES
    path.write_text(unit_text(program, word))
    scopes.parent.mkdir(exist_ok=True)
    scopes.write_text(_SCOPES_TEXT)
    for arguments in (("daemon-reload",), ("enable", "--now", UNIT)):
        systemd.systemctl(*arguments, unit=UNIT)
    return f"{path}: this host is drained at each shutdown (systemctl disable {UNIT} ends that)"
