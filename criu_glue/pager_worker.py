"""The pager's worker: the process that fills the memory. Started by pager.py, and only by it.

    --images DIR --store DIR       as for the pager
    --listener-fd N                listens where CRIU connects
    --keeper-fd N                  the keeper: what an earlier worker held, and what this one holds
    --progress-fd N                to the agent

Exit codes: 0 all is filled; FAILED_EXIT failed, with nobody left who waits for memory. Whatever
else it ends with, the keeper starts another one, which goes on from the keeper's descriptors and
the journal.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Final

from criu_glue.errors import CriuGlueError
from criu_glue.pager_journal import FAILED_EXIT, Keeper
from criu_glue.pager_loop import Pager
from criu_glue.pager_progress import Progress

# An agent that died before it started CRIU leaves a pager that nobody needs. The next agent ends
# it; this is for a host that never has one again. Pre-copy of a large container takes hours.
ACCEPT_DEADLINE_S: Final = 24 * 3600.0
_WAIT_S: Final = 0.5
# How long the last line may wait for an agent that is busy.
_LAST_FLUSH_S: Final = 2.0


def _signals() -> int:
    """Have signals arrive as bytes on the returned descriptor instead of interrupting."""
    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(theirs)
    return ours


def _arrived(signals: int) -> bytes:
    try:
        return os.read(signals, 64)
    except BlockingIOError:
        return b""


def _run(pager: Pager, signals: int) -> None:
    """Until everything is filled, or the pager is not needed."""
    give_up_s = time.monotonic() + ACCEPT_DEADLINE_S
    while not pager.is_finished():
        pager.turn(_WAIT_S)
        for number in _arrived(signals):
            if number == signal.SIGUSR1:
                pager.start_filling()
            elif number == signal.SIGTERM and not pager.has_tasks:
                raise CriuGlueError("told to end before any task came")
        if not pager.has_tasks and not pager.is_finished() and time.monotonic() > give_up_s:
            raise CriuGlueError(f"no task came within {ACCEPT_DEADLINE_S:.0f} s")


def main(arguments: list[str] | None = None) -> int:
    """The process. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m criu_glue.pager_worker")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    for name in ("progress", "listener", "keeper"):
        parser.add_argument(f"--{name}-fd", type=int, required=True)
    options = parser.parse_args(arguments)
    signals = _signals()
    progress = Progress(options.progress_fd)
    keeper = Keeper(socket.socket(fileno=options.keeper_fd))
    pager = Pager(options.images, options.store, progress, keeper)
    pager.wake_on(signals)
    code = 0
    try:
        pager.begin(socket.socket(fileno=options.listener_fd))
        # No cycles are made in the loop, and a collection would make a page fault wait.
        gc.freeze()
        gc.disable()
        _run(pager, signals)
        pager.finish()
    except (CriuGlueError, OSError) as error:
        # Anything else is a mistake in here, and another worker may get around it.
        progress.report("error", reason=str(error))
        pager.hold()
        code = FAILED_EXIT
    last_s = time.monotonic() + _LAST_FLUSH_S
    while not progress.flush() and time.monotonic() < last_s:
        time.sleep(0.01)
    return code


if __name__ == "__main__":
    sys.exit(main())
