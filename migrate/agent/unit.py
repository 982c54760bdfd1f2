"""The systemd unit of the agent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

# KillMode=process: pager, CRIU and runtimes outlive the agent, and the next one goes on with them.
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
LimitNOFILE=1048576
LimitCORE=0

[Install]
WantedBy=multi-user.target
"""


def unit_text(program: Path) -> str:
    """For the agent that `program agent` starts."""
    return _TEXT.format(program=program)
