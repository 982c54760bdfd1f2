"""How long a container would stand still, taken apart as `core/downtime.py` takes the real thing.

A model of what is done while it stands still: a constant for each kind of work, times what there is
of it (threads, tasks, mappings, memory, bytes on the way, round trips). It knows no programs.

The constants come from the moves of `docs/bench/results.jsonl` and decision 0032 says how. They are
those of one machine, where both hosts and the client share two processors, at the pace that it has
when nothing else runs. How much slower another is, is learnt in each migration from the processor
time that it takes to start a program that it needs (`pace`). Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from migrate.core.rounds_seen import History

GIB: Final = 1 << 30

FREEZE_MS: Final = 1.0
"""Unplugging by netlink and freezing the cgroup: 0.5 to 1 ms where nothing else runs."""
COLLECT_MS: Final = 10.0
"""From the freeze until the final delta is known and CRIU begins."""
DUMP_MS: Final = 27.0
"""CRIU's dump below runc, from the freeze to `post-dump`, of a task without threads and memory."""
DUMP_MS_PER_THREAD: Final = 3.0
"""What each thread adds, the first of a task too: each is stopped and asked by itself."""
DUMP_MS_PER_TASK: Final = 9.0
"""What each task after the first one adds besides."""
DUMP_MS_PER_MAPPING: Final = 0.03
"""What each mapping adds; it counts where there are thousands (Postgres)."""
DUMP_MS_PER_GIB: Final = 50.0
"""What a dump adds per GiB of present memory, which it leaves alone (`criu_glue/known_pages.py`):
the kernel walks its page tables for `smaps`, PAGEMAP_SCAN and `clear_refs`."""
DUMP_SHARED_MS_PER_GIB: Final = 800.0
"""Shared memory is never lazy, CRIU writes all of it: full dumps of 1 GiB took 0.72 to 0.9 s."""
DUMP_BESIDE: Final = 0.3
"""So much longer a dump takes for each time that it is sent beside it: both want processors."""
SETTLE_MS: Final = 8.0
"""Between the dump's end and the last answer, however little is sent: images are cleaned, what they
name is compared with what was sent, and the images themselves, some KiB, are sent."""
SETTLE_ROUND_TRIPS: Final = 4
"""The images are waited for, then the pages that nobody watched; the last pass of the root file
system, with more of them, ends at about the same time. Of one link with 20 ms each way."""
RESTORE_MS: Final = 50.0
"""A lazy restore with runc up to the hold, of a task without memory."""
RESTORE_MS_PER_TASK: Final = 6.0
"""What each other task adds."""
RESTORE_EAGER_MS_PER_GIB: Final = 500.0
"""An eager restore of 256 MiB takes 120 ms longer than a lazy one. Shared memory is always
eager."""
RESTORE_ROUND_TRIPS: Final = 1.5
"""The request, which is more than fits into a connection's first window."""
HANDOVER_MS: Final = 4.5
"""Two synced journal records, besides the round trip."""
RESUME_MS: Final = 16.0
"""CRIU's way from `post-restore` to the first instruction, with a look at what confines the
tasks."""
ROUND_TRIP_MS: Final = 0.5
"""A local network, until pings have been answered."""
KEPT_BYTES_MS: Final = 500.0 * (1 << 20) / 1000
"""Memory is copied within this host with 1.2 to 1.8 GiB/s, and slower into pages that are new to
it: 146 MiB/s were seen."""

