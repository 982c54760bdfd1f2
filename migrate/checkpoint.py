"""A checkpoint that is kept: a container as it was at one moment, in a directory of its own.

    DIR/                    0700, root's
        manifest.json       signed by the host that made it, over everything else here
        images/             CRIU's
        memory/
            TASK.runs       page runs of a task: address u64, pages u64, little endian
            TASK.pages      the content of these pages, one after the other
            checkpoint.json what a target is told besides: the request, descriptors, confinement,
                            and the hash of the root file system
            config.json     of the request
        rootfs/             the container's root

Nothing is believed before all of it has been compared with what was signed: every file by its hash,
the root file system as one tree, no file more and none less. The manifest says how long it holds,
and whether one host or every host of the fleet may have it. Blocking.
"""

from __future__ import annotations

import itertools
import os
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from criu_glue.captured import page_addresses, page_runs
from criu_glue.kernel import PAGE_BYTES
from migrate import signing
from migrate.core import manifest as manifests
from migrate.core.confinement import Confinements
from migrate.core.manifest import Digest, Manifest, StoredMemory
from migrate.core.messages import MAX_MESSAGE_BYTES, OpenSession, Text
from migrate.errors import CheckpointRefused
from migrate.tree_digest import tree_digest

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from criu_glue.core.pagemap import PageRuns
    from migrate.signing import Signed, Signer
    from transport.identity import IdentityPaths

ABOUT_NAME: Final = "checkpoint.json"
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
# Two messages: a request, and what confines the tasks.
_ABOUT_BYTES_MAX: Final = 2 * MAX_MESSAGE_BYTES


