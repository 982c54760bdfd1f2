"""Copying while the container runs: root file system, rounds of memory, and when to stop.

    start        tracker chosen, streams open
    copy_rootfs  one pass of rsync
    run_round    one round of memory -> the decision of core/convergence.py, what follows from it by
                 core/throttling.py, and the brake pulled where that is wanted
    make_ready   the last rsync waits at its gate, last rounds keep the final delta small

Nothing is frozen here, and nothing here changes the container but how fast it runs.
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from migrate import config, progress, tracking
from migrate.core import convergence, throttling
from migrate.core.rounds_seen import History
from migrate.errors import MigrateError
from migrate.precopy import MemorySource
from migrate.rootfs import RootfsSource
from migrate.throttle import used_s
from migrate.told_rate import ToldRate
from transport import tls
from transport.fan import Outlet
from transport.sender import PageSender, default_streams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from migrate.core.clock_relation import ClockRelation
    from migrate.core.prediction import Workload
    from migrate.facts import ContainerFacts
    from migrate.options import Options
    from migrate.precopy import Sender
    from migrate.progress import Observer
    from migrate.report import ReportBuilder
    from migrate.rootfs import RootfsPass, RootfsPassRun
    from migrate.runtimes.base import Runtime
    from migrate.target_link import TargetLink
    from migrate.throttle import Throttle
    from transport.core.transcript import Carried
    from transport.errors import TransportError
    from transport.sender import RoundStats
    from transport.worker import ReadPages

PROGRESS_PERIOD_S = 0.2
# While both sides have made ready the container has written on, for longer than in a round before.
# Each round of these is shorter than the one before, or the next one ends it.
LAST_ROUNDS_MAX = 4
# After so many in all the container's writes were observed twice: fewer say too much of them.
ROUNDS_TELLING = 3
# After so long no other is begun: the target waits for the freeze (config.PREPARE_DEADLINE_S).
LAST_ROUNDS_S = 10.0


class Rounds:
    """A container's memory, in rounds, to one target or to several at once. See the module. One
    event loop; what blocks runs in threads. `close` it in any case.

    `links` have their sessions opened. `lost` hears, in the event loop, of a target that the
    streams can't reach any more while there are others.
    """

    # Whether what is written last is kept on this host while the container stands still.
    _is_kept = True

    def __init__(
        self,
        facts: ContainerFacts,
        options: Options,
        links: Sequence[TargetLink],
        session: Path,
        host: str,
        observer: Observer,
        report: ReportBuilder,
        throttle: Throttle,
        lost: Callable[[TargetLink, TransportError], None] = lambda *_: None,
    ) -> None:
        self.facts = facts
        self._options = options
        self._links = links
        self._session = session
        self._host = host
        self._observer = observer
        self._report = report
        self._throttle = throttle
        self._lost = lost
        self._throttling = throttling.Throttling()
        self._limits = convergence.Limits(options.max_downtime_ms, options.rounds_max)
        self._history = History()
        self._round_ended_s = time.monotonic()
        # Since when, and with how much processor time of the container before, it is copied.
        self._begun = (time.monotonic(), used_s(facts.container.cgroup))
        # How slow this host is, as far as it is known (`prediction.py: pace`).
        self.pace = 1.0
        self.clocks: ClockRelation | None = None
        self._memory: MemorySource | None = None
        self._sender: PageSender | None = None
        # How many bytes a second may leave.
        self.rate = ToldRate(options.bandwidth_told, options.bandwidth_bytes_s)

    @property
    def memory(self) -> MemorySource:
        """The rounds' memory; there is one from `start` on."""
        assert self._memory is not None
        return self._memory

    @property
    def has_rounds(self) -> bool:
        """Whether the tracker tells pages apart; without, all memory is copied in the freeze."""
        return self.memory.pages.name != tracking.NONE

    async def start(self, runtime: Runtime, migration_id: str) -> None:
        """Choose the tracker and open the streams; the report and the observer hear of it."""
        choice = await asyncio.to_thread(tracking.choose, self._options, self.facts, self._host)
        if choice.warning:
            self.warn(choice.warning)
        if choice.stills:
            await self._throttle.may_still()
        pages = await asyncio.to_thread(
            tracking.page_source, choice, self.facts, runtime, self._session, self._throttle
        )
        self._memory = MemorySource(pages, self._make_sender, self._throttle.paused)
        await asyncio.to_thread(self._memory.sender.connect)
        self._report.tracker_reason = choice.reason
        self._report.stills_ms = self._throttle.stills_ms
        self._tell_started(choice.name, migration_id)

    async def run_round(self) -> throttling.Reaction:
        """One round, and what follows from it; the container is slowed already where that does."""
        begun_s = time.monotonic()
        stats = await self._watched_round()
        decision = self._decide(stats, begun_s)
        self._tell_round(stats, decision)
        reaction = throttling.react(self._throttling, decision, self._options.on_stall)
        if reaction.act is throttling.Act.THROTTLE:
            return await self._slow(reaction)
        if reaction.is_exhausted:
            self.warn(f"the container could not be slowed any more: {reaction.reason}")
        self._throttling = reaction.throttling
        return reaction

    async def last_rounds(self) -> None:
        """Short rounds that keep the final delta small: one, and more until the container's writes
        are known and while they bring the downtime down to what is allowed, or to what it takes at
        least. What is predicted then is what the report says."""
        limit_s = time.monotonic() + LAST_ROUNDS_S
        for _ in range(LAST_ROUNDS_MAX if self.has_rounds else 0):
            begun_s = time.monotonic()
            decision = self._decide(await asyncio.to_thread(self.memory.round), begun_s)
            is_known = len(self._history.rounds) >= ROUNDS_TELLING
            is_best = decision.is_good_enough or decision.verdict is convergence.Verdict.STALLED
            if (is_known and is_best) or time.monotonic() > limit_s:
                break
        await asyncio.to_thread(self.memory.sender.connect)

    def abort(self) -> None:
        """Make everything that is under way fail soon."""
        if self._memory is not None:
            self._memory.sender.abort()

    async def close(self) -> None:
        """Give the tasks back untouched and end the streams. Idempotent."""
        if self._memory is not None:
            await asyncio.to_thread(self._memory.close)

    def _decide(self, stats: RoundStats, begun_s: float) -> convergence.Decision:
        """What a round has come to that began, and was to be collected, at `begun_s`."""
        self._history.add(stats, wait_ms=1000 * (begun_s - self._round_ended_s))
        self._round_ended_s = time.monotonic()
        self._report.add_round(stats)
        decision = convergence.decide(self._history, self._workload(), self._limits)
        self._report.add_decision(decision)
        return decision

    async def _slow(self, reaction: throttling.Reaction) -> throttling.Reaction:
        """Pull the brake. Where that is impossible it is frozen as it is: a stall does not end by
        itself."""
        share = reaction.throttling.share
        try:
            brake = await self._throttle.slow(share)
        except MigrateError as error:
            self.warn(error.message)
            return replace(reaction, act=throttling.Act.FREEZE)
        self._throttling = reaction.throttling
        self._report.add_throttle(share, brake)
        self._observer.tell(progress.Throttled(round(100 * share, 1), brake, reaction.reason))
        return reaction

    def leave_out(self, link: TargetLink) -> None:
        """Send nothing more to this target, there being others."""
        if self._sender is not None:
            self._sender.leave_out(self._links.index(link))

    async def carried(self) -> Carried:
        """All that was sent."""
        assert self._sender is not None
        return await asyncio.to_thread(self._sender.carried)

    def _tell_started(self, tracker: str, migration_id: str) -> None:
        options = self._options
        self._report.tracker = tracker
        self._observer.tell(
            progress.Started(
                migration_id,
                options.container,
                self._host,
                options.target,
                tracker,
                options.restore,
                self.facts.memory_bytes,
            )
        )

    def _make_sender(self, read: ReadPages) -> Sender:
        self._sender = PageSender(
            [self._outlet(link) for link in self._links],
            read=read,
            streams=self._options.streams or default_streams(),
            patience_s=self._options.link_patience_s,
            rate=self.rate,
        )
        return self._sender

    def _outlet(self, link: TargetLink) -> Outlet:
        opened, loop = link.opened, asyncio.get_running_loop()
        assert opened is not None

        def lost(error: TransportError) -> None:
            loop.call_soon_threadsafe(self._lost, link, error)

        address, port = link.way.to(link.host, opened.data_port)
        return Outlet(
            lambda _: tls.connect(address, port, link.context, server_name=opened.host),
            bytes.fromhex(opened.ticket),
            lost,
        )

    async def _watched_round(self) -> RoundStats:
        """A round in a thread, with its progress told while it runs."""
        memory = self.memory
        before, started_s = memory.sender.progress.bytes_raw, time.monotonic()
        running = asyncio.create_task(asyncio.to_thread(memory.round))
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=PROGRESS_PERIOD_S)
                done_bytes = memory.sender.progress.bytes_raw - before
                rate_bytes_s = done_bytes / max(time.monotonic() - started_s, 0.001)
                self._observer.tell(
                    progress.RoundProgress(
                        memory.rounds, done_bytes, memory.round_bytes_total, rate_bytes_s
                    )
                )
        except asyncio.CancelledError:
            memory.sender.abort()
            # Its own failure is a consequence of that, and nobody's concern.
            await asyncio.gather(running, return_exceptions=True)
            raise
        return running.result()

    def _workload(self) -> Workload:
        assert self.clocks is not None
        return replace(
            self.facts.workload(lazy=self._options.restore == "lazy"),
            round_trip_ms=2 * self.clocks.error_us / 1000,
            pace=self.pace,
            busy=self._busy(),
            is_kept=self._is_kept,
        )

    def _busy(self) -> float:
        """The share of this host's processors that the container has had while it was copied."""
        begun_s, used_before_s = self._begun
        had_s = used_s(self.facts.container.cgroup) - used_before_s
        passed_s = max(time.monotonic() - begun_s, 0.001)
        return min(max(had_s / passed_s / len(os.sched_getaffinity(0)), 0.0), 1.0)

    def _tell_round(self, stats: RoundStats, decision: convergence.Decision) -> None:
        self._observer.tell(
            progress.RoundEnded(
                number=stats.number,
                pages=stats.pages,
                bytes_raw=stats.bytes_raw,
                bytes_sent=stats.bytes_sent,
                duration_ms=stats.duration_ms,
                rate_bytes_s=stats.bytes_raw / max(stats.duration_ms, 0.1) * 1000,
                dirty_rate_bytes_s=decision.dirty_rate_bytes_s,
                remaining_bytes=decision.remaining_bytes,
                predicted_downtime_ms=decision.predicted_downtime_ms,
                decision=str(decision.verdict),
            )
        )

    def warn(self, message: str) -> None:
        """Tell and report something that the user should know."""
        self._report.warn(message)
        self._observer.tell(progress.Warned(message))


