"""The page store, on a real tmpfs."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from criu_glue.core.pagemap import ADDRESS_END, PAGE_BYTES
from criu_glue.errors import LimitExceededError
from criu_glue.page_store import PageStore, PageStoreError, PageStoreFullError

MIB = 1 << 20


@pytest.fixture
def directory() -> Iterator[Path]:
    """A place on a tmpfs: only there may a file be 2^57 bytes long."""
    path = Path(tempfile.mkdtemp(prefix="page-store-", dir="/dev/shm"))
    yield path / "mem"
    shutil.rmtree(path)


@pytest.fixture
def store(directory: Path) -> Iterator[PageStore]:
    store = PageStore(directory, quota_bytes=8 * MIB)
    yield store
    store.close()


def read(store: PageStore, task: int, address: int, pages: int = 1) -> bytes:
    out = bytearray(pages * PAGE_BYTES)
    store.read_into(task, address, out)
    return bytes(out)


def test_a_page_is_at_the_offset_of_its_address(store: PageStore) -> None:
    top = 0x7FFF_FFFF_E000
    store.write(7, top, b"t" * PAGE_BYTES)
    store.write(7, 0x1000, b"a" * PAGE_BYTES)
    with store.path(7).open("rb") as file:
        file.seek(top)
        assert file.read(PAGE_BYTES) == b"t" * PAGE_BYTES
        file.seek(0x1000)
        assert file.read(2 * PAGE_BYTES) == b"a" * PAGE_BYTES + bytes(PAGE_BYTES)
    assert store.path(7).stat().st_mode & 0o777 == 0o600
    assert store.directory.stat().st_mode & 0o777 == 0o700
    assert store.tasks() == [7]


def test_later_rounds_overwrite_and_take_no_more_space(store: PageStore) -> None:
    for letter in b"abcdefghijkl":
        store.write(1, 0x40_0000, bytes([letter]) * MIB)
    assert read(store, 1, 0x40_0000) == b"l" * PAGE_BYTES
    assert store.stored_bytes() == MIB


def test_zeros_are_holes(store: PageStore) -> None:
    store.write(1, 0x40_0000, b"x" * MIB)
    store.zero(1, 0x40_1000, 3)
    store.zero(1, 0x7000_0000, 1 << 40)
    assert read(store, 1, 0x40_0000, 5) == (
        b"x" * PAGE_BYTES + bytes(3 * PAGE_BYTES) + b"x" * PAGE_BYTES
    )
    assert store.stored_bytes() == MIB - 3 * PAGE_BYTES
    assert store.next_data(1, 0) == 0x40_0000
    assert store.next_data(1, 0x40_1000) == 0x40_4000
    assert store.next_data(1, 0x50_0000) == ADDRESS_END


def test_any_shape_of_buffer_is_written_whole(store: PageStore) -> None:
    for data in (bytes(PAGE_BYTES), bytearray(PAGE_BYTES), memoryview(bytearray(PAGE_BYTES))):
        store.write(1, 0, data)
    store.write(1, 0, memoryview(bytearray(b"ab" * PAGE_BYTES)).cast("H"))
    assert read(store, 1, 0, 2) == b"ab" * PAGE_BYTES


@pytest.mark.parametrize(
    ("task", "address", "size"),
    [
        (0, 0, PAGE_BYTES),
        (-1, 0, PAGE_BYTES),
        (1 << 23, 0, PAGE_BYTES),
        (1, 1, PAGE_BYTES),
        (1, -PAGE_BYTES, PAGE_BYTES),
        (1, 0, 0),
        (1, 0, 100),
        (1, ADDRESS_END, PAGE_BYTES),
        (1, ADDRESS_END - PAGE_BYTES, 2 * PAGE_BYTES),
        (1, 2**64, PAGE_BYTES),
    ],
)
def test_what_cannot_be_is_refused(store: PageStore, task: int, address: int, size: int) -> None:
    with pytest.raises(PageStoreError):
        store.write(task, address, bytes(size))
    assert not store.tasks() or store.stored_bytes() == 0


def test_zero_of_no_or_too_many_pages_is_refused(store: PageStore) -> None:
    for pages in (0, -1, 1 << 60):
        with pytest.raises(PageStoreError):
            store.zero(1, 0, pages)


def test_the_quota_counts_what_is_stored_not_what_arrived(store: PageStore) -> None:
    for _ in range(20):
        store.write(1, 0, b"x" * (8 * MIB))
    # The store is exactly full. What is new is known when it is written: one write too many.
    store.write(2, 0, b"y" * MIB)
    with pytest.raises(PageStoreFullError):
        store.write(2, MIB, b"y" * MIB)
    assert store.stored_bytes() == 9 * MIB
    store.zero(1, 0, 4 * MIB // PAGE_BYTES)
    store.write(2, 0, b"y" * MIB)


def test_a_full_tmpfs_is_a_clear_error(store: PageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(PageStoreFullError, match="no memory left"):
        store.write(1, 0, bytes(PAGE_BYTES))


def test_the_number_of_tasks_is_bounded(directory: Path) -> None:
    store = PageStore(directory, quota_bytes=MIB, tasks_max=2)
    store.add_task(1)
    store.add_task(2)
    store.add_task(1)
    with pytest.raises(LimitExceededError):
        store.add_task(3)
    store.close()


def test_a_file_system_with_short_files_is_refused(
    store: PageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ext4 ends a file at 16 TiB."""

    def too_large(*_: object) -> None:
        raise OSError(27, "File too large")

    monkeypatch.setattr(os, "ftruncate", too_large)
    with pytest.raises(PageStoreError, match="tmpfs"):
        store.add_task(1)
    assert not store.tasks()


