"""Rounds of CRIU's pre-dump, with images as it writes them; the real CRIU is in the machines."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from criu_glue.core.pagemap import PAGE_BYTES, PE_LAZY, PE_PARENT, PE_PRESENT
from criu_glue.errors import TrackerError
from criu_glue.image_pages import ImagePages
from criu_glue.images import ImagesError, image_files, store_ranges
from criu_glue.trackers.predump import PredumpSource
from tests.criu_glue.checkpoint_images import pagemap_image

DUMPED = PE_LAZY | PE_PRESENT


@pytest.fixture
def work() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="predump-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def page(address: int) -> bytes:
    return (address // PAGE_BYTES).to_bytes(8, "little") * (PAGE_BYTES // 8)


def write_task(
    directory: Path, task: int, entries: list[tuple[int, int, int]], pages_id: int
) -> None:
    """A pagemap and its pages file: the pages of present entries, in their order."""
    (directory / f"pagemap-{task}.img").write_bytes(pagemap_image(entries, pages_id))
    addresses = [
        address + number * PAGE_BYTES
        for address, pages, flags in entries
        if flags & PE_PRESENT
        for number in range(pages)
    ]
    (directory / f"pages-{pages_id}.img").write_bytes(b"".join(map(page, addresses)))


def runs(*rows: tuple[int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    return np.array(rows, dtype=np.uint64).reshape(-1, 2)


ENTRIES = [
    (0x1000, 2, DUMPED),
    (0x3000, 1, PE_PRESENT),
    (0x8000, 3, PE_PARENT),
    (0xB000, 1, DUMPED),
    (0x20_0000, 600, DUMPED),
]
TASK = 7


@pytest.mark.parametrize(
    "wanted",
    [
        [(0x1000, 3)],
        [(0x2000, 2), (0xB000, 1)],
        [(0xB000, 1), (0x20_0000, 1), (0x20_2000, 255), (0x45_7000, 1)],
    ],
)
def test_pages_are_found_by_their_address(work: Path, wanted: list[tuple[int, int]]) -> None:
    write_task(work, TASK, ENTRIES, pages_id=3)
    write_task(work, 9, [(0x1000, 1, PE_PARENT)], pages_id=4)
    pages = ImagePages(work)
    ((task, present),) = pages.runs()
    assert (task, present.tolist()) == (TASK, [[0x1000, 3], [0xB000, 1], [0x20_0000, 600]])
    expected = [
        page(address + number * PAGE_BYTES) for address, count in wanted for number in range(count)
    ]
    out = bytearray(len(expected) * PAGE_BYTES)
    assert pages.read(TASK, runs(*wanted), memoryview(out)).tolist() == [True] * len(expected)
    assert bytes(out) == b"".join(expected)
    pages.close()


@pytest.mark.parametrize("wanted", [(0x8000, 1), (0x3000, 2), (0, 1), (0x45_8000, 1)])
def test_pages_that_are_not_in_the_images_are_an_error(work: Path, wanted: tuple[int, int]) -> None:
    write_task(work, TASK, ENTRIES, pages_id=3)
    pages = ImagePages(work)
    with pytest.raises(ImagesError, match="do not have"):
        pages.read(TASK, runs(wanted), memoryview(bytearray(2 * PAGE_BYTES)))
    pages.close()


def test_a_pages_file_of_another_size_is_refused(work: Path) -> None:
    write_task(work, TASK, ENTRIES, pages_id=3)
    os.truncate(work / "pages-3.img", 5 * PAGE_BYTES)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ImagesError, match="pagemap says"):
        ImagePages(work)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


class Criu:
    """Writes a round's images; keeps what it was given for a parent."""

    def __init__(self) -> None:
        self.parents: list[list[str] | None] = []

    def __call__(self, directory: Path, parent: str | None) -> None:
        assert list(directory.iterdir()) == []
        if parent is None:
            self.parents.append(None)
        else:
            # As CRIU finds it.
            assert not Path(parent).is_absolute()
            (directory / "parent").symlink_to(parent)
            self.parents.append(sorted(one.name for one in (directory / "parent").iterdir()))
        (directory / "inventory.img").write_bytes(b"inventory")
        write_task(directory, TASK, ENTRIES, pages_id=1)
        (directory / "pagemap-shmem-12.img").write_bytes(b"shared")
        (directory / "pages-2.img").write_bytes(bytes(PAGE_BYTES))


KEPT = ["inventory.img", "pagemap-7.img", "pagemap-shmem-12.img"]


def test_a_round_keeps_what_the_next_one_needs_and_no_page(work: Path) -> None:
    criu = Criu()
    source = PredumpSource(work / "predump", criu)
    for _ in range(3):
        ((task, present),) = source.collect()
        out = bytearray(PAGE_BYTES)
        source.read(task, runs((0xB000, 1)), memoryview(out))
        assert bytes(out) == page(0xB000)
        assert present[:, 1].sum() == 604
        source.delivered()
        with pytest.raises(TrackerError):
            source.read(task, runs((0xB000, 1)), memoryview(out))
        sizes = [one.stat().st_size for one in (work / "predump").rglob("*")]
        assert max(sizes) < PAGE_BYTES
    assert criu.parents == [None, KEPT, KEPT]
    source.close()


def test_the_final_dump_leaves_its_pages_to_the_store(work: Path) -> None:
    """What was delivered is as a lazy dump leaves it; shared memory has no parent, and stays."""
    source = PredumpSource(work / "predump", Criu())
    source.collect()
    source.delivered()
    delta = source.final()
    assert (delta.code, delta.rest) == ([], [])
    assert source.parent is not None
    assert not list(source.parent.glob("pagemap-shmem-*"))
    final = work / "img"
    final.mkdir()
    write_task(final, TASK, ENTRIES, pages_id=1)
    (final / "pagemap-shmem-12.img").write_bytes(pagemap_image([(0, 1, PE_PRESENT)], 2))
    (final / "pages-2.img").write_bytes(bytes(PAGE_BYTES))
    ((_, present),) = source.dumped(final)
    assert present[:, 1].sum() == 604
    source.delivered()
    assert [one.name for one in image_files(final)] == [
        *("pagemap-7.img", "pagemap-shmem-12.img", "pages-2.img")
    ]
    assert store_ranges(final)[TASK].tolist() == [
        [0x1000, 3],
        [0x8000, 4],
        [0x20_0000, 600],
    ]
    source.close()
