"""The agent's unit restricts nothing that the containers which it restores would inherit."""

from __future__ import annotations

import configparser
from pathlib import Path

from migrate import config
from migrate.agent.unit import unit_text

INHERITED = (
    "AmbientCapabilities",
    "CapabilityBoundingSet",
    "LockPersonality",
    "MemoryDenyWriteExecute",
    "NoNewPrivileges",
    "Private",
    "Protect",
    "ReadOnlyPaths",
    "ReadWritePaths",
    "Restrict",
    "SecureBits",
    "SystemCall",
    "User",
)


def read() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(unit_text(Path("/opt/migrate/current/bin/migrate")))
    return unit["Service"]


def test_nothing_is_inherited_by_containers() -> None:
    assert [name for name in read() if name.startswith(INHERITED)] == []


def test_what_outlives_the_agent_is_left_alone() -> None:
    service = read()
    assert service["ExecStart"] == "/opt/migrate/current/bin/migrate agent"
    assert (service["KillMode"], service["OOMPolicy"]) == ("process", "continue")
    assert int(service["TimeoutStopSec"]) > config.STOP_DEADLINE_S
