"""The pager as others see it: is it there, how far is it, end it. Needs nothing but its directory.

    WORK/pager.state   what it says of itself (pager_state.py)
    WORK/pager.alive   a FIFO that all processes of a pager have open for writing, and nobody else

Whoever reads the FIFO is woken by a byte for every change of the state, and comes to its end when
no process of the pager is left: that is noticed without asking, by whoever wants to know, whether
or not it started the pager. No bytes are lost that matter: they only say "look again".
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from criu_glue.errors import CriuGlueError
from criu_glue.pager_state import PagerState, PagerStateError

if TYPE_CHECKING:
    from collections.abc import Iterator

ALIVE_NAME: Final = "pager.alive"
_STEP_S: Final = 0.005
_READ_BYTES: Final = 64 << 10
# proc_pid_stat(5): the field is the 22nd, and what is in parentheses may contain spaces.
_START_TIME_AFTER_NAME: Final = 19


class PagerStaysError(CriuGlueError):
    """A pager could not be ended."""


def make_alive(work: Path) -> Path:
    """The FIFO, made if it is not there. Raises OSError."""
    path = work / ALIVE_NAME
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    return path


def open_alive(work: Path) -> int:
    """The FIFO's reading end, non-blocking; for `heard`. Raises OSError."""
    return os.open(make_alive(work), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def heard(alive: int) -> bool:
    """Take what has been told; False when no process of the pager is there (yet, or any more).

    All of it: who opens the FIFO when the last writer is gone and another reader keeps what was
    written is never woken by its end (Linux: fs/pipe.c, fifo_open), and must find it here.
    """
    try:
        while os.read(alive, _READ_BYTES):
            pass
    except BlockingIOError:
        return True
    return False


def start_ticks(pid: int) -> int | None:
    """When a process began, in ticks since the boot; None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat[stat.rindex(")") + 2 :].split()[_START_TIME_AFTER_NAME])


def fill(work: Path) -> None:
    """Have a pager bring everything that is missing, needed or not. A pager that has just ended
    hears nothing."""
    try:
        state = PagerState.read(work)
    except PagerStateError:
        return
    for pid, ticks in _processes(state):
        with contextlib.suppress(ProcessLookupError):
            if start_ticks(pid) == ticks:
                # Whichever of the two gets it.
                os.kill(pid, signal.SIGUSR1)
                return


def kill(work: Path, deadline_s: float) -> None:
    """End whatever processes a pager consists of now; returns when there are none. Blocking.

    Memory that is missing becomes zeros, so only when the tasks are dead or never came. Raises
    PagerStaysError after the deadline.
    """
    limit_s = time.monotonic() + deadline_s
    try:
        alive = open_alive(work)
    except FileNotFoundError:
        return
    try:
        while heard(alive):
            for group in _groups(work):
                # All at once: one by one, they would replace each other.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
            if time.monotonic() > limit_s:
                raise PagerStaysError(f"the pager in {work} does not end")
            time.sleep(_STEP_S)
    finally:
        os.close(alive)


def _groups(work: Path) -> Iterator[int]:
    """The pager's process group, if one of its processes is there to vouch for it. A process that
    is a replacement and has not said so yet is found a moment later."""
    try:
        state = PagerState.read(work)
    except PagerStateError:
        return
    for pid, ticks in _processes(state):
        with contextlib.suppress(ProcessLookupError):
            if pid and start_ticks(pid) == ticks and os.getpgid(pid) == state.group:
                yield state.group
                return


def _processes(state: PagerState) -> tuple[tuple[int, int], ...]:
    """Their pids, and the start times that they had when they said so."""
    return ((state.keeper, state.keeper_ticks), (state.worker, state.worker_ticks))
