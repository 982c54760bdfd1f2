"""The sending side of a transfer: rounds of pages, and files, over several streams, to one or
more targets.

::

    send_round(n, tasks)
         | jobs of up to 256 pages, taken one by one by whichever thread is free
         v
    +---------+ +---------+ +---------+ +---------+    each: read, hash, drop what the target has,
    | thread 0| | thread 1| | thread 2| | thread 3|          compress, send, take answers
    +----+----+ +----+----+ +----+----+ +----+----+
         | TLS       | TLS       | TLS       | TLS          connections live across rounds
         v           v           v           v
                       target

A call returns when the target has applied everything, so that a later call never overtakes an
earlier one. Memory: at most `BUFFERS_MAX` frames of 1 MiB a stream, and a window of as many bytes
of compressed ones: less than 64 MiB for four streams. Knows nothing of how pages are found or read.
"""

from __future__ import annotations

import os
import queue
import secrets
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from transport.codec import Encoder
from transport.core.batches import batches, checked_runs
from transport.core.dedup import TABLE_BYTES, PageHashes
from transport.core.frames import FRAME_PAGES_MAX, FRAME_RAW_BYTES_MAX, STREAMS_MAX
from transport.core.tables import encode_file
from transport.core.transcript import Carried, StreamDigest
from transport.errors import AbortedError, SourceFailedError, TransportError
from transport.fan import Fan, Targets
from transport.pace import unlimited
from transport.stream import REOPEN_PATIENCE_S
from transport.worker import FileJob, Job, Ledger, PageJob, Progress, ReadPages, Runs, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from types import TracebackType

    from transport.fan import Outlet

STREAMS = 4
"""Enough to keep four cores busy and to fill a link with a long round trip."""
STREAMS_MIN = 2
"""On fewer cores than streams the threads get into each other's way: 5 % slower on two cores."""
JOIN_DEADLINE_S = 15.0
"""For a thread to end after its stream was cut: a bit more than connecting may take."""


@dataclass(frozen=True, slots=True)
class RoundStats:
    """What one call moved; see `Progress` for the fields. Files count no pages."""

    number: int
    pages: int
    bytes_raw: int
    bytes_sent: int
    zero_pages: int
    unchanged_pages: int
    vanished_pages: int
    duration_ms: float


def default_streams() -> int:
    """As many as there are cores to run them, STREAMS_MIN to STREAMS."""
    return min(max(len(os.sched_getaffinity(0)), STREAMS_MIN), STREAMS)


