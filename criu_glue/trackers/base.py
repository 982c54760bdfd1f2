"""What every dirty tracker is: the interface, and the pages that it reports. No mechanism.

    round 1..n   collect() -> read the pages -> send      the container runs
    freeze       collect(last=True) -> read -> detach()    it does not

A page may be written again between being reported and being read. What is read is then newer
than what was reported, possibly torn, and the page is in the next round's report. Only what is
read after the last collect, frozen, is final.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class TaskPages:
    """Dirty pages of one task.

    task: its pid in its own pid namespace (CRIU's `pagemap-<task>.img`); pid: on this host.
    runs: shape (n, 2), columns [address, pages], sorted, page aligned, not overlapping.
    """

    task: int
    pid: int
    runs: npt.NDArray[np.uint64]

    @property
    def pages(self) -> int:
        """How many pages the runs have."""
        return int(self.runs[:, 1].sum())


class DirtyTracker(Protocol):
    """Tells which private anonymous pages of a container were written."""

    @property
    def name(self) -> str:
        """As the user names it and the report shows it."""
        ...

    def collect(self, *, last: bool = False) -> list[TaskPages]:
        """Everything written since the last collect; at the first, everything present.

        New tasks and mappings are found and are wholly dirty. Tasks that have exited are left
        out. `last`: the container is frozen and stays so; nothing new is set up for a next round,
        and what was reported stays dirty (so a failed dump can go back to another round).
        """
        ...

    def detach(self) -> None:
        """Give the tasks back untouched. Idempotent. Must precede CRIU's dump."""
        ...
