"""Directories that a runtime has hidden from a container: an empty, read-only tmpfs over each.

CRIU would run `tar` and `gzip` for each of them, twice, while the container stands still. So it is
told that they are mounts from outside; the target has one empty tmpfs for all of them, which stays
for as long as the container has it.

    source   external mnt[/proc/acpi]:masked     target   external mnt[masked]:DIRECTORY
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any, Final

from migrate.mounts import mount_empty
from migrate.runtimes.oci import part

_KEY: Final = "masked"
# Of a tmpfs that is mounted without options, as runc does (libcontainer/rootfs_linux.go: maskPath).
_MODE: Final = stat.S_IFDIR | 0o1777


def dump_options(spec: dict[str, Any], pid: int) -> tuple[str, ...]:
    """Lines of CRIU's configuration for a dump of the container whose init is `pid`. Blocking."""
    hidden = part(spec, "linux").get("maskedPaths") or []
    read_only = _read_only_tmpfs(pid)
    return tuple(
        f"external mnt[{path}]:{_KEY}"
        for path in hidden
        if path in read_only and _is_as_made(Path("/proc", str(pid), "root", path.lstrip("/")))
    )


def restore_option(directory: Path) -> str:
    """The line for a restore; `directory` is made. What is mounted there may be unmounted as soon
    as the container runs. Raises OSError."""
    directory.mkdir(mode=0o700)
    mount_empty(directory)
    return f"external mnt[{_KEY}]:{directory}"


def _read_only_tmpfs(pid: int) -> set[str]:
    """Where a whole tmpfs is mounted read-only; proc_pid_mountinfo(5)."""
    found = set()
    for line in Path("/proc", str(pid), "mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        _, _, _, root, where, options, *_ = mount.split()
        if root == "/" and "ro" in options.split(",") and kind.startswith("tmpfs "):
            found.add(where)
    return found


def _is_as_made(directory: Path) -> bool:
    status = directory.stat()
    is_plain = (status.st_mode, status.st_uid, status.st_gid) == (_MODE, 0, 0)
    return is_plain and not any(directory.iterdir())