class PageSender:
    """Sends memory and files of one session. Calls are made one after another, from any thread.

    `outlets`: the targets, which all get the same; one that can't go on is left out (`fan.py`).
    `read` is called from all threads (`ReadPages`).
    `streams` is `default_streams()` unless given. A broken stream is tried to be reopened for
    `patience_s`. All streams together send at most `rate()` bytes a second, TLS's own excluded.
    After a TransportError the sender is finished: every later call raises.
    """

    def __init__(
        self,
        outlets: Sequence[Outlet],
        *,
        read: ReadPages,
        streams: int | None = None,
        table_bytes: int = TABLE_BYTES,
        patience_s: float = REOPEN_PATIENCE_S,
        rate: Callable[[], float] = unlimited,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        streams = default_streams() if streams is None else streams
        if not 1 <= streams <= STREAMS_MAX:
            raise ValueError(f"{streams} streams, 1 to {STREAMS_MAX} are possible")
        self._clock = clock
        self._ledger = Ledger(PageHashes(secrets.randbits(64), table_bytes=table_bytes))
        self._calls = threading.Lock()
        self._changed = threading.Condition()
        self._error: TransportError | None = None
        self._targets = Targets(outlets, rate, clock)
        self._number = 0
        self._workers = []
        self._mail: list[queue.SimpleQueue[_Call | None]] = []
        self._threads = []
        for index in range(streams):
            make_stream = partial(Fan, index, self._targets, patience_s=patience_s)
            worker = Worker(make_stream, read=read, ledger=self._ledger, encoder=Encoder())
            mail: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
            thread = threading.Thread(
                target=self._run, args=(worker, mail), name=f"page-stream-{index}", daemon=True
            )
            self._workers.append(worker)
            self._mail.append(mail)
            self._threads.append(thread)
            thread.start()

    def __enter__(self) -> PageSender:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def progress(self) -> Progress:
        """What was done so far, also while a call is running, from any thread."""
        return sum((worker.progress for worker in self._workers), Progress())

    def carried(self) -> Carried:
        """What the streams have carried so far; waits for a running call."""
        with self._calls, self._ledger.lock:
            streams = [(at, worker.stream) for at, worker in enumerate(self._workers)]
            return Carried(
                tuple(
                    StreamDigest(at, one.frames, one.digest) for at, one in streams if one.frames
                ),
                self._ledger.pieces.files(),
            )

    def connect(self) -> None:
        """Open every stream that is not: before the first round, and again before a freeze."""
        with self._calls:
            self._call(_Call(self._number, iter(()), len(self._workers), connect=True))

    def send_round(self, number: int, tasks: Sequence[tuple[int, Runs]]) -> RoundStats:
        """Send the pages of `tasks`, [(task, page runs)], each task once; returns when all are
        applied.

        `number` may not be smaller than in a former call. Raises TransportError; ValueError for
        runs that are not ascending, disjoint and page-aligned.
        """
        if len({task for task, _ in tasks}) != len(tasks):
            raise ValueError("a task occurs twice in a round")
        checked = [(task, checked_runs(runs)) for task, runs in tasks]
        jobs = (
            PageJob(task, piece)
            for task, runs in checked
            for piece in batches(runs, FRAME_PAGES_MAX)
        )
        with self._calls:
            if number < self._number:
                raise ValueError(f"round {number} after round {self._number}")
            self._number = number
            return self._timed(jobs)

    def send_files(self, files: Sequence[tuple[str, Path]]) -> RoundStats:
        """Send files, [(name on the target, path here)]; returns when all are applied.

        Names are [a-z0-9.-]{1,64}, not hidden, each once; FrameError or ValueError otherwise.
        """
        if len({name for name, _ in files}) != len(files):
            raise ValueError("a file occurs twice")
        sized = []
        for name, path in files:
            encode_file(name, 0)
            try:
                sized.append((name, path, path.stat().st_size))
            except OSError as error:
                raise SourceFailedError(f"{path} cannot be sent: {error}") from error
        jobs = (
            FileJob(name, path, offset, min(FRAME_RAW_BYTES_MAX, size_bytes - offset))
            for name, path, size_bytes in sized
            for offset in range(0, max(size_bytes, 1), FRAME_RAW_BYTES_MAX)
        )
        with self._calls:
            return self._timed(jobs)

    def never_delivered(self, task: int, runs: Runs) -> Runs:
        """The pages of `runs` of which the target has no version at all, as page runs."""
        with self._ledger.lock:
            return self._ledger.hashes.never_delivered(task, checked_runs(runs))

    def forget(self, task: int) -> None:
        """The target does not hold this task's memory any more (or the task is another one now).

        Waits for a running call: what is on its way would be put down to the wrong pages.
        """
        with self._calls, self._ledger.lock:
            self._ledger.hashes.forget(task)

    def leave_out(self, number: int) -> None:
        """Send nothing more to outlet `number`, unless it is the last that is left. From any
        thread."""
        self._targets.lose(number, AbortedError("it was left out"))

    def abort(self) -> None:
        """Make the running call, and every later one, raise AbortedError soon. From any thread."""
        self._fail(AbortedError("the transfer was aborted"))

    def close(self) -> None:
        """End the threads and connections; `read` is not called any more when this returns.

        Idempotent; a running call is aborted. Raises TransportError when a call of `read` hangs.
        """
        self.abort()
        for thread in self._threads:
            thread.join(JOIN_DEADLINE_S)
        if any(thread.is_alive() for thread in self._threads):
            raise TransportError("a thread of the transfer does not end: reading memory hangs")

    def _timed(self, jobs: Iterator[Job]) -> RoundStats:
        before, before_s = self.progress, self._clock()
        self._call(_Call(self._number, jobs, len(self._workers)))
        done = self.progress - before
        return RoundStats(
            number=self._number,
            pages=done.pages,
            bytes_raw=done.bytes_raw,
            bytes_sent=done.bytes_sent,
            zero_pages=done.zero_pages,
            unchanged_pages=done.unchanged_pages,
            vanished_pages=done.vanished_pages,
            duration_ms=(self._clock() - before_s) * 1000,
        )

    def _call(self, call: _Call) -> None:
        self._raise_failure()
        for mail in self._mail:
            mail.put(call)
        with self._changed:
            self._changed.wait_for(lambda: call.working == 0 or self._error is not None)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._error is not None:
            # A new one for each caller: a traceback belongs to one raise.
            raise type(self._error)(*self._error.args) from self._error

    def _fail(self, error: TransportError) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()
        self._targets.stop()
        for mail in self._mail:
            mail.put(None)

    def _run(self, worker: Worker, mail: queue.SimpleQueue[_Call | None]) -> None:
        """A thread: every call's share of jobs, then wait until the target has applied them."""
        try:
            while (call := mail.get()) is not None and self._error is None:
                if call.connect:
                    worker.stream.ensure_open()
                while self._error is None and (job := call.next_job()) is not None:
                    worker.carry(call.number, job)
                worker.stream.drain()
                with self._changed:
                    call.working -= 1
                    self._changed.notify_all()
        except TransportError as error:
            self._fail(error)
        except Exception as error:  # noqa: BLE001  a thread ends here: its caller must hear of it
            failure = TransportError(f"sending failed: {error!r}")
            failure.__cause__ = error
            self._fail(failure)
        finally:
            worker.stream.close()


class _Call:
    """One call's jobs; `working`, under the sender's condition, is how many threads are at it."""

    def __init__(
        self, number: int, jobs: Iterator[Job], threads: int, *, connect: bool = False
    ) -> None:
        self.number = number
        self.connect = connect
        self.working = threads
        self._jobs = jobs
        self._lock = threading.Lock()

    def next_job(self) -> Job | None:
        with self._lock:
            return next(self._jobs, None)
