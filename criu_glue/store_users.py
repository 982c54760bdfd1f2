"""Who needs a page store: every pager that fills from it says so by a lock on its directory.

Several copies of one container are filled from one store, each by a pager of its own. What one of
them has got entirely may go when no other one needs it. A lock of an open file description
(fcntl(2), F_OFD_SETLK) is shared by both processes of a pager and goes with the last of them, in
whatever way they end; whether anybody else has one is asked without changing anything.

A pager takes its lock when it starts, and all that are to share a store are there before anything
is filled from it.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

# struct flock of 64 bits: type, whence, start, length, pid; as long as its alignment wants.
_FLOCK: Final = struct.Struct("hhqqi0q")


def use(directory: Path) -> int:
    """Say that this process, and those forked from it, need the store; a descriptor that says so
    as long as it is open. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def is_alone(descriptor: int) -> bool:
    """Whether nobody but the holders of this descriptor needs the store."""
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK))
    kind, *_ = _FLOCK.unpack(answer)
    return bool(kind == fcntl.F_UNLCK)


def _flock(kind: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0)
