"""The dirty tracker `predump`: CRIU's own, by soft-dirty bits, for kernels that have them.

    DIRECTORY/next     what CRIU dumps in a round: all pages at first, then what was written since
    DIRECTORY/last     of the round before, what CRIU needs to know which pages it may leave out
    (the final dump)   its pages of tasks are the final delta; `last` is its parent

CRIU finds out and copies: it stops the tasks for a moment, notes which pages are dirty, clears the
bits, and writes those pages while the tasks run on (criu/cr-dump.c: cr_pre_dump_tasks). So the
content of a round is in its images, not in the tasks, and takes as much memory as it has pages,
until it has been delivered.

What CRIU needs of a parent: `inventory.img` (to notice that a pid was given to another process) and
the pagemaps. Of the pages files it reads nothing before a restore, and takes one that is missing
for an empty one (criu/page-xfer.c: check_pagehole_in_parent).

Shared memory is in every dump of CRIU (cr_dump_shmem), but not in these rounds: the final dump has
no parent for it, and writes all of it.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

from criu_glue.core.image_names import task_of_pagemap
from criu_glue.errors import TrackerError
from criu_glue.image_pages import ImagePages
from criu_glue.images import image_files, leave_to_store
from criu_glue.page_sources import FinalDelta

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from criu_glue.core.pagemap import PageRuns

_INVENTORY: Final = "inventory.img"
_SHARED_MEMORY: Final = "pagemap-shmem-"


class PredumpSource:
    """Rounds of CRIU's pre-dump; a page source (`page_sources.py`).

    `pre_dump(directory, parent)` has CRIU dump what was written since the images `parent` (a path
    relative to `directory`, None for everything) were made, and returns when that is complete.
    `directory` is made here, on a tmpfs. One thread, but for `read`.
    """

    name: Final = "predump"

    def __init__(self, directory: Path, pre_dump: Callable[[Path, str | None], None]) -> None:
        self._next = directory / "next"
        self._last = directory / "last"
        self._pre_dump = pre_dump
        self._pages: ImagePages | None = None
        self._dumping: Path | None = None
        directory.mkdir(mode=0o700)

    @property
    def parent(self) -> Path | None:
        """What CRIU's dump is to build upon."""
        return self._last

    def collect(self) -> list[tuple[int, PageRuns]]:
        """Have CRIU dump what was written. Raises what `pre_dump` does, ImagesError."""
        self._next.mkdir(mode=0o700)
        parent = os.path.relpath(self._last, self._next) if self._last.exists() else None
        self._pre_dump(self._next, parent)
        return self._open(self._next)

    def final(self) -> FinalDelta:
        """Nothing is known before CRIU dumps: what it writes is the delta."""
        for image in self._last.glob(f"{_SHARED_MEMORY}*"):
            # Its content was not sent: the final dump must have all of it.
            image.unlink()
        return FinalDelta([], [])

    def dumped(self, image_dir: Path) -> list[tuple[int, PageRuns]]:
        """The pages that CRIU's dump has written of the tasks."""
        return self._open(image_dir)

    def watched(self, task: int, runs: PageRuns) -> tuple[PageRuns, PageRuns]:
        """All are: CRIU leaves out what it has found to be as it was."""
        return runs, runs[:0]

    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        """From the images that were collected last."""
        if self._pages is None:
            raise TrackerError("there is no round whose pages could be read")
        return self._pages.read(task, runs, out)

    def delivered(self) -> None:
        """Drop what was collected last: the target has it."""
        dumped = self._dumping
        self.close()
        if dumped == self._next:
            _reduce(self._next)
            shutil.rmtree(self._last, ignore_errors=True)
            self._next.rename(self._last)
        elif dumped is not None:
            leave_to_store(dumped)

    def close(self) -> None:
        """Nothing of the tasks is held between rounds. Idempotent."""
        if self._pages is not None:
            self._pages.close()
        self._pages = self._dumping = None

    def _open(self, directory: Path) -> list[tuple[int, PageRuns]]:
        self._dumping = directory
        self._pages = ImagePages(directory)
        return self._pages.runs()


def _reduce(directory: Path) -> None:
    """Leave of a round what the next one needs; see the module."""
    for image in image_files(directory):
        if not _is_needed(image.name):
            image.path.unlink()
    # Its own parent is about to go, and says nothing that is not in its pagemaps.
    (directory / "parent").unlink(missing_ok=True)


def _is_needed(name: str) -> bool:
    is_pagemap = task_of_pagemap(name) is not None or name.startswith(_SHARED_MEMORY)
    return is_pagemap or name == _INVENTORY
