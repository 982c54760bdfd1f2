"""What a drain is planned from: hosts, containers, and what each costs to move. Pure.

A container says by annotations of its config.json how it wants to be treated (`wishes_of`):

    migrate.policy        live (the default) | stop-and-copy | stop | leave
    migrate.priority      -1000 to 1000, the higher the earlier; 0 by default
    migrate.group         containers of one group go to one host
    migrate.order         0 to 1000: within a group, those of a lower one are there first
    migrate.anti-affinity no two containers with the same word on one target
    migrate.requires      words that the target has to have as labels, with commas between
    migrate.dirty-rate    MiB that it writes a second, where its owner knows; by default what its
                          last move has shown, else 0
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from migrate.core.prediction import Workload, predict
from migrate.core.rounds_seen import History
from migrate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

Policy: TypeAlias = Literal["live", "stop-and-copy", "stop", "leave"]
POLICIES: Final[tuple[Policy, ...]] = ("live", "stop-and-copy", "stop", "leave")
PREFIX: Final = "migrate."
WORD: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.=-]{0,63}")
# Words of `migrate.requires`.
REQUIRED_MAX: Final = 16
PRIORITY_MAX: Final = 1000
ORDER_MAX: Final = 1000
DIRTY_MIB_MAX: Final = 1 << 20

# What is not the copy: the command's start, both preflights, the session, the restore and the end
# (two to four seconds between lab hosts). It only orders and fits into deadlines, until moves of
# this drain have been measured.
MOVE_S: Final = 4.0
# Until a move of this drain has been measured: a link of 1 Gbit/s.
RATE_BYTES_S: Final = 100.0 * (1 << 20)
# A container that writes as fast as the link carries is slowed until it does not (--on-stall).
SLOWED: Final = 10
# The last round of a copy takes about this long, and what is written meanwhile is the final delta.
LAST_ROUND_S: Final = 0.3
# For a container that is stopped to end by itself.
STOP_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a container's annotations say. dirty_bytes_s: written each second."""

    policy: Policy = "live"
    priority: int = 0
    group: str = ""
    order: int = 0
    spread: str = ""
    requires: frozenset[str] = frozenset()
    dirty_bytes_s: float = 0.0


@dataclass(frozen=True, slots=True)
class HostState:
    """A host as it is now. free_bytes: of memory, after what it keeps for itself. spread: the words
    of anti-affinity of its containers. closed: why it takes nothing, empty for one that does."""

    name: str
    free_bytes: int
    free_cpus: float
    architecture: str = "x86_64"
    criu: tuple[int, ...] = ()
    runtimes: frozenset[str] = frozenset({"runc"})
    bridges: frozenset[str] = frozenset()
    labels: frozenset[str] = frozenset()
    spread: frozenset[str] = frozenset()
    closed: str = ""


@dataclass(frozen=True, slots=True)
class Resident:
    """A container on `host`, which is to be emptied. needed_bytes: of memory, that a target must
    have while it arrives. workload: what else a prediction takes from it, if that is known. cpus:
    its limit, 0 without one. past_downtime_ms: of its last live move, if that is known. blocked:
    why it can't move at all."""

    name: str
    host: str
    memory_bytes: int
    needed_bytes: int
    workload: Workload | None = None
    cpus: float = 0.0
    wishes: Wishes = Wishes()
    runtime: str = "runc"
    architecture: str = "x86_64"
    criu: tuple[int, ...] = ()
    bridges: frozenset[str] = frozenset()
    past_downtime_ms: float | None = None
    blocked: str = ""


@dataclass(frozen=True, slots=True)
class Move:
    """What to do next: bring `container` from `source` to `target`; to none ("") if it is to be
    stopped. The predictions are of earlier measurements."""

    container: str
    source: str
    target: str
    policy: Policy
    seconds: float
    downtime_ms: float


def wishes_of(annotations: Mapping[str, Any]) -> Wishes:
    """Raises UsageError, which names the annotation that can't be meant."""

    def word(key: str) -> str:
        text = str(annotations.get(PREFIX + key, ""))
        if text and WORD.fullmatch(text) is None:
            raise _unclear(key, text, "up to 64 letters, digits and _ . = -")
        return text

    def number(key: str, least: int, most: int) -> int:
        text = str(annotations.get(PREFIX + key, "0"))
        if not re.fullmatch(r"-?[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise _unclear(key, text, f"a number from {least} to {most}")
        return int(text)

    policy = str(annotations.get(PREFIX + "policy", "live"))
    if policy not in POLICIES:
        raise _unclear("policy", policy, " | ".join(POLICIES))
    listed = str(annotations.get(PREFIX + "requires", ""))
    required = frozenset(filter(None, listed.split(",", REQUIRED_MAX)))
    if not all(map(WORD.fullmatch, required)) or len(required) > REQUIRED_MAX:
        raise _unclear("requires", listed, f"up to {REQUIRED_MAX} words, with commas between")
    return Wishes(
        policy=policy,
        priority=number("priority", -PRIORITY_MAX, PRIORITY_MAX),
        group=word("group"),
        order=number("order", 0, ORDER_MAX),
        spread=word("anti-affinity"),
        requires=required,
        dirty_bytes_s=float(number("dirty-rate", 0, DIRTY_MIB_MAX) << 20),
    )


def _unclear(key: str, text: str, instead: str) -> UsageError:
    return UsageError(
        f"the annotation {PREFIX}{key} says {text[:80]!r}", remedy=f"it may say {instead}"
    )


def move_seconds(container: Resident, rate_bytes_s: float, beside_s: float = MOVE_S) -> float:
    """How long a move takes where `rate_bytes_s` are carried. beside_s: for all but that."""
    if container.wishes.policy == "stop":
        return STOP_S
    dirty = 0.0 if container.wishes.policy == "stop-and-copy" else container.wishes.dirty_bytes_s
    return beside_s + container.memory_bytes / max(rate_bytes_s - dirty, rate_bytes_s / SLOWED)


def move_downtime_ms(container: Resident) -> float:
    """For how long it stands still: as last time, or by what is usual for one of its size and its
    writes; infinite for one that is stopped."""
    policy = container.wishes.policy
    if policy == "stop":
        return float("inf")
    if policy == "live" and container.past_downtime_ms is not None:
        return container.past_downtime_ms
    workload = container.workload or Workload(container.memory_bytes)
    written = int(container.wishes.dirty_bytes_s * LAST_ROUND_S)
    remaining_bytes = container.memory_bytes if policy == "stop-and-copy" else written
    return predict(History(), workload, remaining_bytes).downtime_ms


def why_not(container: Resident, host: HostState) -> str:
    """What keeps a container from `host`, whatever room it has; empty if nothing does.

    What only both hosts together know (features of the processors, files, names) is judged by the
    preflight of the move, before anything is touched.
    """
    lacking = container.wishes.requires - host.labels
    checks = (
        (bool(host.closed), host.closed),
        (host.name == container.host, "it is there already"),
        (container.runtime not in host.runtimes, f"takes no containers of {container.runtime}"),
        (container.architecture != host.architecture, f"is {host.architecture}"),
        (host.criu < container.criu, "has an older CRIU"),
        (not container.bridges <= host.bridges, "lacks its bridge"),
        (bool(lacking), f"has not the label {min(lacking, default='')}"),
        (container.wishes.spread in host.spread, "has one of its anti-affinity"),
    )
    return next((why for is_so, why in checks if is_so), "")
