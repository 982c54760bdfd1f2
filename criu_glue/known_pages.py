"""A parent for the final dump that has CRIU leave the tasks' pages alone.

    DIRECTORY/inventory.img       for CRIU to see that it has a parent
    DIRECTORY/pagemap-<task>.img  says of every address that its page is there

Without a parent a lazy dump takes hold of every page, to serve it later from its page server: it
has each task splice them into pipes, which is most of what grows with memory while the container
stands still. What is in the parent it only names (criu/mem.c: generate_iovs), and of a parent it
reads no page before a restore (criu/page-xfer.c: check_pagehole_in_parent). The target's page store
has these pages, or is sent them.

CRIU asks the soft-dirty bits which pages are as in the parent. Where the kernel has them, those
that are set are dumped lazily as without a parent. Where it has none every page is as in the
parent; see `kerndat.py`.
"""

from __future__ import annotations

import contextlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from criu_glue.core.pagemap import encode_pagemap, whole_space_pagemap
from criu_glue.errors import TaskGoneError
from criu_glue.kerndat import tracking_prefix
from criu_glue.mappings import Task, cgroup_pids

if TYPE_CHECKING:
    from pathlib import Path

_INVENTORY_MAGIC: Final = 0x58313116
# inventory_entry (images/inventory.proto): img_version 1, and a dump_uptime of 2^63-1 µs. A task
# that is younger than its parent has no pages there (criu/mem.c: detect_pid_reuse); none is.
_INVENTORY: Final = b"\x08\x01" + b"\x40" + b"\xff" * 8 + b"\x7f"


@dataclass(frozen=True, slots=True)
class KnownPages:
    """The images in `directory`, and what the CRIU that is to build upon them is started by."""

    directory: Path
    prefix: tuple[str, ...]

    @classmethod
    def prepare(cls, directory: Path) -> Self:
        """Make the directory, before the dump is prepared. Blocking. Raises KernelCacheError when
        CRIU would not take it, OSError."""
        directory.mkdir(mode=0o700)
        prefix = tracking_prefix(directory / "criu.kdat")
        head = struct.pack("<II", _INVENTORY_MAGIC, len(_INVENTORY))
        (directory / "inventory.img").write_bytes(head + _INVENTORY)
        return cls(directory, prefix)

    def name_tasks(self, cgroup: Path) -> None:
        """Those of the frozen container, before the dump begins."""
        for pid in cgroup_pids(cgroup):
            with contextlib.suppress(TaskGoneError), contextlib.closing(Task(pid)) as task:
                number = task.vpid()
                whole = encode_pagemap(whole_space_pagemap(number))
                (self.directory / f"pagemap-{number}.img").write_bytes(whole)