def test_writers_in_parallel(store: PageStore) -> None:
    """Frames of several streams, interleaved; every page ends with its own content."""
    random.seed(1)
    frames = [(task, address) for task in (1, 2, 3) for address in range(0, MIB, 64 << 10)]
    random.shuffle(frames)

    def work(mine: list[tuple[int, int]]) -> None:
        for task, address in mine:
            store.write(task, address, bytes([task + address // (64 << 10)]) * (64 << 10))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [frames[n::4] for n in range(4)]))
    for task, address in frames:
        expected = bytes([task + address // (64 << 10)]) * PAGE_BYTES
        assert read(store, task, address) == expected
        assert read(store, task, address + (60 << 10)) == expected


def test_an_agent_that_died_left_its_files(directory: Path) -> None:
    first = PageStore(directory, quota_bytes=MIB)
    first.write(3, 0x1000, b"k" * PAGE_BYTES)
    (directory / "pagemap-3.img").write_bytes(b"")
    second = PageStore(directory, quota_bytes=MIB)
    assert second.tasks() == [3]
    assert read(second, 3, 0x1000) == b"k" * PAGE_BYTES
    first.close()
    second.close()


def test_closed_keeps_the_files_and_wiped_does_not(store: PageStore) -> None:
    store.write(1, 0, bytes(PAGE_BYTES))
    store.close()
    store.close()
    assert store.path(1).exists()
    with pytest.raises(PageStoreError, match="closed"):
        store.write(1, 0, bytes(PAGE_BYTES))
    store.wipe()
    store.wipe()
    assert not store.directory.exists()


def test_a_link_in_place_of_a_file_is_not_followed(directory: Path, tmp_path: Path) -> None:
    store = PageStore(directory, quota_bytes=MIB)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    store.path(1).symlink_to(victim)
    with pytest.raises(PageStoreError):
        store.write(1, 0, bytes(PAGE_BYTES))
    assert victim.read_text() == "precious"
    store.wipe()


def test_a_directory_that_only_a_descriptor_names(directory: Path) -> None:
    """As a process has it that may look at nothing else."""
    directory.mkdir()
    named = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    with closing(PageStore(Path("nowhere"), quota_bytes=MIB, within=named)) as store:
        store.write(7, PAGE_BYTES, b"x" * PAGE_BYTES)
    os.close(named)
    with closing(PageStore(directory, quota_bytes=MIB)) as store:
        assert store.tasks() == [7]
        assert read(store, 7, PAGE_BYTES) == b"x" * PAGE_BYTES