class Copying(Rounds):
    """The same for a migration: one target, with the root file system."""

    _is_kept = False

    def __init__(
        self,
        facts: ContainerFacts,
        options: Options,
        link: TargetLink,
        session: Path,
        host: str,
        observer: Observer,
        report: ReportBuilder,
        throttle: Throttle,
    ) -> None:
        super().__init__(facts, options, [link], session, host, observer, report, throttle)
        self.rootfs = rootfs_source(facts, options, link, session, host, self.rate)
        self.final_rootfs: RootfsPassRun | None = None

    async def copy_rootfs(self) -> None:
        """A pass over the root file system while the container runs."""
        self._observer.tell(told_pass(await self.rootfs.start(gated=False).wait()))

    async def make_ready(self) -> None:
        """Everything that can be done before the freeze, and then short rounds."""
        self.rate.hold()
        self.final_rootfs = self.rootfs.start(gated=True)
        # A break of the link is waited for within it.
        deadline_s = config.PREPARE_DEADLINE_S + self._options.link_patience_s
        await self.final_rootfs.wait_ready(deadline_s)
        await self.last_rounds()

    def abort(self) -> None:
        """Make everything that is under way fail soon."""
        super().abort()
        self.rootfs.cancel()


def rootfs_source(
    facts: ContainerFacts,
    options: Options,
    link: TargetLink,
    work: Path,
    host: str,
    rate: Callable[[], float],
) -> RootfsSource:
    """The container's root file system on its way from `host` to one target; `work` is a directory
    for that alone. rate: how many bytes a second may leave."""
    return RootfsSource(
        facts.container.rootfs,
        work,
        link.rootfs_channel,
        host=host,
        target=link.host,
        patience_s=options.link_patience_s,
        silence_s=options.silence_s,
        rate=rate,
    )


def told_pass(done: RootfsPass) -> progress.Phase:
    """What is told of a pass over the root file system."""
    detail = f"{progress.mib(done.bytes_sent)} sent in {done.duration_ms / 1000:.2f} s"
    return progress.Phase("rootfs", detail)
