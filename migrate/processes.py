"""Small matters of processes and their logs that both sides need."""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and not just a zombie that nobody has waited for."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_tree(pid: int) -> None:
    """Kill a process that we started and what it started."""
    try:
        top = psutil.Process(pid)
        # Stopped, it starts nothing that would not be in the list.
        top.suspend()
        tree = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def tail(path: Path, bytes_max: int) -> str:
    """The end of a text file, nothing if there is none."""
    try:
        with path.open("rb") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            file.seek(max(0, size_bytes - bytes_max))
            return file.read(bytes_max).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def last_message(log: str) -> str:
    """The last message of a runtime's log (logrus' text: `time=… level=error msg="…"`)."""
    messages = re.findall(r'msg="((?:[^"\\]|\\.)*)"', log)
    return messages[-1].replace("\\n", " ").replace('\\"', '"') if messages else ""
