"""Checks of a host's operator around each move of a drain: programs in /etc/migrate/drain.d.

    PROGRAM before|after CONTAINER SOURCE TARGET

They run on the host that is emptied, in the order of their names, each with `HOOK_DEADLINE_S`. Any
other end than 0 before a move keeps the container where it is; after it, it is said that the
container has failed its check. Only programs that nobody but root can have written are run.
"""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from pathlib import Path

HOOK_DEADLINE_S: Final = 30.0
_SAID_CHARS_MAX: Final = 300


def ask(directory: Path, when: Literal["before", "after"], *about: str) -> str:
    """Why a program says no, empty if all say yes. Blocking."""
    programs = sorted(directory.iterdir()) if directory.is_dir() else []
    for program in programs:
        try:
            why = refused(program) or _ask(program, when, *about)
        except OSError as error:
            why = f"can't be run: {error.strerror}"
        if why:
            return f"{when} the move, {program.name} {why}"
    return ""


def refused(program: Path) -> str:
    """Why this program of an operator's is not run, empty if it may be. Raises OSError."""
    status = program.stat()
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "was not run: others than root can write it"
    return "" if os.access(program, os.X_OK) else "was not run: it is no program"


def _ask(program: Path, *arguments: str) -> str:
    """Raises OSError."""
    process = subprocess.Popen(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            said, _ = process.communicate(timeout=HOOK_DEADLINE_S)
        except subprocess.TimeoutExpired:
            # With what it has started: nobody waits for that any more.
            os.killpg(process.pid, signal.SIGKILL)
            return f"took longer than {HOOK_DEADLINE_S:.0f} s"
    last = said.strip()[-_SAID_CHARS_MAX:]
    return f"ended with {process.returncode}: {last}" if process.returncode else ""
