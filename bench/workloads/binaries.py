"""Where scripts/setup put the compiled workloads."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from bench.lab.errors import LabError
from bench.lab.paths import CACHE, PROJECT

if TYPE_CHECKING:
    from pathlib import Path

# The same flags, and the same files in the same order, as in scripts/setup.
FLAGS = "-O2 -static -pthread -Wall"


def binary(name: str) -> Path:
    """The static binary of bench/workloads/NAME.c. Raises LabError when setup has not made it."""
    sources = sorted(PROJECT.glob("bench/workloads/*.[ch]"))
    key = hashlib.sha256(f"{FLAGS}\n".encode())
    for source in sources:
        key.update(f"{source.relative_to(PROJECT)}\n".encode() + source.read_bytes())
    path = CACHE / f"workloads-{key.hexdigest()[:16]}" / name
    if not path.is_file():
        raise LabError(f"no workload at {path}: run scripts/setup")
    return path
