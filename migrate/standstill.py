"""What happens while the container stands still: freeze, dump, final delta, images, last files.

    unplug ─ freeze ─┬─ collect ─ (code pages) ─ CRIU dumps ──────────────┬─ images sent ─ restore …
                     ├─ final delta is read and sent beside CRIU ─────────┤
                     └─ last pass of rsync, which waited at its gate ─────┘

Pages of executable mappings are sent before CRIU starts, the others beside it: see
`criu_glue/page_sources.py`. With the tracker `predump` the final delta is what CRIU dumps, and is
sent when it is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from criu_glue import images
from criu_glue.mappings import cgroup_pids
from migrate import config, confinement
from migrate.core import messages
from migrate.errors import DumpFailed
from migrate.rootfs import shared_file_mappings
from migrate.runtimes.command import DESCRIPTORS_NAME

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from criu_glue.core.pagemap import PageRuns
    from migrate.copying import Copying
    from migrate.core.confinement import Confinements
    from migrate.core.manifest import SignedManifest
    from migrate.freezing import Freezing
    from migrate.precopy import MemorySource
    from migrate.report import ReportBuilder
    from migrate.rootfs import RootfsPassRun
    from migrate.runtimes.base import Container
    from transport.core.transcript import Carried
    from transport.sender import RoundStats


class Standstill:
    """See the module: `freeze_and_dump`, then `send_final`. `marks` are the instants (µs).

    `seal` makes the signed manifest of what was sent.
    """

    def __init__(
        self,
        copying: Copying,
        freezing: Freezing,
        report: ReportBuilder,
        seal: Callable[[Carried], SignedManifest],
    ) -> None:
        self._seal = seal
        self._copying = copying
        self._freezing = freezing
        self._report = report
        self._sending: asyncio.Task[RoundStats] | None = None
        self._confining: asyncio.Task[Confinements] | None = None
        self._passes: list[RootfsPassRun] = []
        self.marks: dict[str, int] = {}

    async def freeze_and_dump(self) -> None:
        """Returns when CRIU's dump is complete and held, the sending being under way."""
        memory = self._copying.memory
        final_rootfs = self._copying.final_rootfs
        assert final_rootfs is not None
        self.marks |= await self._freezing.freeze()
        await asyncio.to_thread(check_tree, self._copying.facts.container)
        final_rootfs.release()
        delta = await asyncio.to_thread(memory.final_delta)
        if delta.code:
            self._report.add_round(await asyncio.to_thread(memory.send, delta.code))
        await self._freezing.start_dump()
        if delta.rest:
            self._sending = asyncio.create_task(asyncio.to_thread(memory.send, delta.rest))
            self._sending.add_done_callback(_heard_later)
        # While CRIU works: it changes nothing of this.
        cgroup = self._copying.facts.container.cgroup
        self._confining = asyncio.create_task(asyncio.to_thread(confinement.read, cgroup))
        self._confining.add_done_callback(_heard_later)
        self._passes = [final_rootfs, *self._recheck_mapped_files(after=final_rootfs)]
        self.marks["dumped"] = await self._freezing.dumped()

    async def send_final(self) -> messages.Restore:
        """Send what is left; returns the request for the restore, signed."""
        assert self._confining is not None
        memory, image_dir = self._copying.memory, self._freezing.image_dir
        if self._sending is not None:
            self._report.add_round(await self._sending)
        if (dumped := await asyncio.to_thread(memory.send_dumped, image_dir)) is not None:
            self._report.add_round(dumped)
        sending = asyncio.create_task(asyncio.to_thread(send_images, memory, image_dir))
        sending.add_done_callback(_heard_later)
        stored = await asyncio.to_thread(images.store_ranges, image_dir)
        tell_slow_dump(self._copying.warn, self._freezing.why_slow, stored)
        missing = memory.undelivered(stored)
        if missing:
            # Pages that CRIU knows and the tracker never reported; without this they would be zeros
            # on the target.
            self._report.add_round(await asyncio.to_thread(memory.send, missing))
        self.marks["final_acked"] = time.monotonic_ns() // 1000
        self._report.add_images(await sending)
        passes = [await run.wait(config.ROOTFS_FROZEN_DEADLINE_S) for run in self._passes]
        self.marks["rootfs_done"] = max(one.ended_us for one in passes)
        signed = self._seal(await self._copying.carried())
        return restore_request(signed, stored, await self._confining)

    def _recheck_mapped_files(self, *, after: RootfsPassRun) -> list[RootfsPassRun]:
        """A pass over files that are written through mappings: compared by content.

        It waits at its gate for the other one, which would delete its temporary files.
        """
        files = mapped_files(self._copying.facts.container)
        if not files:
            return []
        recheck = self._copying.rootfs.start(gated=True, files=files)
        recheck.release_after(after)
        return [recheck]


def check_tree(container: Container) -> None:
    """CRIU dumps the children of the init and silently loses other tasks of the cgroup: those of
    `runc exec`, whose parent is outside. Preflight has refused the ones that it saw."""
    pids = set(cgroup_pids(container.cgroup))
    for pid in pids - {container.pid}:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(status.partition("PPid:")[2].split()[0]) not in pids:
            raise DumpFailed(
                f"task {pid} of {container.name} was started from outside (runc exec),"
                " and would be lost",
                remedy="wait for it, or end it, and try again",
            )


def mapped_files(container: Container) -> list[str]:
    """Files of the root, relative to it, that tasks map shared and writable."""
    mapped: set[str] = set()
    for pid in cgroup_pids(container.cgroup):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            mapped |= shared_file_mappings(Path(f"/proc/{pid}/maps").read_bytes())
    names = (name.lstrip("/") for name in sorted(mapped))
    return [name for name in names if (container.rootfs / name).is_file()]


def tell_slow_dump(
    warn: Callable[[str], None], why_slow: str, stored: Mapping[int, PageRuns]
) -> None:
    """A dump that has not left all memory alone is right, but slow. One that is lazy only leaves no
    page of a task out when a stack pointer of it lies at the begin of a page (CRIU 4.2,
    `criu/mem.c: is_stack` compares the wrong bits)."""
    if why_slow:
        warn(
            "CRIU took hold of all memory while the container stood still, which takes it longer"
            f" the more there is: {why_slow}"
        )
    written = sorted(task for task, runs in stored.items() if not len(runs))
    if written:
        warn(
            f"CRIU wrote all memory of the tasks {written} itself while the container stood"
            " still, which it does when a stack pointer lies at the begin of a page"
        )


def send_images(memory: MemorySource, image_dir: Path) -> RoundStats:
    """Send CRIU's image files. Blocking."""
    # The target's runtime has been given the descriptors before it was started.
    found = [one for one in images.image_files(image_dir) if one.name != DESCRIPTORS_NAME]
    return memory.sender.send_files([(one.name, one.path) for one in found])


def restore_request(
    signed: SignedManifest, stored: Mapping[int, PageRuns], confinement: Confinements
) -> messages.Restore:
    """The request for a restore of what the manifest names."""
    return messages.Restore(
        manifest=signed.manifest,
        signature=signed.signature,
        certificate=signed.certificate,
        lazy_pages=sum(int(runs[:, 1].sum()) for runs in stored.values()),
        confinement=confinement,
    )


def _heard_later(ended: asyncio.Task[object]) -> None:
    """A failure is heard by `send_final`, unless something else fails before."""
    if not ended.cancelled():
        ended.exception()
