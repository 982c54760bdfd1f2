"""Small files that only their owner may read, replaced as a whole: keys, certificates, lists.

A reader sees the former content or the new one, also after a power failure; never a part of it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BYTES_MAX = 1 << 20
"""Of a file that is read: far above what is ever written."""


def make_directory(path: Path) -> None:
    """`path`, 0700, also where it was there with another mode. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.chmod(0o700)


def replace(path: Path, data: bytes) -> None:
    """Put `data` into `path`, 0600, whatever was there before. Raises OSError."""
    # mkstemp: a new file, 0600.
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.rename(partial, path)  # noqa: PTH104 - `partial` is a string
    except BaseException:
        os.unlink(partial)  # noqa: PTH108
        raise
    _sync(path.parent)


def read(path: Path) -> bytes:
    """Raises OSError, also for a file that is too large to be one of these."""
    with path.open("rb") as file:
        data = file.read(BYTES_MAX + 1)
    if len(data) > BYTES_MAX:
        raise OSError(f"{path} has more than {BYTES_MAX} bytes")
    return data


def read_secret(path: Path) -> bytes:
    """The same for a file with a key in it: nobody but its owner may have been able to read it."""
    with path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    if mode & 0o077:
        raise OSError(f"{path} has mode {mode:04o}: others may have read the key in it (chmod 600)")
    return read(path)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One process at a time changes files of `directory`. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
