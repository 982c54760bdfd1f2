"""The pager: fills a restored container's memory on the target, and survives what it can.

    python3 -m criu_glue.pager --work WORK --images IMAGES --store STORE --progress-fd N

    this process (keeper)  --starts, again when it dies-->  worker (pager_worker.py)
    holds every userfaultfd                                 fills the memory

Started before `criu restore --lazy-pages`, best before the freeze, since Python needs 0.2 s; ready
with "listening" on the progress descriptor (pager_progress.py). WORK is CRIU's work directory, or
its image directory if it has no other. Ends by itself, with exit code 0, when all is filled. Until
then the tasks' memory depends on it: it lives in a session of its own, outlives the agent, has no
network, and is the last that the kernel kills for memory. Signals go to the worker:

    SIGUSR1   begin the background fill before CRIU's end of restore; to be sent when CRIU is held
              at post-restore, never earlier
    SIGTERM   ends a pager that holds no task yet; ignored by any other

Exit code 1: failed, reported as "error"; a pager that failed stays, with the tasks waiting, until
they are gone. It may be killed (SIGKILL to its session) when nobody wants their memory any more.

Imports no numpy, directly or not: it only has to be there.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from criu_glue.errors import CriuGlueError
from criu_glue.lazy_pages_socket import listen
from criu_glue.pager_journal import JOURNAL_NAME
from criu_glue.pager_keeper import PagerKeeper
from criu_glue.pager_progress import Progress

_CLONE_NEWNET: Final = 0x40000000


def command(*, work: Path, images: Path, store: Path, progress_fd: int) -> list[str]:
    """The argument list that starts a pager; give it `pass_fds=[progress_fd]`, and a PYTHONPATH in
    which this package is found."""
    return [
        *(sys.executable, "-P", "-m", "criu_glue.pager"),
        f"--work={work}",
        f"--images={images}",
        f"--store={store}",
        f"--progress-fd={progress_fd}",
    ]


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


def main(arguments: list[str] | None = None) -> int:
    """The process. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="python3 -m criu_glue.pager")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--progress-fd", type=int, required=True)
    options = parser.parse_args(arguments)
    images, store = options.images.absolute(), options.store.absolute()
    progress = Progress(options.progress_fd)
    try:
        (store / JOURNAL_NAME).unlink(missing_ok=True)
        listener = listen(options.work)
    except OSError as error:
        progress.report("error", reason=f"can't listen in {options.work}: {error}")
        return 1
    _leave_everything_else()

    def start(connection: int) -> subprocess.Popen[bytes]:
        inherited = {
            "progress": options.progress_fd,
            "listener": listener.fileno(),
            "keeper": connection,
        }
        numbers = [f"--{name}-fd={number}" for name, number in inherited.items()]
        worker = [sys.executable, "-P", "-m", "criu_glue.pager_worker", *numbers]
        return subprocess.Popen(
            [*worker, f"--images={images}", f"--store={store}"], pass_fds=list(inherited.values())
        )

    keeper = PagerKeeper(start, lambda count: progress.report("restarted", count=count))
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: keeper.send_signal(number))
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        return keeper.run()
    except CriuGlueError as error:
        progress.report("error", reason=str(error))
        while True:
            signal.pause()


if __name__ == "__main__":
    sys.exit(main())
