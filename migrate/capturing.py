"""What happens while a container that is copied stands still: all that its copies need is kept.

    unplug ─ freeze ─┬─ collect ─ (code pages) ─ CRIU dumps ─ (pages that nobody reported) ─┬─ thaw
                     ├─ final delta is copied beside CRIU ──────────────────────────────────┤
                     └─ what changed of the root file system is copied ─────────────────────┘

Nothing is sent, and nobody else is waited for. `send` sends when the container runs again. The same
order as in `standstill.py`, which says why pages of code come first.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from criu_glue import images
from migrate import config, confinement
from migrate.facts import free_memory_bytes
from migrate.rootfs_snapshot import RootfsSnapshot
from migrate.standstill import check_tree, mapped_files, send_images, tell_slow_dump

if TYPE_CHECKING:
    from pathlib import Path

    from criu_glue.captured import CapturedPages
    from criu_glue.core.pagemap import PageRuns
    from migrate.copying import Rounds
    from migrate.core.confinement import Confinements
    from migrate.freezing import Freezing
    from migrate.precopy import MemorySource
    from migrate.report import ReportBuilder


@dataclass(frozen=True, slots=True)
class Capture:
    """What was kept. pages: in the order in which they have to be sent, so that the last one of a
    page counts. pause_ms: how long the container stood."""

    pages: tuple[CapturedPages, ...]
    confinement: Confinements
    pause_ms: float


class Capturing:
    """See the module: `look`, then `capture`."""

    def __init__(self, rounds: Rounds, freezing: Freezing, session: Path) -> None:
        self._rounds = rounds
        self._freezing = freezing
        self._room_bytes = 0
        self.snapshot = RootfsSnapshot(
            rounds.facts.container.rootfs, session / "rootfs", config.SNAPSHOT_BYTES_MAX
        )

    async def look(self) -> None:
        """Before the last pass over the root file system."""
        await asyncio.to_thread(self.snapshot.look)

    async def capture(self) -> Capture:
        """Freeze, keep everything, and let the container run on."""
        self._room_bytes = free_memory_bytes() // 2
        container, memory = self._rounds.facts.container, self._rounds.memory
        marks = await self._freezing.freeze()
        await asyncio.to_thread(check_tree, container)
        files = asyncio.create_task(asyncio.to_thread(self._take_files))
        try:
            delta = await asyncio.to_thread(memory.final_delta)
            code = await self._keep(delta.code)
            await self._freezing.start_dump()
            # While CRIU works: it changes nothing of this.
            rest = await self._keep(delta.rest)
            held_back = await asyncio.to_thread(confinement.read, container.cgroup)
            await self._freezing.dumped()
            stored = await asyncio.to_thread(images.store_ranges, self._freezing.image_dir)
            # Pages that CRIU knows and the tracker never reported; what of them is in the delta is
            # sent behind them.
            missing = await self._keep(memory.undelivered(stored))
            await files
        finally:
            # It reads what is to stand still, and writes where all is removed soon.
            await asyncio.wait({files})
        await self._freezing.undo()
        assert self._freezing.given_back_us is not None
        pause_ms = (self._freezing.given_back_us - marks["unplug"]) / 1000
        tell_slow_dump(self._rounds.warn, self._freezing.why_slow, stored)
        return Capture((missing, rest, code), held_back, pause_ms)

    def _take_files(self) -> None:
        self.snapshot.take(mapped_files(self._rounds.facts.container))

    async def _keep(self, runs: list[tuple[int, PageRuns]]) -> CapturedPages:
        kept = await asyncio.to_thread(self._rounds.memory.capture, runs, self._room_bytes)
        self._room_bytes -= kept.size_bytes
        return kept


async def send(
    capture: Capture,
    snapshot: RootfsSnapshot,
    memory: MemorySource,
    image_dir: Path,
    report: ReportBuilder,
) -> None:
    """Send memory and images, to all targets; the files are ready in `snapshot` then."""
    if (dumped := await asyncio.to_thread(memory.send_dumped, image_dir)) is not None:
        report.add_round(dumped)
    for pages in capture.pages:
        if pages.runs:
            report.add_round(await asyncio.to_thread(memory.send_captured, pages))
    report.add_images(await asyncio.to_thread(send_images, memory, image_dir))
    await asyncio.to_thread(snapshot.fill)
