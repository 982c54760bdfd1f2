"""No core dump of a process that has seen a container's memory, a key or a ticket."""

from __future__ import annotations

import ctypes
import resource
from typing import Final

_PR_SET_DUMPABLE: Final = 4

_libc = ctypes.CDLL(None, use_errno=True)


def forbid_cores() -> None:
    """For this process, and, as far as its limit goes, for those that it starts.

    The limit keeps files from being written, and systemd-coredump from keeping anything. A program
    that /proc/sys/kernel/core_pattern names is started all the same (core(5)), unless the process
    is not dumpable; which the next exec undoes (prctl(2)). The hard limit stays: CRIU has to give
    restored tasks their own, and may not be allowed to raise it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
