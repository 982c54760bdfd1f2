"""What takes processor time away from a container's tasks: a limit of its cgroup, or pulses of the
freezer. And how that is put back, by whoever is left to do it.

    cpu.max   where the controller `cpu` of cgroup v2 is: the kernel does it. The file outlives
              everybody, so what was in it, and each value of ours, is written down first
    pulses    elsewhere: cgroup.freeze, 1 and 0 in turn, by a process that must not stop in between

The freezer is also what has the tasks stand still while a dirty tracker looks at them, with or
without a brake that is pulled. A brake knows neither migrations nor why it is pulled;
`throttle_keeper.py` holds it.
"""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Final, Protocol

import msgspec

from migrate import cgroup
from migrate.core.throttling import pulse_frozen_s, pulse_run_s

_GONE: Final = (errno.ENOENT, errno.ENODEV)
"""Of a file of a cgroup that was removed, before it is opened and after."""


class BrakePlan(msgspec.Struct, frozen=True):
    """One container's brake, as it is written down before it is pulled.

    cpu_max: what its file held before, "" where pulses are used. words: how hard it was pulled, the
    last one now: contents of cpu.max, or shares of time that are left. All are kept, so that a
    limit that somebody else has set is not taken for one of ours; none: it was not pulled yet.
    stills: whether the dirty tracker has the container stand still for moments, by the freezer.
    """

    cgroup: str
    cpu_max: str = ""
    words: tuple[str, ...] = ()
    stills: bool = False

    @property
    def name(self) -> str:
        """For people."""
        return "cpu.max" if self.cpu_max else "pulses of the freezer"

    @property
    def remedy(self) -> str:
        """What a person can do when it could not be put back."""
        thaw = f"echo 0 > {self.cgroup}/cgroup.freeze"
        if not self.cpu_max:
            return thaw
        unlimit = f"echo {self.cpu_max} > {self.cgroup}/cpu.max"
        return f"{unlimit}; {thaw}" if self.stills else unlimit


class Brake(Protocol):
    """Every call raises OSError, also when the cgroup is gone."""

    def pull(self, word: str) -> None:
        """From now on so hard: a word of the plan."""

    def pause(self) -> None:
        """Let the tasks run without it until `go_on`."""

    def go_on(self) -> None:
        """As hard as before the pause."""

    def turn(self) -> float | None:
        """Do what is due; seconds until something is due again, None for never."""


class LimitBrake:
    """By cpu.max."""

    def __init__(self, plan: BrakePlan) -> None:
        self._file = Path(plan.cgroup) / "cpu.max"
        self._before = plan.cpu_max
        self._limit = plan.cpu_max

    def pull(self, word: str) -> None:
        """See `Brake`."""
        self._limit = word
        self.go_on()

    def pause(self) -> None:
        """See `Brake`."""
        self._file.write_text(self._before)

    def go_on(self) -> None:
        """See `Brake`."""
        self._file.write_text(self._limit)

    def turn(self) -> float | None:
        """See `Brake`."""
        return None


class PulseBrake:
    """By the freezer. How long the tasks have really run decides how long they are frozen, since a
    busy machine wakes this process late."""

    def __init__(self, plan: BrakePlan) -> None:
        self._file = Path(plan.cgroup) / "cgroup.freeze"
        self._share = 1.0
        self._is_frozen = False
        self._thawed_s = time.monotonic()
        self._due_s: float | None = None

    def pull(self, word: str) -> None:
        """See `Brake`."""
        self._share = float(word)
        self.go_on()

    def pause(self) -> None:
        """See `Brake`."""
        self._thaw()
        self._due_s = None

    def go_on(self) -> None:
        """See `Brake`."""
        self._thaw()
        self._due_s = self._thawed_s + pulse_run_s(self._share)

    def turn(self) -> float | None:
        """See `Brake`."""
        if self._due_s is None:
            return None
        now_s = time.monotonic()
        if now_s < self._due_s:
            return self._due_s - now_s
        if self._is_frozen:
            self.go_on()
        else:
            self._file.write_text("1")
            self._is_frozen = True
            self._due_s = now_s + pulse_frozen_s(self._share, now_s - self._thawed_s)
        return max(self._due_s - time.monotonic(), 0.0)

    def _thaw(self) -> None:
        self._file.write_text("0")
        self._is_frozen = False
        self._thawed_s = time.monotonic()


def brake_of(plan: BrakePlan) -> Brake:
    """What pulls as the plan says."""
    return LimitBrake(plan) if plan.cpu_max else PulseBrake(plan)


def put_back(plan: BrakePlan) -> None:
    """Have the tasks run as before the brake was pulled, however it was left. Idempotent; nobody
    may hold the brake any more, and nothing else may have frozen the container.

    A limit that is none of ours was set by somebody else meanwhile, and stays. Raises OSError.
    """
    try:
        if plan.stills or not plan.cpu_max:
            cgroup.thaw(Path(plan.cgroup))
        file = Path(plan.cgroup) / "cpu.max"
        if plan.cpu_max and file.read_text().strip() in plan.words:
            file.write_text(plan.cpu_max)
    except OSError as error:
        if error.errno not in _GONE:
            raise
