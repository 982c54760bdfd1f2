"""The receiving end of one stream: read a frame, check it, hand it to the sink, answer.

Knows TLS sockets, frames and the session's bookkeeping; does not know how connections are accepted
or who may make them. One thread runs one stream.
"""

from __future__ import annotations

import errno
import mmap
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from transport.codec import Decoder
from transport.core.connection import Inbox, Rounds
from transport.core.frames import (
    FRAME_RAW_BYTES_MAX,
    HEADER_BYTES,
    PAGE_BYTES,
    TABLE_BYTES_MAX,
    Answer,
    FrameHeader,
    FrameType,
    Status,
    encode_answer,
    parse_header,
    verify,
)
from transport.core.tables import RunKind, parse_file, parse_runs
from transport.core.transcript import (
    Carried,
    Pieces,
    StreamDigest,
    body_tag,
    extended,
    piece_digest,
)
from transport.errors import (
    StreamBrokenError,
    TargetFailedError,
    TargetFullError,
    TransportError,
)

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterator

    from transport.ledger import Ledger

FRAME_DEADLINE_S = 60.0
"""For the rest of a frame after its first byte: twice what the sender has for writing it."""
IDLE_DEADLINE_S = 900.0
"""Between frames: the source may wait for its operator. TCP notices a dead peer long before."""


class PageSink(Protocol):
    """Where received pages and files go. Called by several threads at once, for different pages.

    `data` belongs to the caller: it is overwritten after the call returned. What a call raises is
    logged here and ends the session's transfer; an OSError of ENOSPC says that there is no room.
    """

    def write(self, task: int, address: int, data: memoryview) -> None:
        """Whole pages of a task's memory from `address`."""

    def zero(self, task: int, address: int, pages: int) -> None:
        """`pages` pages from `address` hold zeros."""

    def write_file(self, name: str, offset: int, data: memoryview) -> None:
        """A part of a file; no part at all for an empty one: `data` of no bytes."""


@dataclass(slots=True)
class Session:
    """What the streams of one ticket share, beyond the life of their connections."""

    rounds: Rounds = field(default_factory=Rounds)
    inboxes: dict[int, Inbox] = field(default_factory=dict)
    pieces: Pieces = field(default_factory=Pieces)
    failure: TransportError | None = None
    # Where it is kept for a process that comes after this one, if anywhere.
    ledger: Ledger | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def inbox(self, stream: int) -> Inbox:
        return self.inboxes.setdefault(stream, Inbox())

    def add_piece(
        self, stream: int, header: FrameHeader, name: str, offset: int, digest: bytes
    ) -> None:
        """A piece of a file is about to be given to the sink."""
        with self.lock:
            self.pieces.add(name, offset, header.raw_bytes, digest)
        if self.ledger is not None:
            with _sink_errors():
                self.ledger.add_piece(stream, header, name, offset, digest)

    def set_applied(self, stream: int, header: FrameHeader, digest: bytes) -> None:
        """The sink has taken a frame, which its sender has not heard of yet."""
        if self.ledger is not None:
            with _sink_errors():
                self.ledger.set_applied(stream, header, digest)
        self.inbox(stream).done(header.sequence, digest)

    def carried(self) -> Carried:
        """What was applied; complete once the streams have ended."""
        with self.lock:
            return Carried(
                tuple(
                    StreamDigest(index, inbox.applied, inbox.digest)
                    for index, inbox in sorted(self.inboxes.items())
                    if inbox.applied
                ),
                self.pieces.files(),
            )


def send_answer(stream: ssl.SSLSocket, status: Status, sequence: int) -> None:
    try:
        stream.sendall(encode_answer(Answer(status, sequence)))
    except OSError as error:
        raise StreamBrokenError(f"an answer could not be sent: {error}") from error


