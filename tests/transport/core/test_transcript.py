"""The account of what streams have carried."""

from __future__ import annotations

import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from transport.core.transcript import (
    NOTHING,
    PIECE_BYTES,
    FileDigest,
    Pieces,
    body_tag,
    extended,
    file_digest,
    piece_digest,
)
from transport.errors import FrameMalformedError


def digest_of(*frames: bytes) -> bytes:
    digest = NOTHING
    for frame in frames:
        digest = extended(digest, (frame,))
    return digest


def test_golden() -> None:
    first = hashlib.sha256(bytes(32) + b"one").digest()
    assert digest_of(b"one") == first
    assert digest_of(b"one", b"two") == hashlib.sha256(first + b"two").digest()


def test_the_parts_of_a_frame_are_one() -> None:
    parts = (b"o", memoryview(b"n"), bytearray(b"e"))
    assert extended(NOTHING, parts) == digest_of(b"one")


@pytest.mark.parametrize(
    "other",
    [(b"two", b"one"), (b"one",), (b"one", b"two", b""), (b"one", b"twO"), (b"onetwo",)],
    ids=["reordered", "truncated", "longer", "flipped", "joined"],
)
def test_whatever_differs_has_another_digest(other: tuple[bytes, ...]) -> None:
    assert digest_of(*other) != digest_of(b"one", b"two")


def test_a_body_is_told_by_its_gmac() -> None:
    key, nonce, body = bytes(range(16)), (7).to_bytes(12, "big"), b"pages" * 1000
    gmac = Cipher(algorithms.AES(key), modes.GCM(nonce)).encryptor()
    gmac.authenticate_additional_data(body)
    gmac.finalize()
    assert body_tag(key, 7, memoryview(body)) == gmac.tag
    others = {
        body_tag(key, 7, body),
        body_tag(key, 7, body[:-1] + b"S"),
        body_tag(key, 7, body[:-1]),
        body_tag(key, 7, b""),
        body_tag(key, 8, body),
        body_tag(key[::-1], 7, body),
    }
    assert len(others) == 6


def test_files_are_hashed_by_pieces_in_any_order() -> None:
    content = bytes(range(256)) * (PIECE_BYTES // 256) + b"the rest"
    first, last = piece_digest(content[:PIECE_BYTES]), piece_digest(content[PIECE_BYTES:])
    pieces = Pieces()
    pieces.add("b.img", PIECE_BYTES, 8, last)
    pieces.add("a.img", 0, 0, piece_digest(b""))
    pieces.add("b.img", 0, PIECE_BYTES, first)
    assert pieces.files() == (
        FileDigest("a.img", 0, file_digest([hashlib.sha256(b"").digest()])),
        FileDigest("b.img", PIECE_BYTES + 8, hashlib.sha256(first + last).digest()),
    )


def test_a_file_with_a_gap_is_not_there() -> None:
    pieces = Pieces()
    pieces.add("begin.img", PIECE_BYTES, 8, bytes(32))
    pieces.add("middle.img", 0, 5, bytes(32))
    pieces.add("middle.img", PIECE_BYTES, 8, bytes(32))
    assert pieces.files() == ()


@pytest.mark.parametrize("offset", [0, 1, PIECE_BYTES - 1])
def test_no_piece_is_written_over(offset: int) -> None:
    pieces = Pieces()
    pieces.add("core-1.img", 0, 10, bytes(32))
    with pytest.raises(FrameMalformedError, match="core-1"):
        pieces.add("core-1.img", offset, 10, bytes(32))
