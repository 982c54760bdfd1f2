"""The runtimes that there are drivers for, and which of them has a container."""

from __future__ import annotations

from typing import TYPE_CHECKING

from migrate.runtimes.base import AmbiguousContainerError
from migrate.runtimes.crun import Crun
from migrate.runtimes.runc import Runc

if TYPE_CHECKING:
    from migrate.runtimes.base import Runtime

NAMES = ("runc", "crun")


def drivers() -> dict[str, Runtime]:
    """A driver for each, by its name."""
    return {driver.name: driver for driver in (Runc(), Crun())}


def having(name: str) -> Runtime:
    """The driver of the runtime that has a container `name`; if none has, of the first, which will
    say so. Raises InvalidNameError and, if several have, AmbiguousContainerError."""
    every = drivers()
    found = [driver for driver in every.values() if driver.exists(name)]
    if len(found) > 1:
        both = " and ".join(driver.name for driver in found)
        raise AmbiguousContainerError(
            f"{both} both have a container {name}", remedy="say whose is meant: --runtime"
        )
    return found[0] if found else every[NAMES[0]]
