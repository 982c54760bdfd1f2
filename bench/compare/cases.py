"""What is measured: containers, links and ways to move them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bench.compare.by_podman import Podman, PodmanPreCheckpoint
from bench.compare.by_runc import PostCopy, StopAndCopy
from bench.compare.dolly import Dolly, DollyClone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.compare.systems import System

DIRTY_MIB_S: Final = 50


@dataclass(frozen=True, slots=True)
class Link:
    """Of each host, both ways. rate: None for what the machine can do."""

    name: str
    rate: str | None = None
    delay_ms: float = 0.0


UNSHAPED: Final = Link("unshaped")
GIGABIT: Final = Link("1 Gbit/s", "1gbit")
FAR: Final = Link("100 Mbit/s, 20 ms", "100mbit", 20.0)


@dataclass(frozen=True, slots=True)
class Case:
    """A container on a link. workload: of bench.demo.Workload."""

    memory_mib: int
    workload: str = "memory"
    dirty_mib_s: int = DIRTY_MIB_S
    link: Link = UNSHAPED

    @property
    def label(self) -> str:
        """What `--only` looks at, together with the system's name."""
        return f"{self.workload} {self.memory_mib}M {self.dirty_mib_s}M/s {self.link.name}"


LAZY: Final = Dolly("migrate")
EAGER: Final = Dolly("migrate, eager restore", "--restore", "eager")
STOPPED: Final = Dolly("migrate, no pre-copy", "--tracker", "none")
OTHERS: Final[tuple[System, ...]] = (StopAndCopy(), PostCopy(), Podman(), PodmanPreCheckpoint())

# What grows with memory is what everybody is compared in; the rest shows our own limits.
EVERY: Final[tuple[System, ...]] = (LAZY, EAGER, STOPPED, DollyClone(), *OTHERS)
MATRIX: Final[Sequence[tuple[Case, tuple[System, ...]]]] = (
    *((Case(memory_mib), EVERY) for memory_mib in (16, 256, 1024)),
    (Case(4096), (LAZY, StopAndCopy(), Podman())),
    *((Case(256, link=link), (LAZY, StopAndCopy(), Podman())) for link in (GIGABIT, FAR)),
    *((Case(256, dirty_mib_s=rate), (LAZY,)) for rate in (0, 200)),
    (Case(256, "redis", dirty_mib_s=8), (LAZY, StopAndCopy(), Podman())),
    (Case(1024, "redis", dirty_mib_s=8), (LAZY,)),
    (Case(16, "nginx", dirty_mib_s=0), (LAZY, StopAndCopy())),
    (Case(64, "web", dirty_mib_s=0), (LAZY, StopAndCopy())),
)

QUICK: Final[Sequence[tuple[Case, tuple[System, ...]]]] = (
    (Case(16, dirty_mib_s=8), (LAZY, DollyClone(), *OTHERS)),
)
"""Every system once, for who wants to know that it runs."""
