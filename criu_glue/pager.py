"""The pager: fills a restored container's memory on the target, and survives what it can.

    python3 -m criu_glue.pager --work WORK --images IMAGES --store STORE [--on-demand]

    keeper (pager_keeper.py)   <-- each makes the other again -->   worker (pager_worker.py)
             \\______________ share all descriptors and the journal _______________/

Started before `criu restore --lazy-pages`, best before the freeze, since Python needs 0.3 s; it
says how far it is in WORK/pager.state (pager_state.py), CRIU may come in phase LISTENING. WORK is
CRIU's work directory, or its image directory if it has no other. It ends by itself when all is
filled, which with --on-demand may be never: then pages come when they are needed, until it is told
to fill. Until then the tasks' memory depends on it: it lives in a session of its own, outlives the
agent, has no network, and is the last that the kernel kills for memory. Either process may be
killed at any moment; the memory is lost when both are dead at the same time. pager_watch.py is for
those who want to know how it does, and for those who want to end it. Signals to either process:

    SIGUSR1   begin the background fill: before CRIU's end of restore, or though it was started
              with --on-demand; to be sent when CRIU is held at post-restore, never earlier
    SIGTERM   ends a pager that holds no task yet; ignored by any other

A pager that failed stays, with the tasks waiting, until they are gone. The process that was started
is the first keeper. If it is still that at the end, its exit code is 0 when all is filled, 1 when
the pager failed; whoever wants to know looks at the state.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Final

from criu_glue import store_users, urgency
from criu_glue.lazy_pages_socket import listen
from criu_glue.no_core import forbid_cores
from criu_glue.oom import choose_another
from criu_glue.pager_journal import Journal
from criu_glue.pager_keeper import keep
from criu_glue.pager_pair import Pair, descriptors
from criu_glue.pager_state import PagerState
from criu_glue.pager_watch import make_alive
from criu_glue.pager_worker import work

_CLONE_NEWNET: Final = 0x40000000


def command(*, work: Path, images: Path, store: Path, on_demand: bool = False) -> list[str]:
    """The argument list that starts a pager, with a PYTHONPATH in which this package is found."""
    return [
        # numpy's algebra library would make a thread for each processor; a process that forks as
        # this one does may have one.
        *("/usr/bin/env", "OPENBLAS_NUM_THREADS=1", "OMP_NUM_THREADS=1"),
        *(sys.executable, "-P", "-m", "criu_glue.pager"),
        f"--work={work}",
        f"--images={images}",
        f"--store={store}",
        *(["--on-demand"] if on_demand else []),
    ]


def _leave_everything_else() -> None:
    """Own session, no network, last to be killed, as many descriptors as there may be. Each is a
    precaution: where the system refuses one, the pager works without."""
    with contextlib.suppress(PermissionError):
        os.setsid()
    ctypes.CDLL(None).unshare(_CLONE_NEWNET)
    choose_another()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.chdir("/")


def _signals() -> int:
    """Have signals of this process and of those forked from it arrive as bytes on the returned
    descriptor instead of interrupting."""
    ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    # SIGCHLD: nobody waits for a process of the pager.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    return ours


def main(arguments: list[str] | None = None) -> int:
    """The process. Returns 1 when it could not begin, and otherwise not at all."""
    forbid_cores()
    # Where there is one processor, its tasks need it too.
    if len(os.sched_getaffinity(0)) > 1:
        urgency.make_urgent(os.getpid(), urgency.FILL, inherited=True)
    parser = argparse.ArgumentParser(prog="python3 -m criu_glue.pager")
    for name in ("work", "images", "store"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--on-demand", action="store_true")
    options = parser.parse_args(arguments)
    images, store = options.images.absolute(), options.store.absolute()
    try:
        state = PagerState.create(options.work)
        alive = os.open(make_alive(options.work), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        listener = listen(options.work)
        journal = Journal(state)
        users = store_users.use(store)
    except OSError as error:
        sys.stderr.write(f"the pager can't begin in {options.work}: {error}\n")
        return 1
    _leave_everything_else()
    state.group = os.getpgrp()
    signals = _signals()
    common = frozenset(descriptors())
    pair = Pair(
        images,
        store,
        state,
        journal,
        listener,
        alive,
        signals,
        common,
        users=users,
        on_demand=options.on_demand,
    )
    # No cycles are made from here on, and a collection would make a page fault wait.
    gc.freeze()
    gc.disable()
    while True:
        # Each returns in another process, which is to be the other one.
        keep(pair)
        work(pair)


if __name__ == "__main__":
    sys.exit(main())
