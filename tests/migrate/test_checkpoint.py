"""A checkpoint on disk is believed as it was signed, every byte of it, or not at all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from criu_glue.core.pagemap import PageRuns
from criu_glue.kernel import PAGE_BYTES
from migrate import signing
from migrate.checkpoint import About, KeptPages, Place, opened
from migrate.core import manifest as manifests
from migrate.core.manifest import DAY_S, KEPT_DAYS_MAX
from migrate.errors import CheckpointRefused
from migrate.memory_writer import MemoryWriter
from migrate.tree_digest import tree_digest
from tests.identities import Fleet
from tests.migrate.core.test_messages import CONFINEMENT, OPEN
from transport.errors import AbortedError
from transport.identity import HostIdentity, IdentityPaths


class Pages:
    """Memory in which each page has its own number, and every fifth is not there. What was not
    written yet is something else."""

    def __init__(self) -> None:
        self.is_written = True

    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        numbers = [
            int(address) // PAGE_BYTES + at for address, pages in runs for at in range(int(pages))
        ]
        view = np.frombuffer(out, dtype=np.uint8).reshape(-1, PAGE_BYTES)
        for at, number in enumerate(numbers):
            view[at] = (number * task + (not self.is_written)) % 251
        return np.array([number % 5 != 0 for number in numbers])


def runs(*pages: tuple[int, int]) -> PageRuns:
    return np.array([[first * PAGE_BYTES, count] for first, count in pages], dtype=np.uint64)


def write(place: Place) -> None:
    """The memory of tasks 7 and 9, in rounds, and of 11, which is not in the images."""
    pages = Pages()
    writer = MemoryWriter(place, pages.read, float("inf"))
    pages.is_written = False
    first = writer.send_round(1, [(7, runs((3, 4), (900, 5500))), (11, runs((1, 1)))])
    assert (first.pages, first.vanished_pages) == (4404, 1101)
    pages.is_written = True
    writer.send_round(2, [(7, runs((3, 2), (5, 1), (900, 6000))), (9, runs((1, 1)))])
    writer.send_round(3, [(7, runs((1, 2), (6, 1)))])
    assert writer.never_delivered(7, runs((5, 3))).tolist() == [
        [number * PAGE_BYTES, 1] for number in (5, 7)
    ]
    writer.finish([7, 9])
    writer.close()
    with pytest.raises(AbortedError):
        writer.send_round(4, [(7, runs((1, 1)))])


@pytest.fixture(scope="module")
def trust(tmp_path_factory: pytest.TempPathFactory) -> IdentityPaths:
    return Fleet(tmp_path_factory.mktemp("fleet")).host(OPEN.host)


@pytest.fixture
def place(tmp_path: Path, trust: IdentityPaths) -> Place:
    """Sealed for its own host, for a day."""
    place = Place(tmp_path / "kept")
    place.make()
    (place.rootfs / "bin").mkdir(parents=True)
    (place.rootfs / "bin/web").write_bytes(b"program")
    (place.rootfs / "link").symlink_to("bin/web")
    (place.images / "core-1.img").write_bytes(b"image")
    write(place)
    descriptors = ("/dev/null", "/dev/null", "/dev/null")
    about = About(OPEN, descriptors, CONFINEMENT, tree_digest(place.rootfs))
    place.seal(about, HostIdentity.load(trust), OPEN.host, days=1, is_for_fleet=False)
    return place


def test_what_was_kept_is_read_again(place: Place, trust: IdentityPaths) -> None:
    kept = opened(place.directory, trust)
    assert kept.about.request == OPEN
    now_s = time.time()
    kept.check_for(OPEN.host, now_s)
    for host, when_s, why in (
        ("other", now_s, f"for {OPEN.host} alone, not for other"),
        (OPEN.host, now_s + DAY_S, "expired"),
        (OPEN.host, now_s - DAY_S, "ahead"),
    ):
        with pytest.raises(CheckpointRefused, match=why):
            kept.check_for(host, when_s)
    pages = KeptPages(place)
    try:
        of_task = dict(pages.runs)
        there = [1, 2, 3, 4, 6, *(one for one in range(900, 6900) if one % 5)]
        assert int(of_task[7][:, 1].sum()) == len(there)
        assert of_task[9].tolist() == [[PAGE_BYTES, 1]]
        for asked in (of_task[7], runs((2, 3)), runs((1, 1), (6, 1), (6898, 1))):
            out = bytearray(int(asked[:, 1].sum()) * PAGE_BYTES)
            expected = bytearray(len(out))
            assert pages.read(7, asked, memoryview(out)).all()
            Pages().read(7, asked, memoryview(expected))
            assert out == expected
    finally:
        pages.close()


def flip(path: Path, at: int) -> None:
    """Change one bit of a file, and nothing that `stat` tells."""
    content, status = bytearray(path.read_bytes()), path.stat()
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES: list[Callable[[Path], object]] = [
    lambda at: (at / "images/new.img").touch(),
    lambda at: (at / "memory/new").touch(),
    lambda at: (at / "new").touch(),
    lambda at: (at / "rootfs/new").touch(),
    lambda at: (at / "images/core-1.img").unlink(),
    lambda at: (at / "memory/9.pages").unlink(),
    lambda at: (at / "manifest.json").unlink(),
    lambda at: (at / "rootfs/link").unlink(),
    lambda at: (at / "rootfs/bin/web").chmod(0o755),
    lambda at: os.utime(at / "rootfs/bin/web", (1, 1)),
    lambda at: os.setxattr(at / "rootfs/bin/web", "user.new", b""),
    lambda at: (at / "memory/9.pages").rename(at / "memory/9.page"),
    lambda at: (at / "memory/9.runs").rename(at / "memory/9.pages"),
    lambda at: at.chmod(0o750),
    lambda at: at.chmod(0o701),
]


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_found(
    place: Place, trust: IdentityPaths, change: Callable[[Path], object]
) -> None:
    opened(place.directory, trust)
    change(place.directory)
    with pytest.raises(CheckpointRefused):
        opened(place.directory, trust)


def test_any_byte_is_found(place: Place, trust: IdentityPaths) -> None:
    """The first, the last and one between of every file."""
    for file in [
        one for one in place.directory.rglob("*") if one.is_file() and not one.is_symlink()
    ]:
        size_bytes = file.stat().st_size
        for at in {0, size_bytes // 2, size_bytes - 1}:
            flip(file, at)
            with pytest.raises(CheckpointRefused):
                opened(place.directory, trust)
            flip(file, at)
    opened(place.directory, trust)


def test_another_fleets_checkpoint_is_not_believed(place: Place, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused):
        opened(place.directory, Fleet(tmp_path / "other").host(OPEN.host))


def test_a_transfers_manifest_is_no_checkpoint(place: Place, trust: IdentityPaths) -> None:
    signed = signing.opened(signing.read_stored(place.manifest), trust)
    with pytest.raises(CheckpointRefused, match="was kept, not of a transfer"):
        manifests.check_streams(signed.manifest, ())
    life = msgspec.structs.replace(
        signed.manifest, expires_s=signed.manifest.created_s + (KEPT_DAYS_MAX + 1) * DAY_S
    )
    with pytest.raises(CheckpointRefused, match="to hold for more than"):
        manifests.decode(manifests.encode(life))