class InboundStream:
    """Frames of one accepted and greeted connection into `sink`."""

    def __init__(
        self,
        stream: ssl.SSLSocket,
        *,
        sink: PageSink,
        session: Session,
        index: int,
        use: bytes,
        idle_deadline_s: float = IDLE_DEADLINE_S,
        frame_deadline_s: float = FRAME_DEADLINE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = stream
        self._sink = sink
        self._session = session
        self._index = index
        self._use = use
        self._inbox = session.inbox(index)
        self._idle_deadline_s = idle_deadline_s
        self._frame_deadline_s = frame_deadline_s
        self._clock = clock
        self._decoder = Decoder()
        self._header = memoryview(bytearray(HEADER_BYTES))
        # One allocation for all frames: parse_header holds every length against these sizes.
        self._payload = memoryview(
            mmap.mmap(
                -1,
                TABLE_BYTES_MAX + FRAME_RAW_BYTES_MAX,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
            )
        )
        self.frames = 0

    def run(self) -> None:
        """Until the client ends the stream between two frames.

        Raises FrameError for what may not be, StreamBrokenError when the connection ends elsewhere,
        and TargetFailedError when the sink failed.
        """
        while self._read_header():
            header = parse_header(self._header)
            end = header.table_bytes + header.encoded_bytes
            self._fill(self._payload[:end], 0, self._clock() + self._frame_deadline_s)
            table = self._payload[: header.table_bytes]
            body = self._payload[header.table_bytes : end]
            verify(header, self._header, table, body)
            self._inbox.expect(header.sequence)
            with self._session.lock:
                self._session.rounds.admit(header.round)
            witness = self._apply(header, table, body)
            digest = extended(self._inbox.digest, (self._header, table, witness))
            self._session.set_applied(self._index, header, digest)
            self.frames += 1
            send_answer(self._stream, Status.APPLIED, header.sequence)

    def _apply(self, header: FrameHeader, table: memoryview, body: memoryview) -> bytes:
        """Everything that the peer says is checked before the sink hears of any of it.

        Returns what of the body is the frame's witness.
        """
        if header.type == FrameType.FILE:
            name, offset = parse_file(header, table)
            raw = self._decoder.decode(header.codec, body, header.raw_bytes)
            digest = piece_digest(raw)
            self._session.add_piece(self._index, header, name, offset, digest)
            with _sink_errors():
                self._sink.write_file(name, offset, raw)
            return digest
        runs = parse_runs(header, table)
        raw = self._decoder.decode(header.codec, body, header.raw_bytes)
        sink, task, begin = self._sink, header.task, 0
        with _sink_errors():
            for address, pages, kind in runs.tolist():
                if kind == RunKind.ZERO:
                    sink.zero(task, address, pages)
                    continue
                end = begin + pages * PAGE_BYTES
                sink.write(task, address, raw[begin:end])
                begin = end
        return body_tag(self._use, header.sequence, body)

    def _read_header(self) -> bool:
        """Whether another frame came, its header read; False at the end of the stream."""
        self._stream.settimeout(self._idle_deadline_s)
        first = self._read(self._header)
        if first == 0:
            return False
        self._stream.settimeout(self._frame_deadline_s)
        self._fill(self._header, first, self._clock() + self._frame_deadline_s)
        return True

    def _fill(self, view: memoryview, filled: int, cutoff_s: float) -> None:
        """Read until `view` is full."""
        size = len(view)
        while filled < size:
            count = self._read(view[filled:])
            if count == 0:
                raise StreamBrokenError("the connection ended within a frame")
            filled += count
            if self._clock() > cutoff_s:
                raise StreamBrokenError(f"a frame took more than {self._frame_deadline_s} s")

    def _read(self, view: memoryview) -> int:
        try:
            return self._stream.recv_into(view, len(view))
        except OSError as error:  # ssl.SSLError and timeouts are OSErrors
            raise StreamBrokenError(f"the connection broke: {error}") from error


@contextmanager
def _sink_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kind = TargetFullError if error.errno == errno.ENOSPC else TargetFailedError
        raise kind(f"the sink failed: {error}") from error
    except Exception as error:
        raise TargetFailedError(f"the sink failed: {error!r}") from error
