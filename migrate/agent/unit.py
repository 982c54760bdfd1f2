"""The systemd unit of the agent.

What is not in it matters more. Whatever systemd restricts by seccomp (SystemCallFilter,
RestrictNamespaces, LockPersonality, RestrictSUIDSGID and most of Protect...), by no_new_privs or
by the bounding set is inherited by CRIU and by every container that it restores: they would differ
from what they were, and those that need more would fail. A mount namespace of its own
(ProtectSystem, ProtectHome, PrivateTmp, ReadWritePaths) would hide sessions and network namespaces
from the host, and be kept alive by containers. So the agent is confined by being two processes
instead: what talks to the network gives up all of this and more by itself (`lockdown.py`).

KillMode, OOMPolicy     pager, CRIU and runtimes outlive the agent; the next one goes on with them
TimeoutStopSec          sessions that hold nothing are undone first (config.STOP_DEADLINE_S)
LimitCORE               a core of ours has keys and memory of containers in it; restored tasks have
                        the limits that they had
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_TEXT: Final = """\
[Unit]
Description=Receives live migrated containers
After=network-online.target
Wants=network-online.target

[Service]
ExecStart={program} agent
Restart=always
RestartSec=1
KillMode=process
OOMPolicy=continue
TimeoutStopSec=60
LimitNOFILE=1048576
LimitCORE=0

[Install]
WantedBy=multi-user.target
"""


def unit_text(program: Path) -> str:
    """For the agent that `program agent` starts."""
    return _TEXT.format(program=program)
