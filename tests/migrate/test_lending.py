"""A directory that is lent to another user's process and taken back, on a real tmpfs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from migrate.agent.lending import LendingError, LentDirectory, StillWrittenError

BORROWER = 65530
FILES = ("a.img", "b.img")


@pytest.fixture
def place() -> Iterator[Path]:
    place = Path(tempfile.mkdtemp(prefix="lending-", dir="/dev/shm"))
    (place / "heir").mkdir()
    yield place
    shutil.rmtree(place)


@pytest.fixture
def lent(place: Path) -> Iterator[LentDirectory]:
    lent = LentDirectory(place / "lent", BORROWER)
    yield lent
    lent.close()


def as_borrower(lent: LentDirectory, act: Callable[[int], object]) -> int:
    """Do something as the borrower does it, in a process of its own: 0, or the number of the error
    that it met."""
    descriptor = lent.descriptor()
    pid = os.fork()
    if pid == 0:
        status = 255
        try:
            os.setgroups([])
            os.setresgid(BORROWER, BORROWER, BORROWER)
            os.setresuid(BORROWER, BORROWER, BORROWER)
            act(descriptor)
            status = 0
        except OSError as error:
            status = error.errno or 255
        finally:
            os._exit(status)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def write(name: str, data: bytes = b"x") -> Callable[[int], object]:
    def act(directory: int) -> None:
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT, 0o666, dir_fd=directory)
        os.write(descriptor, data)

    return act


def take(lent: LentDirectory, place: Path) -> list[str]:
    lent.take_back()
    return sorted(lent.inherit(place / "heir", FILES.__contains__, len(FILES)))


def test_what_was_written_is_inherited(lent: LentDirectory, place: Path) -> None:
    assert as_borrower(lent, write("a.img", b"aa")) == 0
    assert as_borrower(lent, write("b.img", b"b")) == 0
    assert take(lent, place) == ["a.img", "b.img"]
    inherited = place / "heir" / "a.img"
    assert inherited.read_bytes() == b"aa"
    assert (inherited.stat().st_uid, inherited.stat().st_mode & 0o7777) == (0, 0o600)


def test_no_path_leads_out(lent: LentDirectory, place: Path) -> None:
    (place / "beside").write_text("precious")
    # `..` of the root is the root.
    assert as_borrower(lent, write("../beside")) == 0
    assert (place / "beside").read_text() == "precious"
    assert (place / "lent" / "beside").exists()


def test_after_it_was_taken_back_nothing_can_be_written(lent: LentDirectory, place: Path) -> None:
    assert as_borrower(lent, write("a.img", b"before")) == 0
    lent.take_back()
    assert as_borrower(lent, write("a.img", b"after")) == 30  # EROFS
    assert as_borrower(lent, write("b.img")) == 30
    assert as_borrower(lent, lambda at: os.unlink("a.img", dir_fd=at)) == 30
    assert as_borrower(lent, lambda at: os.chmod("a.img", 0o4777, dir_fd=at)) == 30
    assert take(lent, place) == ["a.img"]
    assert (place / "heir" / "a.img").read_bytes() == b"before"


def test_whoever_keeps_a_file_open_is_noticed(lent: LentDirectory, place: Path) -> None:
    directory = lent.descriptor()
    kept = os.open("a.img", os.O_WRONLY | os.O_CREAT, 0o600, dir_fd=directory)
    with pytest.raises(StillWrittenError):
        lent.take_back(deadline_s=0.05)
    os.close(kept)
    assert take(lent, place) == ["a.img"]
    os.close(directory)


def twice(name: str, other: str) -> Callable[[int], None]:
    def plant(at: int) -> None:
        write(name)(at)
        os.link(name, other, src_dir_fd=at, dst_dir_fd=at)

    return plant


@pytest.mark.parametrize(
    "plant",
    [
        lambda at: os.symlink("/etc/passwd", "a.img", dir_fd=at),
        lambda at: os.mkfifo("a.img", dir_fd=at),
        lambda at: os.mkdir("a.img", dir_fd=at),
        write("c.img"),
        twice("a.img", "b.img"),
    ],
    ids=["symlink", "fifo", "directory", "another name", "two names"],
)
def test_what_may_not_be_there_is_not_inherited(
    lent: LentDirectory, place: Path, plant: Callable[[int], object]
) -> None:
    assert as_borrower(lent, plant) == 0
    with pytest.raises(LendingError, match="no file that may arrive"):
        take(lent, place)
    assert list((place / "heir").iterdir()) == []


def test_more_files_than_may_be(lent: LentDirectory, place: Path) -> None:
    for name in (*FILES, "c.img"):
        assert as_borrower(lent, write(name)) == 0
    with pytest.raises(LendingError, match="3 files have arrived, 2 may"):
        take(lent, place)


def test_what_is_closed_is_not_lent_again(lent: LentDirectory) -> None:
    lent.close()
    lent.close()
    with pytest.raises(LendingError):
        lent.descriptor()
