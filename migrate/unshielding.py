"""The images of a dump, without what only its custody has put into the tasks (`custody.py`).

A module of its own for the sake of the guard, which cleans no images: it does without numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from criu_glue import custody
from criu_glue.core.trap_action import with_trap_action
from criu_glue.mappings import vpid
from migrate.custody import RECORD

if TYPE_CHECKING:
    from pathlib import Path


def unshield(hold: Path, image_dir: Path) -> None:
    """Take the handlers that tasks had for the dump alone out of its images. Blocking. Raises
    CriuGlueError, OSError."""
    for task in custody.read(hold / RECORD):
        if task.trap_action:
            image = image_dir / f"core-{vpid(task.pid)}.img"
            image.write_bytes(with_trap_action(image.read_bytes(), task.trap_action, image.name))
