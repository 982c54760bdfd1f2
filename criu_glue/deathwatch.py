"""Is there when a CRIU dies, before the kernel lets go of the tasks that it traces.

A tracer's end releases its tracees: what CRIU holds by ptrace runs on, with whatever registers and
code CRIU has just given it. But a process that is traced itself stops first, once more, when it is
about to exit, for whatever reason (PTRACE_O_TRACEEXIT), SIGKILL included:

    SIGKILL ─> CRIU stops (PTRACE_EVENT_EXIT) ─> `at_exit` freezes ─> CRIU ends ─> its tasks go
                └ its tracees are stopped still   their cgroup           from ptrace to the freezer

A thread that leaves a ptrace stop looks for the freezer before it returns to its program
(`kernel/signal.c: get_signal`, `kernel/ptrace.c: __ptrace_unlink` clears the trap of ptrace only).

The price: every signal of CRIU stops it until it is passed on here, also those that it would
ignore, like the SIGCHLD of each of its tracees' stops.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from criu_glue import ptrace_requests as request
from criu_glue.errors import TaskBusyError, TaskGoneError
from criu_glue.urgency import TRACER

if TYPE_CHECKING:
    from collections.abc import Callable


def watch(pid: int, at_exit: Callable[[], None]) -> threading.Thread:
    """Trace a process until its end, and call `at_exit` just before that; the thread which does so.

    Returns when it is traced. Raises TaskBusyError (somebody traces it), TaskGoneError.
    """
    begun: Future[None] = Future()
    thread = threading.Thread(
        target=_trace, args=(pid, at_exit, begun), name=f"deathwatch-{pid}", daemon=True
    )
    thread.start()
    begun.result()
    return thread


def _trace(pid: int, at_exit: Callable[[], None], begun: Future[None]) -> None:
    try:
        request.ptrace(request.SEIZE, pid, 0, request.O_TRACEEXIT)
    except TaskGoneError as error:
        begun.set_exception(error)
        return
    except OSError as error:
        begun.set_exception(TaskBusyError(f"process {pid} can't be traced: {error}"))
        return
    # CRIU and the tasks wait for this thread: it has to be next whenever it can run.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(TRACER))
    begun.set_result(None)
    while (status := request.wait_stop(pid)) is not None:
        # One that was killed in its stop comes to the last one by itself: when it is on its way
        # there nothing can be told to it, and when it is there nothing else may be.
        with contextlib.suppress(TaskGoneError):
            status = request.stop_status(pid) or status
            event, number = status >> 8, status & 0xFF
            if event == request.EVENT_EXIT:
                at_exit()
                request.ptrace(request.DETACH, pid)
                return
            if event == request.EVENT_STOP and number in request.STOPPING:
                _leave_stopped(pid)
            else:
                is_signal = event != request.EVENT_STOP
                request.ptrace(request.CONT, pid, 0, number if is_signal else 0)
    at_exit()


def _leave_stopped(pid: int) -> None:
    try:
        request.ptrace(request.LISTEN, pid)
    except OSError as error:
        # Killed, it is in its last stop by now, which nobody can listen from (Linux:
        # kernel/ptrace.c: ptrace_request) and which is told next.
        if error.errno != errno.EIO:
            raise
