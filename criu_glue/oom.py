"""The kernel's choice of whom to kill when memory runs out (proc_pid_oom_score_adj(5))."""

from __future__ import annotations

import contextlib
from pathlib import Path


def choose_another() -> None:
    """Not this process, nor what it starts, where the system allows that; else nothing."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000")
