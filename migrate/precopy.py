"""The container's memory on its way: where its pages come from and the sender, joined.

Blocking; the coordinator runs each call in its own executor thread. Knows neither CRIU's dump nor
the handover: it is told when the tasks are frozen.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Protocol

import numpy as np

from criu_glue.captured import CapturedPages
from criu_glue.kernel import PAGE_BYTES
from migrate.errors import TransferFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy.typing as npt

    from criu_glue.core.pagemap import PageRuns
    from criu_glue.page_sources import FinalDelta, PageSource
    from transport.sender import RoundStats
    from transport.worker import Progress, ReadPages


class Sender(Protocol):
    """What takes rounds of memory, and files, to where they are to be: a `PageSender` to hosts, a
    `MemoryWriter` (`memory_writer.py`) to a directory."""

    @property
    def progress(self) -> Progress:
        """What was done so far, from any thread."""

    def connect(self) -> None:
        """Be ready to take more at once."""

    def send_round(self, number: int, tasks: Sequence[tuple[int, PageRuns]]) -> RoundStats:
        """Returns when all of these pages are there."""

    def send_files(self, files: Sequence[tuple[str, Path]]) -> RoundStats:
        """Returns when these files, [(name there, path here)], are there."""

    def never_delivered(self, task: int, runs: PageRuns) -> PageRuns:
        """The pages of `runs` of which there is no version at all."""

    def abort(self) -> None:
        """Make the running call, and every later one, raise AbortedError soon."""

    def close(self) -> None:
        """Nothing is read any more when this returns. Idempotent."""


class MemorySource:
    """Rounds of one container's memory.

    `make_sender` is given the function that reads pages of a task and returns the sender; the
    sender's threads call that function concurrently. While the tracker is at work in running tasks
    they are `undisturbed` by whatever slows them.
    """

    def __init__(
        self,
        pages: PageSource,
        make_sender: Callable[[ReadPages], Sender],
        undisturbed: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.pages = pages
        self._undisturbed = undisturbed
        self._captured: CapturedPages | None = None
        self.sender = make_sender(self._read)
        self.round_bytes_total = 0
        self.rounds = 0
        # A collection that nobody waits for any more must be over before the tasks are given back.
        self._tracking = threading.Lock()
        self._is_closed = False

    def round(self) -> RoundStats:
        """Send what was written since the last round (the first time: everything)."""
        with self._tracking:
            self._check_open()
            with self._undisturbed():
                written = self.pages.collect()
        return self._deliver(written)

    def final_delta(self) -> FinalDelta:
        """Collect the final delta of a frozen container and give its tasks back to CRIU."""
        with self._tracking:
            self._check_open()
            return self.pages.final()

    def send_dumped(self, image_dir: Path) -> RoundStats | None:
        """Send what CRIU's dump, which is held, has written of the tasks' memory in place of the
        final delta; None if that is nothing."""
        with self._tracking:
            self._check_open()
            written = self.pages.dumped(image_dir)
        return self._deliver(written) if written else None

    def send(self, runs: Sequence[tuple[int, PageRuns]]) -> RoundStats:
        """Send these pages of tasks that are known already."""
        self.rounds += 1
        self.round_bytes_total = PAGE_BYTES * sum(int(r[:, 1].sum()) for _, r in runs)
        return self.sender.send_round(self.rounds, runs)

    def capture(self, runs: Sequence[tuple[int, PageRuns]], limit_bytes: int) -> CapturedPages:
        """Copy these pages of frozen tasks, to be sent when they run again. Raises
        LimitExceededError for more than `limit_bytes`."""
        return CapturedPages.of(self.pages, runs, limit_bytes)

    def send_captured(self, captured: CapturedPages) -> RoundStats:
        """Send what was captured, which a later call of `send` must not be asked for."""
        self._captured = captured
        try:
            return self.send(captured.runs)
        finally:
            self._captured = None

    def undelivered(self, needed: Mapping[int, PageRuns]) -> list[tuple[int, PageRuns]]:
        """Of the pages that the final images name, those of which the target may not have the last
        content: it never got them, or nobody has watched them since.

        Of what is watched every page should have been seen by the tracker; this is the check.
        """
        missing = []
        for task, runs in needed.items():
            watched, others = self.pages.watched(task, runs)
            never = self.sender.never_delivered(task, watched)
            left = np.concatenate((never, others))
            if len(left):
                missing.append((task, left[np.argsort(left[:, 0])]))
        return missing

    def close(self) -> None:
        """Give the tasks back untouched and end the streams. Idempotent."""
        self.sender.close()
        with self._tracking:
            self._is_closed = True
            self.pages.close()

    def _read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        return (self._captured or self.pages).read(task, runs, out)

    def _deliver(self, runs: Sequence[tuple[int, PageRuns]]) -> RoundStats:
        sent = self.send(runs)
        with self._tracking:
            self._check_open()
            self.pages.delivered()
        return sent

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransferFailed("the transfer was aborted")
