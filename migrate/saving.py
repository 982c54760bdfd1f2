"""`migrate clone NAME --save DIR`: a container is kept as a checkpoint on disk, and runs on.

    preflight ─ files ─ prepare ─ unplug, freeze, copy its memory, dump, thaw, plug ─ write ─ sign

It stands still while all of its memory is copied into this process's, for which there has to be
room: nothing is tracked. To the journal it is a migration that is undone, as a copy is (decision
0023); the directory is there whole, or not at all when this process has ended in order.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from criu_glue import images
from criu_glue.captured import CapturedPages, page_addresses, page_runs
from criu_glue.mappings import cgroup_pids
from criu_glue.page_sources import TaskSource
from criu_glue.trackers.stop_and_copy import StopAndCopyTracker
from migrate import config
from migrate.capturing import Capturing
from migrate.checkpoint import About, Place
from migrate.cloning import Cloning
from migrate.copies_wanted import Alike, Wanted
from migrate.core.states import SourceState as S
from migrate.driver import quietly
from migrate.errors import PreflightRefused, TransferFailed, UsageError
from migrate.first_steps import make_directory
from migrate.freezing import Freezing
from migrate.host_checks import space_refusals
from migrate.identity import own_identity
from migrate.rootfs import FLAGS, OF_FILES, OF_NAMES, RSYNC_STDERR_BYTES_MAX
from migrate.runtimes.command import DESCRIPTORS_NAME
from migrate.tree_digest import tree_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from criu_glue.core.pagemap import PageRuns
    from criu_glue.page_sources import FinalDelta
    from migrate.capturing import Capture
    from migrate.facts import ContainerFacts
    from migrate.options import Options
    from migrate.progress import Observer
    from migrate.rootfs_snapshot import RootfsSnapshot
    from migrate.runtimes.base import Runtime

# Of the manifest, of runs, and of what a target is told.
_MORE_BYTES = 64 << 20
_MORE_FILES = 1024


@dataclass(frozen=True, slots=True)
class Keep:
    """Where a checkpoint is to be, for whom (a host, or any of the fleet), and for how long."""

    directory: Path
    target: str
    is_for_fleet: bool
    days: float


class Saving(Cloning):
    """See the module. What it has of `Cloning` is how it begins, fails, and ends."""

    def __init__(
        self,
        options: Options,
        keep: Keep,
        runtime: Runtime,
        paths: config.HostPaths,
        observer: Observer,
        migration_id: str,
    ) -> None:
        copy = Wanted(str(keep.directory), 0, options.container, ())
        super().__init__(options, [copy], Alike(), runtime, paths, observer, migration_id)
        self._keep = keep
        self._place = Place(keep.directory)
        self._has_begun = False
        self._is_kept = False

    async def _steps(self) -> None:
        self._enter("preflight")
        facts = await self._first.check((self._keep.target,), is_copied=True)
        await asyncio.to_thread(self._make, facts)
        await self._record(S.PRECOPY, "preflight_passed")
        self._phase = "save"
        rootfs = facts.container.rootfs
        await asyncio.to_thread(_rsync, rootfs, self._place.rootfs, ("--delete",))
        capturing = await self._prepare_capture(facts)
        await asyncio.to_thread(capturing.snapshot.look)
        await asyncio.to_thread(_rsync, rootfs, self._place.rootfs, ("--delete",))
        self._enter("freeze")
        await self._record(S.FROZEN, "target_prepared")
        capture = await capturing.capture()
        self._pause_ms = round(capture.pause_ms, 3)
        await self._record_quietly(S.ROLLING_BACK, "given_back")
        self._enter("save", f"the container stood still for {capture.pause_ms:.0f} ms and runs on")
        await asyncio.to_thread(self._write, facts, capture, capturing.snapshot)
        self._is_kept = True
        await quietly(self._begun.entry.note(copied=self._options.container))
        self._enter("saved", f"in {self._keep.directory}")

    def _make(self, facts: ContainerFacts) -> None:
        directory = self._keep.directory
        if os.path.lexists(directory):
            raise UsageError(f"{directory} exists already", remedy="name one that does not")
        needed = facts.memory_bytes + facts.shared_bytes + facts.rootfs_bytes + _MORE_BYTES
        refusals = space_refusals(directory.parent, needed, _MORE_FILES)
        if refusals:
            raise PreflightRefused(refusals, host=self._host)
        self._has_begun = True
        self._place.make()
        make_directory(self._directory, facts, more_bytes=config.SNAPSHOT_BYTES_MAX)

    async def _prepare_capture(self, facts: ContainerFacts) -> Capturing:
        container = facts.container
        self._freezing = Freezing(
            container, self._runtime, facts.network, self._directory, self._host
        )
        plan = await self._freezing.prepare(self._migration_id, self._paths, parent=None)
        await self._begun.entry.note(
            guard=msgspec.to_builtins(plan),
            network=msgspec.to_builtins(facts.network_handle),
            bundle=str(container.bundle),
        )
        return Capturing(_Still(facts, self._first.warn), self._freezing, self._directory)

    def _write(self, facts: ContainerFacts, capture: Capture, snapshot: RootfsSnapshot) -> None:
        assert self._freezing is not None
        place, keep = self._place, self._keep
        place.keep(capture.pages)
        for one in images.image_files(self._freezing.image_dir):
            if one.name != DESCRIPTORS_NAME:
                shutil.copyfile(one.path, place.images / one.name)
        snapshot.fill()
        names = b"\0".join(os.fsencode(name) for name in snapshot.changed)
        _rsync(snapshot.copy, place.rootfs, OF_FILES, names)
        _rsync(snapshot.copy, place.rootfs, OF_NAMES)
        about = About(
            self._first.request(facts, self._begun.entry),
            facts.container.descriptors,
            capture.confinement,
            tree_digest(place.rootfs),
        )
        place.seal(
            about,
            own_identity(self._paths),
            keep.target,
            days=keep.days,
            is_for_fleet=keep.is_for_fleet,
        )

    async def _close(self) -> None:
        await super()._close()
        if self._has_begun and not self._is_kept:
            await asyncio.to_thread(shutil.rmtree, self._keep.directory, ignore_errors=True)


class _Still:
    """A container whose memory is read when it stands still, and not before."""

    def __init__(self, facts: ContainerFacts, warn: Callable[[str], None]) -> None:
        self.facts = facts
        self.warn = warn
        tracker = StopAndCopyTracker(partial(cgroup_pids, facts.container.cgroup))
        self._pages = TaskSource(tracker)
        self._captured: dict[int, list[PageRuns]] = {}

    @property
    def memory(self) -> _Still:
        """Itself: see `capturing.FrozenMemory`."""
        return self

    def final_delta(self) -> FinalDelta:
        """All of it."""
        return self._pages.final()

    def capture(self, runs: Sequence[tuple[int, PageRuns]], limit_bytes: int) -> CapturedPages:
        """Raises LimitExceededError."""
        for task, of_task in runs:
            self._captured.setdefault(task, []).append(of_task)
        return CapturedPages.of(self._pages, runs, limit_bytes)

    def undelivered(self, needed: Mapping[int, PageRuns]) -> list[tuple[int, PageRuns]]:
        """Of these pages, those that were not captured."""
        missing = []
        for task, runs in needed.items():
            captured = [page_addresses(one) for one in self._captured.get(task, [])]
            had = np.concatenate([*captured, np.empty(0, np.uint64)])
            left = np.setdiff1d(page_addresses(runs), had)
            if len(left):
                missing.append((task, page_runs(left)))
        return missing


def _rsync(source: Path, target: Path, options: Sequence[str], names: bytes | None = None) -> None:
    """Make of one directory what the other is. Blocking. Raises TransferFailed."""
    done = subprocess.run(
        ["rsync", *FLAGS, *options, f"{source}/", f"{target}/"],
        input=names if names is not None else b"",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    # 24: a file has vanished meanwhile.
    if done.returncode not in (0, 24):
        words = done.stderr[-RSYNC_STDERR_BYTES_MAX:].decode("utf-8", "replace").strip()
        raise TransferFailed(f"the root file system can't be kept: {words}", phase="save")
