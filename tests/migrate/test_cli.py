"""The command line: what it knows, and what it does not import for that."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import click
import pytest
from click.testing import CliRunner

from migrate.cli import cli
from migrate.commands import clone

COMMANDS = {
    *("agent", "ca", "cancel", "clone", "container", "hosts", "identity", "log", "once"),
    *("operator", "policy", "recover", "service", "status", "verify"),
    *("cordon", "drain-node", "fill", "uncordon", "undrain"),
}
HEAVY = {"aiohttp", "asyncio", "cryptography", "numpy", "paramiko", "pyroute2", "rich"}


def test_every_command_is_there_by_its_name() -> None:
    context = click.Context(cli)
    found = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    assert {name: command and command.name for name, command in found.items()} == {
        name: name for name in COMMANDS
    }


def test_the_help_lists_what_a_person_may_want() -> None:
    told = CliRunner().invoke(cli, ["--help"], catch_exceptions=False).output
    words = {line.split()[0] for line in told.split("Commands:")[1].splitlines() if line.strip()}
    assert COMMANDS - words == {"once", "service"}


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("migrate.cli", {"asyncio"}),
        ("migrate.guard", {"asyncio", "rich"}),
        ("migrate.holder", {"asyncio"}),
        ("migrate.confinement", {"asyncio"}),
    ],
)
def test_what_starts_often_imports_little(module: str, allowed: set[str]) -> None:
    """structlog imports rich."""
    program = f"import {module}, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert HEAVY & set(done.stdout.split()) <= allowed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--save", "/nowhere/kept"], "freeze"),
        (["--save", "/nowhere/kept", "--on-stall", "throttle"], "throttle"),
        (["--to", "B"], "freeze"),
    ],
)
def test_a_slow_host_or_disk_slows_no_original_unless_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    made: list[Any] = []

    def carry_out(make: Any, *_: object) -> SimpleNamespace:
        made.append(make.args[0].on_stall)
        return SimpleNamespace(copies=())

    monkeypatch.setattr(clone, "carry_out", carry_out)
    command = ["clone", "ewe", "--runtime", "runc", *words]
    CliRunner().invoke(cli, command, catch_exceptions=False)
    assert made == [expected]
