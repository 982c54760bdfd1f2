"""Where scripts/setup --vm has put what machines start from. Knows no QEMU.

/var/cache/dolly/machine-KEY/    bench/vm/build says what is in it

With DOLLY_MACHINE_KERNEL in the environment, the name of a Debian, it is one with that one's kernel
(bench/vm/build-with-kernel).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from bench.lab import paths
from bench.lab.errors import LabError

# The parts of bench/vm that the image does not depend on: they only use it.
USERS = frozenset({"__init__.py", "console.py", "host.py", "image.py", "machine.py"})
# Of which only images with another kernel are made.
OTHER_KERNEL = "build-with-kernel"


def path() -> Path:
    """The cached image of this checkout's recipe; LabError when scripts/setup has not made it."""
    image = paths.CACHE / f"machine-{key()}"
    if not image.is_dir():
        raise LabError(f"no machine at {image}: run scripts/setup --vm")
    return image


def key() -> str:
    """16 digits for the content of the recipe. scripts/setup asks for it by this module, too."""
    digest = hashlib.sha256()
    parts = _recipe()
    if kernel := os.environ.get("DOLLY_MACHINE_KERNEL"):
        digest.update(f"{kernel}\n".encode())
        parts.append(paths.PROJECT / "bench/vm" / OTHER_KERNEL)
    for part in sorted(parts):
        digest.update(f"{part.relative_to(paths.PROJECT)}\n".encode() + part.read_bytes())
    return digest.hexdigest()[:16]


def _recipe() -> list[Path]:
    own = paths.PROJECT / "bench/vm"
    parts = [
        part
        for part in own.rglob("*")
        if part.is_file() and part.name not in USERS | {OTHER_KERNEL}
    ]
    root = [paths.PROJECT / "bench/lab/root" / name for name in paths.RECIPE]
    return [part for part in parts if "__pycache__" not in part.parts] + root


if __name__ == "__main__":
    print(key())
