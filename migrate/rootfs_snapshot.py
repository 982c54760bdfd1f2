"""What a root file system is at one moment, though the container goes on writing to it.

    look    before the last pass of rsync: what every file is
    take    while the container stands still: what has changed since is copied beside it
    fill    it runs again: all other names become empty files of the copy

So the copy has the content of what changed, and the names of all that was there. A pass over what
changed, and one that removes what has no name there, make of the target what `take` saw. What both
cost the container is a walk over its names and a copy of what has changed.

A file counts as changed when its number, size or time of change is another one, or when that time
is too near to `look`: a kernel's clock for files stands still for some milliseconds. Blocking.
"""

from __future__ import annotations

import os
import stat
import subprocess
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from migrate.errors import TransferFailed
from migrate.rootfs import RSYNC_STDERR_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_BLOCK_BYTES: Final = 512
_NEAR_NS: Final = 2_000_000_000
_FLAGS: Final = ("-aHAXS", "--numeric-ids", "--from0", "--files-from=-")
# Names of a tree are held in memory twice; each takes some 300 bytes.
FILES_MAX: Final = 4_000_000


class _Seen(NamedTuple):
    inode: int
    size: int
    blocks: int
    changed_ns: int
    mode: int


class RootfsSnapshot:
    """See the module. `rootfs` is the container's root, `copy` a directory that is made here.

    `room_bytes`: what may be copied. Raises TransferFailed.
    """

    def __init__(self, rootfs: Path, copy: Path, room_bytes: int) -> None:
        self._rootfs = rootfs
        self.copy = copy
        self._room_bytes = room_bytes
        self._before: dict[str, _Seen] = {}
        self._after: dict[str, _Seen] = {}
        self._looked_ns = 0
        self.changed: list[str] = []

    def look(self) -> None:
        """Remember what is there."""
        self._looked_ns = time.time_ns()
        self._before = dict(self._walk())

    def take(self, mapped: Sequence[str]) -> None:
        """Copy what has changed, and these files in any case: they are written through mappings,
        which is seen by nothing else. The container stands still meanwhile."""
        self._after = dict(self._walk())
        forced = set(mapped)
        self.changed = [
            name for name, seen in self._after.items() if name in forced or self._is_new(name, seen)
        ]
        size_bytes = sum(
            self._after[name].blocks * _BLOCK_BYTES
            for name in self.changed
            if stat.S_ISREG(self._after[name].mode)
        )
        if size_bytes > self._room_bytes:
            raise TransferFailed(
                f"{size_bytes >> 20} MiB of files were written since the last pass over the root"
                f" file system, and there is room for {self._room_bytes >> 20}",
                phase="rootfs",
                remedy="copy it when it writes less, or free memory",
            )
        directories = [name for name, seen in self._after.items() if stat.S_ISDIR(seen.mode)]
        self.copy.mkdir(mode=0o700)
        self._copy(sorted({*directories, *self.changed}))

    def fill(self) -> None:
        """Give the copy the names of all that has not changed."""
        for name in self._after.keys() - set(self.changed):
            path = self.copy / name
            if not os.path.lexists(path):
                os.mknod(path, 0o600 | stat.S_IFREG)
        self._before, self._after = {}, {}

    def _is_new(self, name: str, seen: _Seen) -> bool:
        return self._before.get(name) != seen or seen.changed_ns > self._looked_ns - _NEAR_NS

    def _copy(self, names: Sequence[str]) -> None:
        done = subprocess.run(
            ["rsync", *_FLAGS, f"{self._rootfs}/", f"{self.copy}/"],
            input=b"\0".join(os.fsencode(name) for name in names),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode != 0:
            words = done.stderr[-RSYNC_STDERR_BYTES_MAX:].decode("utf-8", "replace").strip()
            raise TransferFailed(
                f"what has changed of the root file system can't be kept: {words}", phase="rootfs"
            )

    def _walk(self) -> Iterator[tuple[str, _Seen]]:
        """Every name below the root, relative to it, the root itself as "."."""
        yield ".", _seen(self._rootfs.stat())
        todo, count = [""], 0
        while todo:
            directory = todo.pop()
            try:
                entries = list(os.scandir(self._rootfs / directory))
            except FileNotFoundError:
                continue
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                name = f"{directory}/{entry.name}" if directory else entry.name
                if stat.S_ISDIR(status.st_mode):
                    todo.append(name)
                count += 1
                if count > FILES_MAX:
                    raise TransferFailed(
                        f"the root file system has more than {FILES_MAX} files", phase="rootfs"
                    )
                yield name, _seen(status)


def _seen(status: os.stat_result) -> _Seen:
    return _Seen(
        status.st_ino, status.st_size, status.st_blocks, status.st_ctime_ns, status.st_mode
    )
