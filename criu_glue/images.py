"""CRIU's image directory: what of it travels, and how the target joins it to the page store.

    WORK/img/pagemap-<task>.img   which pages the task has; rewritten here: lazy -> parent, lazy
    WORK/img/pages-<n>.img        what CRIU dumped itself (stacks, file mappings, shared memory)
    WORK/img/parent -> ../mem
    WORK/mem/pagemap-<task>.img   written here: everything is in the page store, offset == address
    WORK/mem/pages-<task>.img     the page store

The same images serve an eager restore (CRIU reads the store as a parent image) and a lazy one
(the pager fills what is marked lazy). Knows files, not networks or processes. Shared memory
(pagemap-shmem-*) is never lazy and stays as CRIU wrote it.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from criu_glue.core import renaming, timers
from criu_glue.core.image_names import is_image_name, task_of_pagemap
from criu_glue.core.pagemap import (
    PAGE_BYTES,
    PAGEMAP_BYTES_MAX,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Pagemap,
    PageRuns,
    decode_pagemap,
    encode_pagemap,
    whole_space_pagemap,
)
from criu_glue.core.timers import FILES_BYTES_MAX
from criu_glue.core.vmas import MM_BYTES_MAX, Mappings, decode_mappings
from criu_glue.errors import CriuGlueError, LimitExceededError
from criu_glue.page_store import open_directory, pages_file_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from criu_glue.core.renaming import IP
    from criu_glue.page_store import PageStore

PARENT_LINK: Final = "parent"
# Some six files a task, one a TCP connection, one a deleted file that is still open.
FILES_MAX: Final = 1 << 16


class ImagesError(CriuGlueError):
    """CRIU's image directory is not as it should be."""


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One file of a checkpoint that travels."""

    name: str
    path: Path
    bytes: int


def image_files(directory: Path) -> list[ImageFile]:
    """The files of a checkpoint that must travel, by name. Everything else in the directory
    (logs, sockets, the parent link) stays behind."""
    found: list[ImageFile] = []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if is_image_name(entry.name) and entry.is_file(follow_symlinks=False):
                    size = entry.stat(follow_symlinks=False).st_size
                    found.append(ImageFile(entry.name, Path(entry.path), size))
                    if len(found) > FILES_MAX:
                        raise LimitExceededError(f"{directory} has more than {FILES_MAX} images")
    except OSError as error:
        raise ImagesError(f"image directory {directory}: {error}") from error
    return sorted(found, key=lambda file: file.name)


def task_pagemaps(directory: Path) -> dict[int, Pagemap]:
    """The pagemap of every task in an image directory."""
    return {
        task: decode_pagemap(_read(file.path, PAGEMAP_BYTES_MAX), str(file.path))
        for file in image_files(directory)
        if (task := task_of_pagemap(file.name)) is not None
    }


def lazy_ranges(directory: Path) -> dict[int, PageRuns]:
    """The pages of each task that CRIU left out of its images and that are filled late.

    On the source (after `dump --lazy-pages`): what must have been delivered. On the target (after
    attach_page_store): what the pager has to fill. Runs as in criu_glue.core.pagemap.
    """
    return {
        task: pagemap.runs(having=PE_LAZY, lacking=PE_PRESENT)
        for task, pagemap in task_pagemaps(directory).items()
    }


def store_ranges(directory: Path) -> dict[int, PageRuns]:
    """The pages of each task whose content must be in the page store, lazy or not: also those
    that an incremental dump says are unchanged."""
    return {
        task: pagemap.runs(lacking=PE_PRESENT) for task, pagemap in task_pagemaps(directory).items()
    }


def pager_ranges(directory: Path, task: int) -> PageRuns:
    """What the pager has to fill of one task, cut at the edges of its mappings, because
    userfaultfd copies inside one mapping only."""
    pagemap = decode_pagemap(
        _read(directory / f"pagemap-{task}.img", PAGEMAP_BYTES_MAX), f"pagemap-{task}.img"
    )
    runs = pagemap.runs(having=PE_LAZY, lacking=PE_PRESENT)
    return _task_mappings(directory, task).split(runs)


def leave_to_store(directory: Path) -> None:
    """Take the pages of tasks that CRIU has written out of its images, on the source, when all of
    them have been delivered: from then on they are what a lazy dump leaves."""
    for task, pagemap in task_pagemaps(directory).items():
        entries = pagemap.entries.copy()
        entries[:, 2] = PE_PARENT
        left = Pagemap(pagemap.pages_id, entries)
        _replace(directory / f"pagemap-{task}.img", encode_pagemap(left))
        (directory / pages_file_name(pagemap.pages_id)).unlink(missing_ok=True)


def attach_page_store(directory: Path, store: PageStore) -> dict[int, PageRuns]:
    """Join the final images to the page store, on the target, before the restore.

    Rewrites the pagemaps in `directory`, writes their parents into the store's directory, links
    it as `parent`. Idempotent. Returns what the pager will have to fill (empty runs included),
    for an eager restore: what CRIU will read. Raises ImagesError, ImageFormatError.
    """
    lazy: dict[int, PageRuns] = {}
    for task, pagemap in task_pagemaps(directory).items():
        rewritten = _rewrite(pagemap, _task_mappings(directory, task))
        last = rewritten.entries[-1:, 0] + rewritten.entries[-1:, 1] * np.uint64(PAGE_BYTES)
        whole = whole_space_pagemap(task, int(last.sum()))
        store.add_task(task)
        _replace(store.directory / f"pagemap-{task}.img", encode_pagemap(whole))
        _replace(directory / f"pagemap-{task}.img", encode_pagemap(rewritten))
        lazy[task] = rewritten.runs(having=PE_LAZY, lacking=PE_PRESENT)
    _link_parent(directory, store.directory)
    return lazy


def rearm_timers(directory: Path) -> None:
    """Let periodic timers that CRIU would restore as off go on (core/timers.py), on the target,
    before the restore. Idempotent. Raises ImagesError, ImageFormatError."""
    path = directory / "files.img"
    data = _read(path, FILES_BYTES_MAX)
    armed = timers.rearm_timers(data, str(path))
    if armed != data:
        _replace(path, armed)


def rename(directory: Path, hostname: str, addresses: Mapping[IP, IP], group: str | None) -> None:
    """Make these images those of a copy with another host name, other addresses, and another cgroup
    if one is given (core/renaming.py), on the target, before the restore. Idempotent. Raises
    ImagesError, ImageFormatError."""
    path = directory / "files.img"
    data = _read(path, FILES_BYTES_MAX)
    _replace(path, renaming.rename_addresses(data, addresses, str(path)))
    for path in directory.glob("utsns-*.img"):
        named = _read(path, renaming.UTSNS_BYTES_MAX)
        _replace(path, renaming.rename_host(named, hostname, str(path)))
    if group is not None:
        path = directory / "cgroup.img"
        data = _read(path, renaming.CGROUP_BYTES_MAX)
        _replace(path, renaming.rename_cgroups(data, group, str(path)))


def _rewrite(pagemap: Pagemap, mappings: Mappings) -> Pagemap:
    """What CRIU dumped stays, and is never filled late (its content is not in the store). All
    else is in the parent; lazily where CRIU will register the mapping, except where a forked
    child must not find it."""
    entries = mappings.split(pagemap.entries)
    dumped = (entries[:, 2] & np.uint64(PE_PRESENT)) != 0
    late = mappings.property_of(entries[:, 0], mappings.can_be_lazy & ~mappings.wiped_on_fork)
    in_store = np.where(late, np.uint64(PE_PARENT | PE_LAZY), np.uint64(PE_PARENT))
    entries[:, 2] = np.where(dumped, np.uint64(PE_PRESENT), in_store)
    return Pagemap(pagemap.pages_id, entries)


def _task_mappings(directory: Path, task: int) -> Mappings:
    return decode_mappings(_read(directory / f"mm-{task}.img", MM_BYTES_MAX), f"mm-{task}.img")


def _link_parent(directory: Path, store_directory: Path) -> None:
    link = directory / PARENT_LINK
    # CRIU warns about absolute links, and follows relative ones from the image directory.
    wanted = os.path.relpath(store_directory, directory)
    try:
        if link.is_symlink():
            link.unlink()
        link.symlink_to(wanted)
    except OSError as error:
        raise ImagesError(f"{link}: {error}") from error


def _read(path: Path, bytes_max: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(bytes_max + 1)
    except OSError as error:
        raise ImagesError(f"image {path}: {error}") from error
    if len(data) > bytes_max:
        raise LimitExceededError(f"image {path} is larger than {bytes_max} bytes")
    return data


def _replace(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f".{path.name}.new")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise ImagesError(f"image {path}: {error}") from error


class ImageWriter:
    """Image files as they arrive from a peer: names from the allow-list only, in parts and in any
    order, from several threads, and at most `quota_bytes` together. `directory` and `within` are as
    a page store's. Close it."""

    def __init__(self, directory: Path, *, quota_bytes: int, within: int | None = None) -> None:
        self.directory = directory
        self._quota_bytes = quota_bytes
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._total_bytes = 0
        try:
            self._directory_fd = open_directory(directory, within)
        except OSError as error:
            raise ImagesError(f"image directory {directory}: {error}") from error

    def close(self) -> None:
        """Nothing can be written any more, by a caller that is done. Not to be called twice."""
        os.close(self._directory_fd)

    def write_file(self, name: str, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset` of a file; an empty `data` at 0 makes an empty file."""
        if not is_image_name(name):
            raise ImagesError(f"{name!r} is not the name of a CRIU image")
        view = memoryview(data).cast("B")
        if not 0 <= offset <= self._quota_bytes:
            raise LimitExceededError(f"image {name}: offset {offset} is beyond the quota")
        self._account(name, offset + len(view))
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(name, flags, 0o600, dir_fd=self._directory_fd)
            try:
                while len(view):
                    written = os.pwrite(fd, view, offset)
                    view, offset = view[written:], offset + written
            finally:
                os.close(fd)
        except OSError as error:
            raise ImagesError(f"image {self.directory / name}: {error}") from error

    def _account(self, name: str, end: int) -> None:
        with self._lock:
            if name not in self._sizes and len(self._sizes) >= FILES_MAX:
                raise LimitExceededError(f"a checkpoint has more than {FILES_MAX} images")
            growth = max(0, end - self._sizes.get(name, 0))
            if self._total_bytes + growth > self._quota_bytes:
                raise LimitExceededError(
                    f"images of more than {self._quota_bytes} bytes, {name} among them"
                )
            self._sizes[name] = max(end, self._sizes.get(name, 0))
            self._total_bytes += growth
