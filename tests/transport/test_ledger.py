"""What the streams of a session have applied, as a later process finds it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from transport.core.frames import Codec, FrameHeader, FrameType
from transport.core.transcript import DIGEST_BYTES, Carried, FileDigest, StreamDigest, file_digest
from transport.errors import TargetFailedError
from transport.inbound import Session
from transport.ledger import PIECES_BYTES_MAX, Ledger


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def pages(sequence: int, number: int = 1) -> FrameHeader:
    return FrameHeader(FrameType.PAGES, Codec.RAW, number, sequence, 7, 16, 4096, 4096)


def part(sequence: int, size_bytes: int) -> FrameHeader:
    return FrameHeader(FrameType.FILE, Codec.RAW, 9, sequence, 0, 16, size_bytes, size_bytes)


def digest(letter: str) -> bytes:
    return letter.encode() * DIGEST_BYTES


def session_in(directory: int) -> Session:
    with closing(Ledger(directory)) as ledger:
        return ledger.session()


def test_nothing_was_applied(directory: int) -> None:
    session = session_in(directory)
    assert (session.carried(), session.rounds.newest) == (Carried(), 0)


def test_a_session_goes_on_where_it_was(directory: int) -> None:
    with closing(Ledger(directory)) as ledger:
        session = ledger.session()
        session.set_applied(0, pages(1, number=3), digest("a"))
        session.set_applied(15, pages(1, number=2), digest("b"))
        session.set_applied(0, pages(2, number=4), digest("c"))
        session.add_piece(15, part(2, 10), "core-1.img", 0, digest("p"))
        session.set_applied(15, part(2, 10), digest("d"))
        carried = session.carried()
    found = session_in(directory)
    assert found.carried() == carried
    assert carried == Carried(
        (StreamDigest(0, 2, digest("c")), StreamDigest(15, 2, digest("d"))),
        (FileDigest("core-1.img", 10, file_digest([digest("p")])),),
    )
    assert found.rounds.newest == 9
    assert found.inbox(0).applied == 2


def test_a_piece_whose_frame_was_not_applied_comes_again(directory: int) -> None:
    with closing(Ledger(directory)) as ledger:
        ledger.session().add_piece(0, part(1, 10), "core-1.img", 0, digest("x"))
    assert session_in(directory).carried() == Carried()
    with closing(Ledger(directory)) as ledger:
        session = ledger.session()
        session.add_piece(0, part(1, 10), "core-1.img", 0, digest("p"))
        session.set_applied(0, part(1, 10), digest("d"))
    files = session_in(directory).carried().files
    assert files == (FileDigest("core-1.img", 10, file_digest([digest("p")])),)


@pytest.mark.parametrize(
    "records",
    [
        b"\xff\xff\xff\xff",
        b"\x01",
        b"\0\0\0\0",
        (53).to_bytes(4, "little") + bytes(53),
        (200).to_bytes(4, "little") + bytes(200),
    ],
    ids=["longer than the file", "half a length", "empty", "without a name", "a long name"],
)
def test_records_that_nobody_wrote(directory: int, tmp_path: Path, records: bytes) -> None:
    (tmp_path / "pieces").write_bytes(records)
    with pytest.raises(TargetFailedError):
        session_in(directory)


def test_more_records_than_may_be(directory: int, tmp_path: Path) -> None:
    with (tmp_path / "pieces").open("wb") as file:
        file.truncate(PIECES_BYTES_MAX + 1)
    with pytest.raises(TargetFailedError, match="has"):
        session_in(directory)


def test_a_link_is_not_followed(directory: int, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"")
    (tmp_path / "streams").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        Ledger(directory)