STARTED_CPU_MS: Final = 180.0
"""Processor time of the guard's start (`migrate/freezing.py`), nearly all of it Python's, where
nothing else runs."""
PACE_NOISE: Final = 1.3
"""Between one start and the next it may differ by so much, which tells nothing of the machine."""
PACE_MIN: Final = 0.5
PACE_MAX: Final = 20.0
BUSY_MAX: Final = 0.5
"""No more than this share of the processors is taken as free for the sender once the dump is done:
it may be the link that it waits for. What is sent beside the dump has to share with CRIU."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What the prediction must know of the container and the way to the target.

    memory_bytes: present memory, shared_bytes of it shared, and unwatched_bytes of it such as no
    tracker tells about (`migrate/memory_facts.py`). tasks, threads, mappings: of all together.
    round_trip_ms: of the control channel, None where it was not measured. pace: see `pace`. busy:
    the share of this host's processors that the container had while it was copied, 0 to 1. is_kept:
    the container is copied, so the final delta is kept on this host while it stands still, and it
    runs on after the dump.
    """

    memory_bytes: int
    shared_bytes: int = 0
    unwatched_bytes: int = 0
    tasks: int = 1
    threads: int = 1
    mappings: int = 0
    lazy: bool = True
    round_trip_ms: float | None = None
    pace: float = 1.0
    busy: float = 0.0
    is_kept: bool = False

    @property
    def private_bytes(self) -> int:
        """What is not shared."""
        return max(self.memory_bytes - self.shared_bytes, 0)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The downtime if frozen now, by the parts of `core/downtime.py` (ms)."""

    freeze_ms: float
    dump_ms: float
    final_delta_ms: float
    rootfs_ms: float
    restore_ms: float
    handover_ms: float
    resume_ms: float

    @property
    def downtime_ms(self) -> float:
        """The whole."""
        return (
            self.freeze_ms
            + self.dump_ms
            + self.final_delta_ms
            + self.rootfs_ms
            + self.restore_ms
            + self.handover_ms
            + self.resume_ms
        )


def pace(started_cpu_ms: float) -> float:
    """How much longer everything takes here than where the constants were found, by the processor
    time that it took to start the guard (`Freezing.started_cpu_ms`). Not by the time that passed:
    what a container waits for does not wait for processors (`criu_glue/urgency.py`)."""
    ratio = started_cpu_ms / STARTED_CPU_MS
    beyond_noise = max(ratio / PACE_NOISE, min(ratio * PACE_NOISE, 1.0))
    return min(max(beyond_noise, PACE_MIN), PACE_MAX)


def predict(history: History, workload: Workload, remaining_bytes: int) -> Prediction:
    """The downtime if the container were frozen with `remaining_bytes` of memory still to send.

    They are sent while CRIU dumps and count with what they take longer. What the dump itself has
    written, and what nobody watched, is sent after it. The last pass of the root file system has
    no part of its own: on a fast link it ends before all that, on a slow one it is in
    SETTLE_ROUND_TRIPS.
    """
    slower = workload.pace
    round_trip_ms = ROUND_TRIP_MS if workload.round_trip_ms is None else workload.round_trip_ms
    if workload.is_kept:
        dump_ms = slower * _dump_ms(workload)
        kept_ms = max(remaining_bytes / KEPT_BYTES_MS - dump_ms, 0.0)
        return Prediction(slower * FREEZE_MS, dump_ms, kept_ms, 0.0, 0.0, 0.0, slower * RESUME_MS)
    sending_ms = remaining_bytes / history.rate_bytes_ms
    beside_ms = slower * COLLECT_MS + history.overhead_ms + sending_ms
    alone_ms = slower * _dump_ms(workload)
    dump_ms = alone_ms + DUMP_BESIDE * min(sending_ms, alone_ms)
    behind_bytes = workload.shared_bytes + workload.unwatched_bytes
    behind_ms = behind_bytes / history.rate_bytes_ms * (1 - min(workload.busy, BUSY_MAX))
    settle_ms = slower * SETTLE_MS + SETTLE_ROUND_TRIPS * round_trip_ms
    return Prediction(
        freeze_ms=slower * FREEZE_MS,
        dump_ms=dump_ms,
        final_delta_ms=max(beside_ms - dump_ms, 0.0) + behind_ms + settle_ms,
        rootfs_ms=0.0,
        restore_ms=slower * _restore_ms(workload) + RESTORE_ROUND_TRIPS * round_trip_ms,
        handover_ms=slower * HANDOVER_MS + round_trip_ms,
        resume_ms=slower * RESUME_MS,
    )


def _dump_ms(workload: Workload) -> float:
    return (
        DUMP_MS
        + DUMP_MS_PER_THREAD * workload.threads
        + DUMP_MS_PER_TASK * (workload.tasks - 1)
        + DUMP_MS_PER_MAPPING * workload.mappings
        + DUMP_MS_PER_GIB * workload.private_bytes / GIB
        + DUMP_SHARED_MS_PER_GIB * workload.shared_bytes / GIB
    )


def _restore_ms(workload: Workload) -> float:
    eager_bytes = workload.shared_bytes if workload.lazy else workload.memory_bytes
    return (
        RESTORE_MS
        + RESTORE_MS_PER_TASK * (workload.tasks - 1)
        + RESTORE_EAGER_MS_PER_GIB * eager_bytes / GIB
    )
