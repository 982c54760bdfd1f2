"""One hash of a tree of files: of everything in it that a container could notice.

    SHA-256 of, for each name in the tree, in the order of their bytes:
        name NUL kind, mode, owner, group, size, time of change of its content (ns), device NUL
        each extended attribute: name NUL value NUL
        a link: where it leads; a file: its content; another name of one that came before: that name

Lengths stand before what may contain anything, so no two trees are written the same. Blocking; it
reads every file.
"""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING, Final

from migrate.errors import MigrateError
from migrate.rootfs_snapshot import FILES_MAX

if TYPE_CHECKING:
    from pathlib import Path

_BUFFER_BYTES: Final = 1 << 20
# What must not follow links, and not wait for whoever has put a FIFO in a file's place meanwhile.
_OPEN: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def tree_digest(root: Path) -> bytes:
    """The hash of a tree. Raises MigrateError for one that can't be read, or has too much in it."""
    try:
        return _digest(root)
    except OSError as error:
        raise MigrateError(f"{root} can't be read: {error}") from error


def _digest(root: Path) -> bytes:
    digest = hashlib.sha256()
    first: dict[tuple[int, int], str] = {}
    for name in _names(root):
        path = root / name
        status = path.lstat()
        kind = status.st_mode
        # A directory's size is its file system's matter.
        size_bytes = 0 if stat.S_ISDIR(kind) else status.st_size
        device = status.st_rdev if stat.S_ISCHR(kind) or stat.S_ISBLK(kind) else 0
        about = (kind, status.st_uid, status.st_gid, size_bytes, status.st_mtime_ns, device)
        _add(digest, os.fsencode(name))
        _add(digest, " ".join(map(str, about)).encode())
        for attribute in sorted(os.listxattr(path, follow_symlinks=False)):
            _add(digest, os.fsencode(attribute))
            _add(digest, os.getxattr(path, attribute, follow_symlinks=False))
        known = first.setdefault((status.st_dev, status.st_ino), name)
        _add(digest, b"" if known == name else os.fsencode(known))
        if stat.S_ISLNK(kind):
            _add(digest, os.fsencode(path.readlink()))
        elif stat.S_ISREG(kind) and known == name:
            _add(digest, _content(path))
    return digest.digest()


def _names(root: Path) -> list[str]:
    """All names in the tree, relative to it, itself as ""."""
    found, todo = [""], [""]
    while todo:
        directory = todo.pop()
        with os.scandir(root / directory) as entries:
            for entry in entries:
                name = f"{directory}/{entry.name}" if directory else entry.name
                found.append(name)
                if entry.is_dir(follow_symlinks=False):
                    todo.append(name)
        if len(found) > FILES_MAX:
            raise MigrateError(f"{root} has more than {FILES_MAX} files")
    return sorted(found, key=os.fsencode)


def _content(path: Path) -> bytes:
    digest = hashlib.sha256()
    with open(os.open(path, _OPEN), "rb", buffering=0) as file:  # noqa: PTH123  a descriptor
        while data := file.read(_BUFFER_BYTES):
            digest.update(data)
    return digest.digest()


def _add(digest: hashlib._Hash, data: bytes) -> None:
    digest.update(b"%d:" % len(data) + data)
