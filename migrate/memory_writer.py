"""Rounds of memory on their way into a directory: what a `PageSender` is for a host.

    memory/TASK.pages    the content of pages, one after the other, in the order in which they came
    memory/TASK.runs     written at the end: which pages these are (`checkpoint.py`)

A page that comes again takes the place that it had, so a file is as large as the pages that were
ever there. Where each of them lies is kept in memory, 16 bytes a page. One call at a time.
"""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
from typing import TYPE_CHECKING, Final

import numpy as np

from criu_glue.captured import page_addresses, page_runs
from criu_glue.kernel import PAGE_BYTES
from migrate.errors import TransferFailed, remedy_of
from transport.errors import AbortedError
from transport.pace import Pace
from transport.sender import RoundStats
from transport.worker import Progress

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from criu_glue.core.pagemap import PageRuns
    from migrate.checkpoint import Place
    from transport.worker import ReadPages

_PART_PAGES: Final = (1 << 24) // PAGE_BYTES


class MemoryWriter:
    """See the module, and `precopy.Sender`. At most `bytes_s` a second are written. Raises
    TransferFailed for what can't be."""

    def __init__(self, place: Place, read: ReadPages, bytes_s: float) -> None:
        self._place = place
        self._read = read
        self._ended = threading.Event()
        self._pace = Pace(lambda: bytes_s, self._ended)
        # A call that nobody waits for any more must be over before the tasks are given back.
        self._calls = threading.Lock()
        self._tasks: dict[int, _TaskFile] = {}
        self._buffer = np.empty((_PART_PAGES, PAGE_BYTES), dtype=np.uint8)
        self.progress = Progress()

    def connect(self) -> None:
        """Nothing has to be opened."""

    def send_round(self, number: int, tasks: Sequence[tuple[int, PageRuns]]) -> RoundStats:
        """Write these pages, each task once."""
        return self._timed(number, self._pages(tasks))

    def send_files(self, files: Sequence[tuple[str, Path]]) -> RoundStats:
        """Copy CRIU's images."""
        return self._timed(0, self._images(files))

    def never_delivered(self, task: int, runs: PageRuns) -> PageRuns:
        """The pages of `runs` that are not in the directory."""
        file = self._tasks.get(task)
        return runs if file is None else page_runs(np.setdiff1d(page_addresses(runs), file.known))

    def finish(self, tasks: Collection[int]) -> None:
        """All that these tasks had is on the disk then, and nothing of others. Raises OSError."""
        with self._calls:
            for task, file in self._tasks.items():
                file.finish(self._place.memory / f"{task}.runs", is_kept=task in tasks)

    def abort(self) -> None:
        """See `precopy.Sender`."""
        self._ended.set()

    def close(self) -> None:
        """See `precopy.Sender`."""
        self.abort()
        with self._calls:
            while self._tasks:
                self._tasks.popitem()[1].close()

    def _timed(self, number: int, work: Iterator[Progress]) -> RoundStats:
        with self._calls:
            before, before_s = self.progress, time.monotonic()
            try:
                for done in work:
                    self.progress += done
                    self._pace.wait_for(done.bytes_sent)
            except OSError as error:
                raise TransferFailed(
                    f"{self._place.directory} can't be written: {error}", remedy=remedy_of(error)
                ) from error
            done = self.progress - before
            return RoundStats(
                number=number,
                pages=done.pages,
                bytes_raw=done.bytes_raw,
                bytes_sent=done.bytes_sent,
                zero_pages=0,
                unchanged_pages=0,
                vanished_pages=done.vanished_pages,
                duration_ms=(time.monotonic() - before_s) * 1000,
            )

    def _pages(self, tasks: Sequence[tuple[int, PageRuns]]) -> Iterator[Progress]:
        for task, runs in tasks:
            self._check_going()
            if task not in self._tasks:
                self._tasks[task] = _TaskFile(self._place.memory / f"{task}.pages")
            file, addresses = self._tasks[task], page_addresses(runs)
            for begin in range(0, len(addresses), _PART_PAGES):
                self._check_going()
                part = addresses[begin : begin + _PART_PAGES]
                out = self._buffer[: len(part)]
                present = self._read(task, page_runs(part), out.reshape(-1).data)
                file.write(part[present], out[present])
                count = int(present.sum())
                size_bytes = count * PAGE_BYTES
                yield Progress(
                    pages=count,
                    vanished_pages=len(part) - count,
                    bytes_raw=size_bytes,
                    bytes_sent=size_bytes,
                )
            file.end_round()

    def _images(self, files: Sequence[tuple[str, Path]]) -> Iterator[Progress]:
        for name, path in files:
            self._check_going()
            shutil.copyfile(path, self._place.images / name)
            size_bytes = path.stat().st_size
            yield Progress(bytes_raw=size_bytes, bytes_sent=size_bytes)

    def _check_going(self) -> None:
        if self._ended.is_set():
            raise AbortedError("the transfer was aborted")


class _TaskFile:
    """A task's pages. known: the addresses of those that are there, ascending, without those of the
    round that has not ended, in which none comes twice."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.known: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
        self._places: npt.NDArray[np.int64] = np.empty(0, np.int64)
        self._new: list[npt.NDArray[np.uint64]] = []
        self._count = 0

    def write(self, addresses: npt.NDArray[np.uint64], content: npt.NDArray[np.uint8]) -> None:
        """Write pages where they belong."""
        if not len(addresses):
            return
        places = self._places_of(addresses)
        edges = [0, *(np.flatnonzero(np.diff(places) != 1) + 1).tolist(), len(places)]
        for begin, end in itertools.pairwise(edges):
            left = content[begin:end].reshape(-1).data
            at = int(places[begin]) * PAGE_BYTES
            while left:
                written = os.pwrite(self._file, left, at)
                left, at = left[written:], at + written

    def end_round(self) -> None:
        """What was new in it is known."""
        if not self._new:
            return
        new = np.concatenate(self._new)
        self._new.clear()
        known = np.concatenate([self.known, new])
        places = np.concatenate([self._places, np.arange(self._count - len(new), self._count)])
        order = np.argsort(known)
        self.known, self._places = known[order], places[order]

    def finish(self, runs: Path, *, is_kept: bool) -> None:
        """Say which pages these are, all being on the disk; or remove them."""
        if not is_kept:
            self._path.unlink()
            return
        os.fsync(self._file)
        page_runs(self.known[np.argsort(self._places)]).astype("<u8").tofile(runs)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _places_of(self, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """The numbers that pages have in the file; those that it has not yet come to its end."""
        at = np.searchsorted(self.known, addresses)
        is_known = at < len(self.known)
        is_known[is_known] = self.known[at[is_known]] == addresses[is_known]
        places = np.empty(len(addresses), np.int64)
        places[is_known] = self._places[at[is_known]]
        new = addresses[~is_known]
        places[~is_known] = np.arange(self._count, self._count + len(new))
        self._count += len(new)
        self._new.append(new)
        return places
