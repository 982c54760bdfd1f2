"""The kernel's grace periods are made short while a container stands still.

Taking away a mount, joining a cgroup or ending a namespace waits for a grace period of RCU, some 10
to 20 ms, and a dump and a restore have several. With /sys/kernel/rcu_expedited the kernel ends them
within microseconds, by interrupting the processors, as it does itself around a suspend
(Documentation/RCU, kernel/rcu/tree.c: rcu_pm_notify). It is a switch of the whole host, so it is
left alone where

    rcu_normal is set        the operator's word that nothing is to be expedited
    processors are nohz_full they are not to be interrupted
    rcu_expedited is set     by the operator, or by another migration, which takes it back soon
    it can't be written

One process at a time has turned it, by a claim. What is left when that one dies (the file is there,
and free) is put back by the guard, the agent's rounds, or the next migration.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Final

from migrate.claim import Claim, claimant
from migrate.errors import MigrateError

if TYPE_CHECKING:
    from migrate.claim import Kind

CLAIM_NAME: Final = "grace-periods"
_EXPEDITED: Final = Path("/sys/kernel/rcu_expedited")
_NORMAL: Final = Path("/sys/kernel/rcu_normal")
_NOHZ_FULL: Final = Path("/sys/devices/system/cpu/nohz_full")
# cpulist_parse() of no processor.
_NONE: Final = ("", "(null)")


class GracePeriods:
    """See the module. `shorten`, and `put_back` soon after; both are idempotent and never raise.

    run: the host's directory for what is gone after a reboot.
    """

    def __init__(self, run: Path, kind: Kind) -> None:
        self._path = run / CLAIM_NAME
        self._kind = kind
        self._claim: Claim | None = None

    def shorten(self) -> None:
        """Where that is allowed and nobody else has done it."""
        if self._claim is not None or not _is_allowed():
            return
        was_left = self._path.exists()
        with contextlib.suppress(MigrateError, OSError):
            claim = Claim.take(self._path, self._kind)
            if was_left or _read(_EXPEDITED) == "0":
                self._claim = claim
                _EXPEDITED.write_text("1")
            else:
                claim.release()

    def put_back(self) -> None:
        """As it was before `shorten`."""
        if self._claim is not None:
            with contextlib.suppress(OSError):
                _EXPEDITED.write_text("0")
            self._claim.release()
            self._claim = None


def put_back_left(run: Path) -> None:
    """Put back what a process has left that died. Never raises."""
    path = run / CLAIM_NAME
    with contextlib.suppress(MigrateError, OSError):
        if path.exists() and claimant(path) is None:
            with Claim.take(path, "recovery"):
                _EXPEDITED.write_text("0")


def _is_allowed() -> bool:
    return _read(_NORMAL) == "0" and _read(_NOHZ_FULL) in _NONE


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
