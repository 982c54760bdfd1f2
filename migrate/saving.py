"""`migrate clone NAME --save DIR`: a container is kept as a checkpoint on disk, and runs on.

It is a copy whose target is a directory: the same rounds, freeze and end (`duplicating.py`), with
memory written down in place of sent (`memory_writer.py`), files copied by rsync on this host, and a
signature in place of a restore. The directory has its name when that is there, and nothing remains
of one that is not finished (`unfinished.py`).
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from criu_glue import images
from migrate import config, unfinished
from migrate.checkpoint import About, Place
from migrate.copies_wanted import Wanted
from migrate.copying import Rounds
from migrate.core.states import SourceState as S
from migrate.driver import quietly
from migrate.duplicating import Duplicating
from migrate.errors import PreflightRefused, TransferFailed, UsageError, remedy_of
from migrate.host_checks import space_refusals
from migrate.identity import own_identity
from migrate.memory_writer import MemoryWriter
from migrate.rootfs import OF_FILES, OF_NAMES, RSYNC_DONE, run_rsync
from migrate.tree_digest import tree_digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from migrate.core.confinement import Confinements
    from migrate.facts import ContainerFacts
    from migrate.options import Options
    from migrate.precopy import Sender
    from migrate.progress import Observer
    from migrate.rootfs_snapshot import RootfsSnapshot
    from migrate.runtimes.base import Runtime
    from transport.worker import ReadPages

# Of the manifest, of runs, and of what a target is told.
_MORE_BYTES = 64 << 20
_MORE_FILES = 1024
_SEE_SPACE = "see how much is free there (df, df -i)"


@dataclass(frozen=True, slots=True)
class Keep:
    """Where a checkpoint is to be, for whom (a host, or any of the fleet), and for how long."""

    directory: Path
    target: str
    is_for_fleet: bool
    days: float


class Saving(Duplicating):
    """See the module."""

    _written: _WrittenRounds

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
        super().__init__(options, [copy], runtime, paths, observer, migration_id)
        self._keep = keep
        self._place = Place(unfinished.path_for(keep.directory, migration_id))

    @property
    def _targets(self) -> tuple[str, ...]:
        return (self._keep.target,)

    async def _open(self, facts: ContainerFacts) -> None:
        """Make the directory."""
        await asyncio.to_thread(self._check_room, facts)
        await self._record(S.PRECOPY, "preflight_passed")
        await self._begun.entry.note(unfinished=str(self._place.directory))
        await asyncio.to_thread(self._place.make)

    def _check_room(self, facts: ContainerFacts) -> None:
        directory = self._keep.directory
        if os.path.lexists(directory):
            raise UsageError(f"{directory} exists already", remedy="name one that does not")
        needed = facts.memory_bytes + facts.shared_bytes + facts.rootfs_bytes + _MORE_BYTES
        refusals = space_refusals(directory.parent, needed, _MORE_FILES)
        if refusals:
            raise PreflightRefused(refusals, host=self._host)

    def _new_rounds(self, *given: Any) -> Rounds:
        self._written = _WrittenRounds(self._place, *given)
        return self._written

    async def _copy_rootfs(self) -> None:
        await self._rsync(self._written.facts.container.rootfs, ("--delete",))

    async def _prepare_targets(self, descriptors: tuple[str, str, str]) -> None:
        self._enter("prepare")

    async def _send_snapshot(self, snapshot: RootfsSnapshot) -> None:
        await self._rsync(snapshot.copy, OF_FILES, snapshot.changed)
        await self._rsync(snapshot.copy, OF_NAMES)

    async def _rsync(
        self, source: Path, options: Sequence[str], files: Sequence[str] | None = None
    ) -> None:
        """Make of the directory's files what those of `source` are."""
        status, words = await run_rsync(options, source, str(self._place.rootfs), files)
        if status not in RSYNC_DONE:
            raise TransferFailed(
                f"the root file system can't be kept in {self._place.directory}: {words}",
                remedy=_SEE_SPACE,
            )

    async def _finish(self, rounds: Rounds, image_dir: Path, confinement: Confinements) -> None:
        self._enter("sign")
        try:
            await asyncio.to_thread(self._seal, image_dir, confinement)
        except OSError as error:
            raise TransferFailed(
                f"{self._place.directory} can't be written: {error}",
                remedy=remedy_of(error) or _SEE_SPACE,
            ) from error
        # Whoever cancels it from here on is too late.
        self._is_given = True
        await asyncio.to_thread(self._place.directory.rename, self._keep.directory)
        await quietly(self._begun.entry.note(copied=self._options.container))
        self._enter("saved", f"in {self._keep.directory}")

    def _seal(self, image_dir: Path, confinement: Confinements) -> None:
        facts, keep, place = self._written.facts, self._keep, self._place
        self._written.writer.finish(images.store_ranges(image_dir))
        about = About(
            self._first.request(facts, self._begun.entry),
            facts.container.descriptors,
            confinement,
            tree_digest(place.rootfs),
        )
        place.seal(
            about,
            own_identity(self._paths),
            keep.target,
            days=keep.days,
            is_for_fleet=keep.is_for_fleet,
        )

    def _wipe(self) -> None:
        super()._wipe()
        unfinished.discard(self._place.directory, self._migration_id)


class _WrittenRounds(Rounds):
    """Rounds into a directory."""

    writer: MemoryWriter

    def __init__(self, place: Place, *given: Any) -> None:
        super().__init__(*given)
        self._place = place

    def _make_sender(self, read: ReadPages) -> Sender:
        self.writer = MemoryWriter(self._place, read, self._options.bandwidth_bytes_s)
        return self.writer
