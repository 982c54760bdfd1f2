"""A checkpoint that is being made: it has another name until all of it is there and signed.

    DIR.unfinished-ID  ──── rename ───>  DIR         ID: of the migration that makes it

So there is a whole checkpoint in DIR or nothing, whatever ends the one who makes it. The journal
has the name before there is such a directory, and whoever recovers that migration discards it.
Blocking.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from pathlib import Path
from typing import Final

import psutil
import structlog

from migrate.processes import users_of

log = structlog.get_logger()

# As SIGKILL does a process.
_END_DEADLINE_S: Final = 5.0


def path_for(directory: Path, migration_id: str) -> Path:
    """Where the checkpoint for `directory` is while it is made."""
    return directory.with_name(f"{directory.name}{_suffix(migration_id)}")


def discard(path: Path, migration_id: str) -> None:
    """Remove what that migration has made so far, and nothing else: no other has this number, and
    nobody else is at work in a directory of that name. What can't be removed is told in the log."""
    try:
        status = path.lstat()
    except OSError:
        return
    is_ours = path.name.endswith(_suffix(migration_id)) and status.st_uid == os.geteuid()
    if is_ours and stat.S_ISDIR(status.st_mode):
        # It outlives whoever has started it.
        for process, words in users_of(path):
            if Path(words[0]).name == "rsync":
                with contextlib.suppress(psutil.Error):
                    process.kill()
                    process.wait(_END_DEADLINE_S)
        shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):
        log.warning("a checkpoint that was not finished is still there", path=str(path))


def _suffix(migration_id: str) -> str:
    return f".unfinished-{migration_id}"
