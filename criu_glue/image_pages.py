"""Pages that CRIU has written into an image directory, read by task and address.

    pagemap-<task>.img   [address, pages, PRESENT] [address, pages, PARENT] [… PRESENT]
    pages-<n>.img        |<---- of the first ---->|<---- of the third ---->|

The pages file has the pages of the entries that are present, in their order, and nothing of the
others (criu/page-xfer.c: write_pages_loc). Knows nothing of what the pages are for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from criu_glue.core.pagemap import PAGE_BYTES, PE_PRESENT, PageRuns, pages_in
from criu_glue.images import ImagesError, task_pagemaps
from criu_glue.page_store import TASKS_MAX, pages_file_name

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

_BITS: Final = np.uint64(PAGE_BYTES.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class _TaskPages:
    """runs: what is present, joined; first: the number in the file of each run's first page."""

    fd: int
    runs: PageRuns
    first: npt.NDArray[np.uint64]


class ImagePages:
    """The pages that are in the pages files of `directory` themselves. Close it.

    `read` may be called by several threads at once. Raises ImagesError, ImageFormatError.
    """

    def __init__(self, directory: Path) -> None:
        self._tasks: dict[int, _TaskPages] = {}
        try:
            for task, pagemap in task_pagemaps(directory).items():
                if len(self._tasks) >= TASKS_MAX:
                    raise ImagesError(f"{directory} has the pages of more than {TASKS_MAX} tasks")
                runs = pagemap.runs(having=PE_PRESENT)
                if len(runs):
                    path = directory / pages_file_name(pagemap.pages_id)
                    self._tasks[task] = _open_pages(path, runs)
        except BaseException:
            self.close()
            raise

    def runs(self) -> list[tuple[int, PageRuns]]:
        """What is there: [(task, page runs)]."""
        return [(task, pages.runs) for task, pages in self._tasks.items()]

    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        """Read pages, at least one, into `out` as `TaskMemory.read` does; all of them must be
        there."""
        pages = self._tasks[task]
        offsets = _offsets(pages, runs)
        # Runs that follow each other in the file are read at once: as a rule all of a frame.
        sizes = runs[:, 1] << _BITS
        follows = np.append(False, offsets[1:] == (offsets + sizes)[:-1])
        begins = np.flatnonzero(~follows)
        position = 0
        for begin, end in zip(begins, np.append(begins[1:], len(runs)), strict=True):
            size = int(sizes[begin:end].sum())
            _read_whole(pages.fd, out[position : position + size], int(offsets[begin]))
            position += size
        return np.ones(pages_in(runs), dtype=np.bool_)

    def close(self) -> None:
        """Not while another thread reads. Idempotent."""
        for pages in self._tasks.values():
            os.close(pages.fd)
        self._tasks.clear()


def _open_pages(path: Path, runs: PageRuns) -> _TaskPages:
    first = np.cumsum(runs[:, 1]) - runs[:, 1]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ImagesError(f"image {path}: {error}") from error
    size, wanted = os.fstat(fd).st_size, pages_in(runs) * PAGE_BYTES
    if size != wanted:
        os.close(fd)
        raise ImagesError(f"image {path} has {size} bytes, its pagemap says {wanted}")
    return _TaskPages(fd, runs, first)


def _offsets(pages: _TaskPages, runs: PageRuns) -> npt.NDArray[np.uint64]:
    """Where each run begins in the pages file."""
    within = np.searchsorted(pages.runs[:, 0], runs[:, 0], side="right") - 1
    ahead = (runs[:, 0] - pages.runs[within, 0]) >> _BITS
    if (within < 0).any() or (ahead + runs[:, 1] > pages.runs[within, 1]).any():
        raise ImagesError("pages were asked for that the images do not have")
    offsets: npt.NDArray[np.uint64] = (pages.first[within] + ahead) << _BITS
    return offsets


def _read_whole(fd: int, out: memoryview, offset: int) -> None:
    while len(out):
        count = os.preadv(fd, [out], offset)
        if not count:
            raise ImagesError("a pages file is shorter than it was")
        out, offset = out[count:], offset + count
