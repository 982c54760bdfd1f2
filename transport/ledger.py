"""What the streams of one session have applied, in two files, so that another process can go on.

    streams   a slot of 64 bytes for each stream index:
              number of the last frame u64, its round u32, 0 u32, digest 32 bytes, 0 ...
    pieces    one record after the other, for each FILE frame:
              u32 bytes of what follows: stream u8, number of the frame u64, offset u64, size u32,
              digest 32 bytes, name

A slot is written after the frame was applied and before it is acknowledged, by one pwrite(2) within
a page, which a kill does not cut in two; a piece before the slot of its frame. So what the sender
takes for applied is in here, and a frame that is not in here is sent again, to the same effect: a
piece of a frame that its slot does not know of counts for nothing.

Whoever reads the files takes them as coming from a peer.
"""

from __future__ import annotations

import os
import struct
from contextlib import closing
from typing import TYPE_CHECKING, Final

from transport.core.connection import Inbox, Rounds
from transport.core.frames import NAME_BYTES_MAX, STREAMS_MAX
from transport.core.transcript import Pieces
from transport.errors import FrameMalformedError, TargetFailedError
from transport.inbound import Session

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transport.core.frames import FrameHeader
    from transport.core.transcript import Carried

FILES: Final = frozenset(("streams", "pieces"))
PIECES_BYTES_MAX: Final = 64 << 20
"""Of all records: of 65,000 images with names as long as they may be, 18 MiB."""

_SLOT: Final = struct.Struct("<QII32s16x")
_PIECE: Final = struct.Struct("<BQQI32s")
_LENGTH: Final = struct.Struct("<I")
_READ_BYTES: Final = 1 << 20


class Ledger:
    """Of one session; `directory` is a descriptor, the caller's. Any thread; one a stream."""

    def __init__(self, directory: int) -> None:
        """Raises OSError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._streams = os.open("streams", flags, 0o600, dir_fd=directory)
        self._pieces = os.open("pieces", flags | os.O_APPEND, 0o600, dir_fd=directory)

    def session(self) -> Session:
        """The streams as they are here. Raises TargetFailedError for what nobody can have
        written."""
        inboxes, newest = self._read_streams()
        return Session(Rounds(newest), inboxes, self._read_pieces(inboxes), ledger=self)

    def add_piece(
        self, stream: int, header: FrameHeader, name: str, offset: int, digest: bytes
    ) -> None:
        """A FILE frame is about to be applied. Raises OSError."""
        piece = _PIECE.pack(stream, header.sequence, offset, header.raw_bytes, digest)
        record = piece + name.encode()
        os.write(self._pieces, _LENGTH.pack(len(record)) + record)

    def set_applied(self, stream: int, header: FrameHeader, digest: bytes) -> None:
        """A frame was applied. Raises OSError."""
        slot = _SLOT.pack(header.sequence, header.round, 0, digest)
        os.pwrite(self._streams, slot, stream * _SLOT.size)

    def close(self) -> None:
        """Not to be called twice, nor beside anything else."""
        os.close(self._streams)
        os.close(self._pieces)

    def _read_streams(self) -> tuple[dict[int, Inbox], int]:
        data = os.pread(self._streams, _SLOT.size * STREAMS_MAX, 0)
        data = data[: len(data) - len(data) % _SLOT.size]
        slots = list(_SLOT.iter_unpack(data))
        inboxes = {
            stream: Inbox(sequence, digest)
            for stream, (sequence, _, _, digest) in enumerate(slots)
            if sequence
        }
        return inboxes, max((number for _, number, _, _ in slots), default=0)

    def _read_pieces(self, inboxes: dict[int, Inbox]) -> Pieces:
        # A frame that was sent again because its slot had not been written left two records.
        records: dict[tuple[int, int], bytes] = {}
        for record in self._records():
            stream, sequence, *_ = _PIECE.unpack_from(record)
            inbox = inboxes.get(stream)
            if inbox is not None and sequence <= inbox.applied:
                records[stream, sequence] = record
        pieces = Pieces()
        for record in records.values():
            _, _, offset, size_bytes, digest = _PIECE.unpack_from(record)
            try:
                pieces.add(record[_PIECE.size :].decode(), offset, size_bytes, digest)
            except (UnicodeDecodeError, FrameMalformedError) as error:
                raise TargetFailedError(f"the ledger of a session is damaged: {error}") from error
        return pieces

    def _records(self) -> Iterator[bytes]:
        size = os.fstat(self._pieces).st_size
        if size > PIECES_BYTES_MAX:
            raise TargetFailedError(f"the ledger of a session has {size} bytes")
        data, at = _read_all(self._pieces, size), 0
        while at < len(data):
            end = at + _LENGTH.size
            if end <= len(data):
                end += _LENGTH.unpack_from(data, at)[0]
            record = data[at + _LENGTH.size : end]
            if end > len(data) or not 0 < len(record) - _PIECE.size <= NAME_BYTES_MAX:
                raise TargetFailedError("the ledger of a session is damaged")
            yield record
            at = end


def carried_in(directory: Path) -> Carried:
    """What the streams of a session have carried, once nobody writes its ledger any more. Raises
    TargetFailedError, OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with closing(Ledger(descriptor)) as ledger:
            return ledger.session().carried()
    finally:
        os.close(descriptor)


def _read_all(descriptor: int, size: int) -> bytes:
    parts, at = [], 0
    while at < size:
        part = os.pread(descriptor, min(_READ_BYTES, size - at), at)
        if not part:
            break
        parts.append(part)
        at += len(part)
    return b"".join(parts)
