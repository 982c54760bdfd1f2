"""The pager: a process on the target that fills a restored container's memory.

    python3 -m criu_glue.pager --work WORK --images IMAGES --store STORE --progress-fd N
                               [--keeper-fd N] [--resume]

Started before `criu restore --lazy-pages`; waits for "listening" on the progress descriptor (see
pager_progress.py). WORK is CRIU's work directory (its image directory if it has none other).
Ends by itself when everything is filled, with exit code 0. Until then the tasks' memory depends on
it: it lives in a session of its own, outlives the agent, has no network, is the last that the
kernel kills for memory, and ignores SIGTERM while it holds anything. SIGUSR1 begins the background
fill before CRIU's end of restore: to be sent when CRIU is held at post-restore, never earlier.
With a keeper (pager_keeper.py) another pager can take its place when it dies: `--resume`.

Exit codes: 0 filled; 1 failed, which is reported and, while tasks live, not left: see Pager.hold.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Final

from criu_glue.errors import CriuGlueError
from criu_glue.lazy_pages_socket import listen
from criu_glue.pager_journal import Keeper
from criu_glue.pager_loop import Pager
from criu_glue.pager_progress import Progress

# An agent that died before it started CRIU leaves a pager that nobody needs.
ACCEPT_DEADLINE_S: Final = 900.0
_WAIT_S: Final = 0.5
# How long the last line may wait for an agent that is busy.
_LAST_FLUSH_S: Final = 2.0
_CLONE_NEWNET: Final = 0x40000000


def command(
    *,
    work: Path,
    images: Path,
    store: Path,
    progress_fd: int,
    keeper_fd: int | None = None,
    resume: bool = False,
) -> list[str]:
    """The argument list that starts a pager; give it the descriptors by `pass_fds`, and a
    PYTHONPATH in which this package is found."""
    arguments = [
        *(sys.executable, "-P", "-m", "criu_glue.pager"),
        f"--work={work}",
        f"--images={images}",
        f"--store={store}",
        f"--progress-fd={progress_fd}",
    ]
    if keeper_fd is not None:
        arguments.append(f"--keeper-fd={keeper_fd}")
    if resume:
        arguments.append("--resume")
    return arguments


def _leave_everything_else() -> None:
    """Own session, no network, last to be killed, as many descriptors as there may be. Each is a
    precaution: where the system refuses one, the pager works without."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    ctypes.CDLL(None).unshare(_CLONE_NEWNET)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.chdir("/")


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
    parser = argparse.ArgumentParser(prog="python3 -m criu_glue.pager", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--progress-fd", type=int)
    parser.add_argument("--keeper-fd", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args(arguments)
    images, store = options.images.absolute(), options.store.absolute()
    progress = Progress(options.progress_fd)
    keeper = Keeper(None if options.keeper_fd is None else socket.socket(fileno=options.keeper_fd))
    signals = _signals()
    pager = Pager(images, store, progress, keeper)
    pager.wake_on(signals)
    code = 0
    try:
        if options.resume:
            _leave_everything_else()
            pager.resume()
        else:
            # In the caller's working directory: WORK may be relative.
            pager.listen(listen(options.work))
            _leave_everything_else()
        # No cycles are made in the loop, and a collection would make a page fault wait.
        gc.freeze()
        gc.disable()
        progress.report("listening")
        _run(pager, signals)
        pager.finish()
    except Exception as error:  # noqa: BLE001 - whatever it is, the memory must not become zeros
        if not isinstance(error, (CriuGlueError, OSError)):
            traceback.print_exc()
        progress.report("error", reason=str(error) or type(error).__name__)
        pager.hold()
        code = 1
    last_s = time.monotonic() + _LAST_FLUSH_S
    while not progress.flush() and time.monotonic() < last_s:
        time.sleep(0.01)
    return code


if __name__ == "__main__":
    sys.exit(main())