class About(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a target is told of the container besides its files. request: as the container's own
    host would open a session for it. rootfs: `tree_digest`."""

    request: OpenSession
    descriptors: tuple[Text, Text, Text]
    confinement: Confinements
    rootfs: Digest


_ABOUT: Final = msgspec.json.Decoder(About)


@dataclass(frozen=True, slots=True)
class Place:
    """The directory of a checkpoint."""

    directory: Path

    @property
    def manifest(self) -> Path:
        """What the other files are compared with."""
        return self.directory / signing.MANIFEST_NAME

    @property
    def images(self) -> Path:
        """CRIU's images."""
        return self.directory / "images"

    @property
    def memory(self) -> Path:
        """The memory of tasks, and `About`."""
        return self.directory / "memory"

    @property
    def rootfs(self) -> Path:
        """The container's root."""
        return self.directory / "rootfs"

    def make(self) -> None:
        """Make the directories, of which there is none yet. Raises OSError."""
        self.directory.mkdir(mode=0o700)
        for part in (self.images, self.memory):
            part.mkdir(mode=0o700)

    def seal(
        self, about: About, signer: Signer, target: str, *, days: float, is_for_fleet: bool
    ) -> Manifest:
        """The last act: sign all that is there. Raises CheckpointRefused, OSError."""
        (self.memory / ABOUT_NAME).write_bytes(msgspec.json.encode(about))
        (self.memory / "config.json").write_text(about.request.config_json)
        request, now_s = about.request, int(time.time())
        manifest = Manifest(
            migration_id=request.migration_id,
            container=request.container,
            epoch=request.attempt,
            source=request.host,
            target=target,
            created_s=now_s,
            expires_s=now_s + int(days * manifests.DAY_S),
            versions=request.versions,
            protocol=request.protocol,
            files=tuple(signing.hashed_images(self.images)),
            memory=StoredMemory(tuple(signing.hashed_images(self.memory)), is_for_fleet),
        )
        signing.store(self.manifest, signing.sealed(manifest, signer))
        return manifest


@dataclass(frozen=True, slots=True)
class Kept:
    """A checkpoint whose every byte has been compared with what was signed."""

    place: Place
    signed: Signed
    about: About

    @property
    def manifest(self) -> Manifest:
        """What was signed."""
        return self.signed.manifest

    def check_for(self, target: str, now_s: float) -> None:
        """That `target` may have it, now. Raises CheckpointRefused."""
        manifests.check_time(self.manifest, now_s)
        memory = self.manifest.memory
        is_for_fleet = isinstance(memory, StoredMemory) and memory.is_for_fleet
        if not is_for_fleet and self.manifest.target != target:
            raise CheckpointRefused(
                f"the checkpoint is for {self.manifest.target} alone, not for {target}",
                remedy="save one for it: --for HOST, or --for fleet",
            )


def opened(directory: Path, trust: IdentityPaths) -> Kept:
    """A checkpoint, compared with its manifest. Raises CheckpointRefused."""
    place = Place(directory)
    try:
        if not place.manifest.exists():
            raise CheckpointRefused(
                f"{directory} has no manifest: it is no checkpoint, or its save has not ended",
                remedy="save one; what a save leaves that was killed is removed by the agent",
            )
        _check_private(directory)
        signed = signing.opened(signing.read_stored(place.manifest), trust)
        manifest = signed.manifest
        if not isinstance(manifest.memory, StoredMemory):
            raise CheckpointRefused(f"{directory} is no checkpoint that was kept")
        _check_names(place)
        manifests.check_files(manifest, signing.hashed_images(place.images))
        manifests.check_stored(manifest, signing.hashed_images(place.memory))
        about = _about(place)
    except OSError as error:
        raise CheckpointRefused(f"the checkpoint can't be read: {error}") from error
    if tree_digest(place.rootfs) != about.rootfs:
        raise CheckpointRefused(f"the root file system in {place.rootfs} is not what was saved")
    return Kept(place, signed, about)


class KeptPages:
    """The memory of a checkpoint, to be sent. runs: all of it, as a sender wants it."""

    def __init__(self, place: Place) -> None:
        """Raises OSError."""
        self._tasks: dict[int, _Task] = {}
        self.runs: list[tuple[int, PageRuns]] = []
        for path in sorted(place.memory.glob("*.runs")):
            task = int(path.stem)
            runs = np.fromfile(path, dtype="<u8").astype(np.uint64).reshape(-1, 2)
            addresses = page_addresses(runs)
            order = np.argsort(addresses)
            file = os.open(place.memory / f"{task}.pages", os.O_RDONLY | os.O_CLOEXEC)
            self._tasks[task] = _Task(file, addresses[order], order)
            if len(order):
                self.runs.append((task, page_runs(addresses[order])))

    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        """As `TaskMemory.read`, of pages in `runs`."""
        kept, view = self._tasks[task], out.cast("B")
        at = kept.order[np.searchsorted(kept.addresses, page_addresses(runs))]
        edges = [0, *(np.flatnonzero(np.diff(at) != 1) + 1).tolist(), len(at)]
        for begin, end in itertools.pairwise(edges):
            part = view[begin * PAGE_BYTES : end * PAGE_BYTES]
            if os.preadv(kept.file, [part], int(at[begin]) * PAGE_BYTES) != len(part):
                raise OSError(f"the memory of task {task} in the checkpoint is cut off")
        return np.ones(len(at), dtype=np.bool_)

    def close(self) -> None:
        """Close the files. Idempotent."""
        while self._tasks:
            os.close(self._tasks.popitem()[1].file)


class _Task(NamedTuple):
    """addresses: of all pages, ascending. order: where the page of each lies in the file."""

    file: int
    addresses: npt.NDArray[np.uint64]
    order: npt.NDArray[np.intp]


def _about(place: Place) -> About:
    with (place.memory / ABOUT_NAME).open("rb") as file:
        data = file.read(_ABOUT_BYTES_MAX + 1)
    try:
        return _ABOUT.decode(data)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise CheckpointRefused(f"{ABOUT_NAME} can't be read: {error}") from error


def _check_private(directory: Path) -> None:
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise CheckpointRefused(f"{directory} is no directory")
    if status.st_mode & _OTHERS or status.st_uid not in (0, os.geteuid()):
        raise CheckpointRefused(
            f"{directory} has a container's memory in it, and others than root may look in",
            remedy=f"chown root {directory}; chmod 700 {directory}; and see who has read it",
        )


def _check_names(place: Place) -> None:
    """That there is nothing else. Raises CheckpointRefused, OSError."""
    known = {part.name for part in (place.manifest, place.images, place.memory, place.rootfs)}
    with os.scandir(place.directory) as entries:
        for entry in entries:
            if entry.name not in known:
                raise CheckpointRefused(f"{entry.name} in {place.directory} is not of it")
