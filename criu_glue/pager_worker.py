"""The pager's worker: the process that fills the memory.

It is made by the keeper, and makes another keeper when that one dies (pager_pair.py). One that dies
itself, or fails in a way that is a mistake in here, is replaced; one that failed for a reason that
the next one would meet too stays, and holds what there is until nobody waits for it any more.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from typing import TYPE_CHECKING, Final

from criu_glue.errors import CriuGlueError
from criu_glue.pager_keeper import DEATHS_MAX
from criu_glue.pager_loop import Pager
from criu_glue.pager_pair import Companion, NewRole, enter_role, fork
from criu_glue.pager_state import Phase

if TYPE_CHECKING:
    from criu_glue.pager_pair import Pair

# An agent that died before it started CRIU leaves a pager that nobody needs. The next agent ends
# it; this is for a host that never has one again. Pre-copy of a large container takes hours.
ACCEPT_DEADLINE_S: Final = 24 * 3600.0
_WAIT_S: Final = 0.5
# How often a pager that can't go on looks whether the tasks whose memory it holds have ended.
_HOLD_S: Final = 0.2
# Whatever is not 0 or 1; nobody reads it.
_MISTAKE_EXIT: Final = 70

# Objects of the processes that this one was forked from, whose end would close descriptors.
_never_forgotten: list[object] = []


def work(pair: Pair) -> None:
    """Be the worker until all is filled, which ends the process.

    Returns in another process: one that was made to be the keeper.
    """
    pair.state.workers += 1
    enter_role(pair.state, "worker")
    worker = _Worker(pair)
    try:
        worker.run()
    except NewRole:
        _never_forgotten.extend(worker.pager.leave())
    except BaseException:  # noqa: BLE001 - nothing may unwind further: it would close descriptors
        traceback.print_exc(file=sys.stderr)
        os._exit(_MISTAKE_EXIT)


class _Worker:
    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._keeper = Companion.parent(pair.state.keeper)
        self.pager = Pager(pair)
        self.pager.wake_on(pair.signals)
        if self._keeper.pidfd >= 0:
            self.pager.wake_on(self._keeper.pidfd)

    def run(self) -> None:
        state = self._pair.state
        try:
            self._see_to_keeper()
            if state.deaths >= DEATHS_MAX:
                raise CriuGlueError(f"{state.deaths} workers died and filled nothing")
            if state.phase is not Phase.DONE:
                self.pager.begin()
                self._fill()
                self.pager.finish()
        except (CriuGlueError, OSError) as error:
            # Anything else is a mistake in here, and another worker may get around it.
            state.error = state.error or str(error)
            self._hold()
            state.ended = 2
            os._exit(1)
        state.ended = 1
        os._exit(0)

    def _fill(self) -> None:
        """Until everything is filled, or the pager is not needed."""
        pager = self.pager
        give_up_s = time.monotonic() + ACCEPT_DEADLINE_S
        while not pager.is_finished():
            pager.turn(_WAIT_S)
            self._see_to_keeper()
            for number in self._arrived():
                if number == signal.SIGUSR1:
                    pager.start_filling()
                elif number == signal.SIGTERM and not pager.has_tasks:
                    raise CriuGlueError("told to end before any task came")
            if not pager.has_tasks and not pager.is_finished() and time.monotonic() > give_up_s:
                raise CriuGlueError(f"no task came within {ACCEPT_DEADLINE_S:.0f} s")

    def _hold(self) -> None:
        self.pager.hold()
        self._pair.state.set_phase(Phase.FAILED, self._pair.alive)
        while self.pager.has_tasks:
            self._see_to_keeper()
            self._keeper.is_gone(_HOLD_S)
            self.pager.hold()

    def _arrived(self) -> bytes:
        """Signals that either process has got."""
        try:
            return os.read(self._pair.signals, 64)
        except BlockingIOError:
            return b""

    def _see_to_keeper(self) -> None:
        """Make another keeper if it has died."""
        if not self._keeper.is_gone():
            return
        try:
            keeper = fork()
        except OSError:
            # No more processes now; the next turn tries again.
            return
        if keeper is None:
            raise NewRole
        if self._keeper.pidfd >= 0:
            self.pager.wake_no_more_on(self._keeper.pidfd)
            self._keeper.close()
        self._keeper = keeper
        self.pager.wake_on(keeper.pidfd)
