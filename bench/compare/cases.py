"""What is measured: containers, links and ways to move them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from bench.compare.by_podman import Podman, PodmanPreCheckpoint
from bench.compare.by_runc import PostCopy, StopAndCopy
from bench.compare.dolly import Dolly, DollyClone

if TYPE_CHECKING:
    import re
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


@dataclass(frozen=True, slots=True)
class Planned:
    """A case in the ways that are compared in it. round_s: what all of them once take on the
    machine that docs/bench is made on, with everything around them. optional: only when asked
    for, since it takes long."""

    case: Case
    systems: tuple[System, ...]
    round_s: float
    optional: bool = False

    def only(self, wanted: re.Pattern[str]) -> Planned | None:
        """With the systems whose name, behind the case's, has this in it; None if none has."""
        systems = tuple(
            one for one in self.systems if wanted.search(f"{self.case.label} {one.name}")
        )
        share = len(systems) / len(self.systems)
        return replace(self, systems=systems, round_s=self.round_s * share) if systems else None

    def expected_s(self, runs: int) -> float:
        """For so many rounds, and the lab."""
        return LAB_S + runs * self.round_s


LAB_S: Final = 5.0
LAZY: Final = Dolly("migrate")
EAGER: Final = Dolly("migrate, eager restore", "--restore", "eager")
STOPPED: Final = Dolly("migrate, no pre-copy", "--tracker", "none")
SPARING: Final = Dolly("migrate, 32 MiB/s", "--bandwidth", "32")
"""For who would rather wait than lose throughput while memory is copied."""
OTHERS: Final[tuple[System, ...]] = (StopAndCopy(), PostCopy(), Podman(), PodmanPreCheckpoint())
COMMON: Final[tuple[System, ...]] = (LAZY, StopAndCopy(), Podman())

# What grows with memory is what everybody is compared in; the rest shows our own limits.
MATRIX: Final[Sequence[Planned]] = (
    Planned(Case(16), (LAZY, DollyClone(), *OTHERS), 30),
    Planned(Case(256), (LAZY, EAGER, STOPPED, DollyClone(), *OTHERS), 55),
    Planned(Case(1024), (LAZY, DollyClone(), StopAndCopy(), Podman()), 60),
    Planned(Case(4096), (LAZY,), 40),
    Planned(Case(256, link=GIGABIT), COMMON, 32),
    # A link that this container would fill by writing is not what is compared.
    Planned(Case(64, dirty_mib_s=2, link=FAR), COMMON, 50),
    Planned(Case(256, dirty_mib_s=0), (LAZY,), 8),
    Planned(Case(256, dirty_mib_s=200), (LAZY,), 12),
    Planned(Case(256, "redis", dirty_mib_s=8), (LAZY, SPARING, StopAndCopy()), 55),
    Planned(Case(1024, "redis", dirty_mib_s=8), (LAZY,), 40),
    Planned(Case(16, "nginx", dirty_mib_s=0), (LAZY, StopAndCopy()), 22),
    Planned(Case(64, "web", dirty_mib_s=0), (LAZY,), 18),
    Planned(Case(128, "postgres", dirty_mib_s=0), (LAZY, StopAndCopy()), 40),
    # CRIU's post-copy needs two minutes for its last page, Podman a minute for 4 GiB.
    Planned(Case(1024), (PostCopy(),), 130, optional=True),
    Planned(Case(4096), (StopAndCopy(), Podman()), 130, optional=True),
)

QUICK: Final[Sequence[Planned]] = (
    Planned(Case(16, dirty_mib_s=8), (LAZY, DollyClone(), *OTHERS), 30),
    Planned(Case(16, "redis", dirty_mib_s=1), (LAZY,), 12),
    Planned(Case(16, "nginx", dirty_mib_s=0), (LAZY,), 10),
    Planned(Case(4, "web", dirty_mib_s=0), (LAZY,), 10),
    Planned(Case(16, "postgres", dirty_mib_s=0), (LAZY,), 12),
)
"""Every system and every kind of load once, for who wants to know that it runs."""
