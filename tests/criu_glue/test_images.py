"""Image directories: what travels, what the page store makes of them, what a peer may write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from criu_glue.core.image_names import is_image_name, task_of_pagemap
from criu_glue.core.pagemap import ADDRESS_END, PAGE_BYTES, PE_LAZY, PE_PARENT, PE_PRESENT
from criu_glue.core.wire import ImageFormatError
from criu_glue.errors import LimitExceededError
from criu_glue.images import (
    ImagesError,
    ImageWriter,
    attach_page_store,
    image_files,
    lazy_ranges,
    pager_ranges,
    store_ranges,
    task_pagemaps,
)
from criu_glue.page_store import PageStore
from tests.criu_glue.checkpoint_images import ANONYMOUS, mm_image, pagemap_image, vma

LOCKED = 0x2000
WIPEONFORK = 1 << 18
LAZY_IN_STORE = PE_PARENT | PE_LAZY


def put_pagemap(path: Path, entries: list[tuple[int, int, int]], pages_id: int = 1) -> None:
    path.write_bytes(pagemap_image(entries, pages_id))


def put_mm(path: Path, mappings: list[tuple[int, int, int, int]]) -> None:
    """[(start, end, flags, advice)]"""
    path.write_bytes(
        mm_image([vma(start, end, flags, madv=advice) for start, end, flags, advice in mappings])
    )


@pytest.fixture
def work() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="images-", dir="/dev/shm"))
    (path / "img").mkdir()
    yield path
    shutil.rmtree(path)


@pytest.fixture
def checkpoint(work: Path) -> Path:
    """Two tasks as `criu dump --lazy-pages` writes them, and an incremental third."""
    img = work / "img"
    put_pagemap(
        img / "pagemap-1.img",
        [(0x1000, 5, PE_LAZY), (0x8000, 1, PE_PRESENT), (0x9000, 1, PE_LAZY)],
    )
    put_mm(
        img / "mm-1.img",
        [
            (0x1000, 0x3000, ANONYMOUS, 0),
            (0x3000, 0x4000, ANONYMOUS, WIPEONFORK),
            (0x4000, 0x6000, ANONYMOUS, 0),
            (0x8000, 0xA000, ANONYMOUS, 0),
        ],
    )
    put_pagemap(img / "pagemap-22.img", [(0x7FFF_0000_0000, 3, PE_LAZY)])
    put_mm(img / "mm-22.img", [(0x7FFF_0000_0000, 0x7FFF_0000_3000, ANONYMOUS, 0)])
    put_pagemap(
        img / "pagemap-3.img",
        [(0x1000, 2, PE_PARENT), (0x3000, 1, PE_LAZY | PE_PRESENT), (0x5000, 1, PE_PARENT)],
        pages_id=2,
    )
    put_mm(
        img / "mm-3.img", [(0x1000, 0x4000, ANONYMOUS, 0), (0x5000, 0x6000, ANONYMOUS | LOCKED, 0)]
    )
    put_pagemap(img / "pagemap-shmem-77.img", [(0, 4, PE_PRESENT)])
    (img / "pages-1.img").write_bytes(bytes(PAGE_BYTES))
    (img / "inventory.img").write_bytes(b"x")
    return img


@pytest.fixture
def store(work: Path) -> Iterator[PageStore]:
    store = PageStore(work / "mem", quota_bytes=1 << 20)
    yield store
    store.close()


def test_names_that_travel() -> None:
    travelling = (
        "inventory.img core-1.img pagemap-4194304.img pagemap-shmem-18446744073709551615.img "
        "pages-2.img ghost-file-1f.img tcp-stream-a0.img tmpfs-12.tar.gz.img memfd.img "
        "descriptors.json netns-ct-10.img fs-1.img eventpoll-tfd.img tmpfs-dev-41.tar.gz.img"
    )
    for name in travelling.split():
        assert is_image_name(name), name
    staying = (
        "parent dump.log stats-dump lazy-pages.socket ../inventory.img inventory.img/x core-1 "
        "core-.img core-1.img.img pagemap--1.img tmpfs-12.img ghost-file-xyz.img .inventory.img "
        "config.json a.img core-1.img\n pages-١.img INVENTORY.img"
    )
    for name in staying.split(" "):
        assert not is_image_name(name), name
    assert task_of_pagemap("pagemap-22.img") == 22
    assert task_of_pagemap("pagemap-shmem-22.img") is None
    assert task_of_pagemap("pagemap-0.img") is None


def test_only_images_travel(checkpoint: Path) -> None:
    (checkpoint / "dump.log").write_text("log")
    (checkpoint / "parent").symlink_to("../mem")
    (checkpoint / "pages-9.img").symlink_to("/etc/passwd")
    (checkpoint / "descriptors.json").write_text("[]")
    found = {file.name: file.bytes for file in image_files(checkpoint)}
    assert set(found) == {
        "descriptors.json",
        "inventory.img",
        "mm-1.img",
        "mm-22.img",
        "mm-3.img",
        "pagemap-1.img",
        "pagemap-22.img",
        "pagemap-3.img",
        "pagemap-shmem-77.img",
        "pages-1.img",
    }
    assert found["pages-1.img"] == PAGE_BYTES
    assert found["descriptors.json"] == 2


def test_what_must_have_been_delivered(checkpoint: Path) -> None:
    lazy = {task: runs.tolist() for task, runs in lazy_ranges(checkpoint).items()}
    assert lazy == {1: [[0x1000, 5], [0x9000, 1]], 22: [[0x7FFF_0000_0000, 3]], 3: []}
    stored = {task: runs.tolist() for task, runs in store_ranges(checkpoint).items()}
    assert stored == {**lazy, 3: [[0x1000, 2], [0x5000, 1]]}


def test_images_are_joined_to_the_store(checkpoint: Path, store: PageStore) -> None:
    before = store_ranges(checkpoint)
    lazy = attach_page_store(checkpoint, store)
    pagemaps = {t: (p.pages_id, p.entries.tolist()) for t, p in task_pagemaps(checkpoint).items()}
    assert pagemaps[1] == (
        1,
        [
            [0x1000, 2, LAZY_IN_STORE],
            [0x3000, 1, PE_PARENT],
            [0x4000, 2, LAZY_IN_STORE],
            [0x8000, 1, PE_PRESENT],
            [0x9000, 1, LAZY_IN_STORE],
        ],
    )
    assert pagemaps[22] == (1, [[0x7FFF_0000_0000, 3, LAZY_IN_STORE]])
    assert pagemaps[3] == (
        2,
        [[0x1000, 2, LAZY_IN_STORE], [0x3000, 1, PE_PRESENT], [0x5000, 1, PE_PARENT]],
    )
    for task in (1, 3, 22):
        parent = task_pagemaps(checkpoint / "parent")[task]
        assert parent.pages_id == task
        assert parent.runs(having=PE_LAZY | PE_PRESENT).tolist() == [[0, (1 << 47) // PAGE_BYTES]]
        assert (checkpoint / "parent" / f"pages-{task}.img").stat().st_size == ADDRESS_END
        assert lazy[task].tolist() == lazy_ranges(checkpoint)[task].tolist()
        assert store_ranges(checkpoint)[task].tolist() == before[task].tolist()
    assert str((checkpoint / "parent").readlink()) == "../mem"
    assert (checkpoint / "pagemap-shmem-77.img").exists()
    assert not (store.directory / "pagemap-77.img").exists()


def test_joining_twice_changes_nothing(checkpoint: Path, store: PageStore) -> None:
    attach_page_store(checkpoint, store)
    once = {file.name: file.path.read_bytes() for file in image_files(checkpoint)}
    attach_page_store(checkpoint, store)
    assert {file.name: file.path.read_bytes() for file in image_files(checkpoint)} == once


def test_what_the_pager_fills_is_cut_at_mappings(work: Path, store: PageStore) -> None:
    img = work / "img"
    put_pagemap(img / "pagemap-5.img", [(0x1000, 4, PE_LAZY)])
    put_mm(img / "mm-5.img", [(0x1000, 0x2000, ANONYMOUS, 0), (0x2000, 0x5000, ANONYMOUS, 0)])
    attach_page_store(img, store)
    assert lazy_ranges(img)[5].tolist() == [[0x1000, 4]]
    assert pager_ranges(img, 5).tolist() == [[0x1000, 1], [0x2000, 3]]


def test_damaged_or_missing_images_are_typed_errors(checkpoint: Path, store: PageStore) -> None:
    (checkpoint / "mm-22.img").unlink()
    with pytest.raises(ImagesError):
        attach_page_store(checkpoint, store)
    (checkpoint / "mm-22.img").write_bytes(b"rubbish!")
    with pytest.raises(ImageFormatError):
        attach_page_store(checkpoint, store)
    (checkpoint / "pagemap-22.img").write_bytes(b"")
    with pytest.raises(ImageFormatError):
        lazy_ranges(checkpoint)
    with pytest.raises(ImagesError):
        image_files(checkpoint / "none")


# -- arriving files --


def test_files_arrive_in_parts_and_in_any_order(work: Path) -> None:
    writer = ImageWriter(work / "in", quota_bytes=100)
    writer.write_file("core-1.img", 4, b"5678")
    writer.write_file("core-1.img", 0, memoryview(b"1234"))
    writer.write_file("files.img", 0, b"")
    writer.close()
    assert (work / "in" / "core-1.img").read_bytes() == b"12345678"
    assert (work / "in" / "files.img").read_bytes() == b""


def test_a_peer_cannot_write_elsewhere_or_without_end(work: Path) -> None:
    writer = ImageWriter(work / "in", quota_bytes=100)
    for name in ("../core-1.img", "/etc/passwd", "parent", "parent/core-1.img", "", "core-1.img/"):
        with pytest.raises(ImagesError):
            writer.write_file(name, 0, b"x")
    with pytest.raises(LimitExceededError):
        writer.write_file("core-1.img", 1 << 40, b"x")
    with pytest.raises(LimitExceededError):
        writer.write_file("core-1.img", -1, b"x")
    writer.write_file("core-1.img", 0, bytes(60))
    writer.write_file("core-1.img", 0, bytes(60))
    with pytest.raises(LimitExceededError):
        writer.write_file("core-2.img", 0, bytes(60))
    victim = work / "victim"
    victim.write_text("precious")
    (work / "in" / "core-3.img").symlink_to(victim)
    with pytest.raises(ImagesError):
        writer.write_file("core-3.img", 0, b"x")
    assert victim.read_text() == "precious"
