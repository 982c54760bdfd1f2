"""What CRIU remembers of the kernel, and how it is told that dirty pages can be followed.

    /run/criu.kdat   CRIU's `struct kerndat_s` (criu/include/kerndat.h), written when it is first
                     asked for anything (criu/kerndat.c: kerndat_save_cache)

CRIU takes a parent for a dump only where the kernel notes soft-dirty pages (criu/config.c:
check_options), since it knows no other tracker. Ours does that work without them. So one CRIU, in a
mount namespace of its own, is given a copy of that file which says that the kernel has them;
everybody else has the file as it was. Asked for a soft-dirty bit such a kernel always answers that
the page is as it was, which is what a dump after our tracker is to take for granted.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Final

from criu_glue.errors import CriuGlueError

if TYPE_CHECKING:
    from collections.abc import Sequence

_CACHE: Final = Path("/run/criu.kdat")
_CACHE_BYTES_MAX: Final = 1 << 16
# `has_dirty_track`, behind two u32, a dev_t, an int and an u64. Tried before it is relied on.
_HAS_DIRTY_TRACK: Final = 32
_FEATURE: Final = ("criu", "check", "--feature", "mem_dirty_track")
_DEADLINE_S: Final = 20.0
_APART: Final = ("unshare", "--mount", "--propagation", "slave")
_BIND: Final = 'mount --bind "$0" "$1" && shift && exec "$@"'


class KernelCacheError(CriuGlueError):
    """CRIU can't be told that dirty pages are followed."""


def tracking_prefix(copy: Path) -> tuple[str, ...]:
    """What a command line of CRIU needs in front of it so that it takes a parent; nothing where
    the kernel has soft-dirty bits.

    `copy` is where the changed file goes; it must not be there. Raises KernelCacheError.
    """
    if _succeeds(_FEATURE):
        return ()
    try:
        with _CACHE.open("rb") as file:
            cached = bytearray(file.read(_CACHE_BYTES_MAX))
        if cached[_HAS_DIRTY_TRACK] != 0:
            raise KernelCacheError(f"{_CACHE} is not as CRIU 4.2 writes it")
        cached[_HAS_DIRTY_TRACK] = 1
        copy.write_bytes(cached)
    except (OSError, IndexError) as error:
        raise KernelCacheError(f"{_CACHE}: {error}") from error
    prefix = (*_APART, "sh", "-c", _BIND, str(copy), str(_CACHE))
    if not _succeeds((*prefix, *_FEATURE)):
        raise KernelCacheError(f"CRIU does not take its {_CACHE.name} from elsewhere")
    return prefix


def _succeeds(command: Sequence[str]) -> bool:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelCacheError(f"{' '.join(command)}: {error}") from error
    return done.returncode == 0
