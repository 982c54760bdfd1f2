"""What is kept of a drain: one file, written before each act, that everybody reads.

STATE/drain/state.json     the last drain of this host, or the one that is under way
STATE/drain/dry-run.json   the last one that was only planned
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from typing import TYPE_CHECKING, Final

import msgspec

from migrate import cordon
from migrate.claim import claimant
from migrate.core.messages import MAX_MESSAGE_BYTES, Drained
from migrate.errors import JournalError
from transport import sealed_files

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.config import HostPaths

# In STATE/drain, where reports of moves are too.
OF_DRAINS: Final = ("state.json", "dry-run.json")


def read(paths: HostPaths, *, dry_run: bool = False) -> Drained:
    """With what is so now: whether the host is cordoned, and whether a process is at it. Raises
    JournalError."""
    path = _path(paths, dry_run=dry_run)
    try:
        found = msgspec.json.decode(sealed_files.read(path), type=Drained)
    except FileNotFoundError:
        found = Drained(socket.gethostname())
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise JournalError(f"{path} can't be read: {error}", remedy=f"remove {path}") from error
    return msgspec.structs.replace(
        found,
        cordoned=bool(cordon.refusals(paths, "")),
        is_driven=claimant(paths.drain_claim) is not None,
    )


def write(paths: HostPaths, state: Drained) -> None:
    """Synced to the disk. Raises JournalError."""
    path = _path(paths, dry_run=state.asked.dry_run)
    try:
        data = msgspec.json.encode(state)
        if len(data) > min(MAX_MESSAGE_BYTES, sealed_files.BYTES_MAX):
            raise JournalError("the drain has more to tell than fits its file")
        sealed_files.make_directory(path.parent)
        sealed_files.replace(path, data)
    except OSError as error:
        raise JournalError(f"{path} can't be written: {error}") from error


def stop(paths: HostPaths) -> bool:
    """Have the drain begin nothing more; whether there is one."""
    driver = claimant(paths.drain_claim)
    if driver is None or not driver.pid:
        return False
    with contextlib.suppress(ProcessLookupError):
        pidfd = os.pidfd_open(driver.pid)
        try:
            # Still its claim after the descriptor was opened: it is this process.
            if claimant(paths.drain_claim) == driver:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        finally:
            os.close(pidfd)
    return True


def _path(paths: HostPaths, *, dry_run: bool) -> Path:
    return paths.drain / OF_DRAINS[dry_run]
