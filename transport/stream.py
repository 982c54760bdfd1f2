"""The sending end of one stream: its connection is reopened when it breaks, and nothing gets lost.

Knows TLS sockets, greetings and answers; does not know pages, files or compression. One thread uses
a stream, only `cut` may be called from any. Frames are written with blocking calls and answers are
read in between, as far as they have arrived; only when the window is full is one waited for.
"""

from __future__ import annotations

import fcntl
import select
import sys
import termios
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transport import tls
from transport.core.connection import Outbox
from transport.core.frames import (
    ANSWER_BYTES,
    Answer,
    Hello,
    Status,
    StreamKind,
    encode_hello,
    parse_answer,
)
from transport.core.transcript import NOTHING, body_tag, extended
from transport.errors import (
    AbortedError,
    PeerNotTrustedError,
    StreamBrokenError,
    StreamBusyError,
    StreamRefusedError,
    TargetFailedError,
    TargetFullError,
    TransportError,
)
from transport.link_time import LinkTime

if TYPE_CHECKING:
    import ssl
    import threading
    from collections.abc import Callable, Iterator

    import numpy as np
    import numpy.typing as npt

    from transport.core.frames import Data
    from transport.pace import Pace

STALL_DEADLINE_S = 30.0
"""For WRITE_BYTES to leave, or for an answer once nothing leaves any more: 1 Mbit/s, shared by 16
streams, is not stalled."""
WRITE_BYTES = 128 << 10
"""Written in one call, which the deadline is for."""
REOPEN_DELAYS_S = (0.0, 0.1, 0.3, 1.0)
"""Pauses before attempts to reopen a stream; the last is used over and over."""
REOPEN_PATIENCE_S = 30.0
"""How long a stream is tried to be reopened; starts anew when one got frames across."""
CONNECTION_BYTES_MAX = 256 << 30
"""One set of AES-GCM keys is good for 2**24.5 records of 16 KiB (RFC 8446, 5.5), 388 GB."""
JOIN_BYTES = 16 << 10
"""Parts that fit together into one TLS record are sent as one."""


def reopenable(error: TransportError) -> bool:
    """Whether a new connection may help: the link's fault, not the peer's decision."""
    return isinstance(error, (StreamBrokenError, StreamBusyError))


@dataclass(frozen=True, slots=True)
class Delivery:
    """What the target will hold when a frame is applied; see `PageHashes.commit`."""

    places: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class OutFrame:
    """A frame ready to be sent, and sent again; `buffer` is to be given back once it is applied.

    What enters the stream's digest is `prefix` and either `piece` or, without one, the tag of
    `body` (`core/transcript.py`).
    """

    sequence: int
    parts: tuple[Data, ...]
    prefix: bytes
    body: Data
    piece: bytes = b""
    delivery: Delivery | None = None
    buffer: object | None = None

    @property
    def kept_bytes(self) -> int:
        return sum(map(len, self.parts))


class OutStream:
    """Stream `index` of the session of `ticket`.

    `open_stream` connects to the target, TLS done, greeting not. use: 16 bytes, secret, see
    `core/frames.py`. `stopped` is set before `cut` is called to end the transfer. `applied` is
    called for every frame that the target has acknowledged, in order. `pace` is that of all streams
    together.
    """

    def __init__(
        self,
        index: int,
        *,
        ticket: bytes,
        use: bytes,
        open_stream: Callable[[int], ssl.SSLSocket],
        stopped: threading.Event,
        applied: Callable[[OutFrame], None],
        pace: Pace,
        patience_s: float = REOPEN_PATIENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._index = index
        self._use = use
        self._hello = encode_hello(Hello(StreamKind.PAGES, index, ticket, use))
        self._open_stream = open_stream
        self._stopped = stopped
        self._applied = applied
        self._pace = pace
        self._patience_s = patience_s
        self._clock = clock
        self._outbox: Outbox[OutFrame] = Outbox()
        self._socket: ssl.SSLSocket | None = None
        self._link: LinkTime | None = None
        self._poll = select.poll()
        self._answer = memoryview(bytearray(ANSWER_BYTES))
        self._sent_before = 0
        self._paced_s = 0.0
        self.digest = NOTHING
        self.bytes_sent = 0
        self.opened = 0

    @property
    def frames(self) -> int:
        """How many were given to `send`, all of them in `digest`."""
        return self._outbox.next_sequence - 1

    @property
    def reopened(self) -> int:
        """Connections that were replaced after a break."""
        return max(self.opened - 1, 0)

    def ensure_open(self) -> None:
        """Open the stream if it is not, or was closed by the other side while it was idle."""
        if self._socket is not None and not self._outbox.pending and self._readable(self._socket):
            self._close_socket()  # Nothing is expected: whatever comes now is an end.
        if self._socket is None:
            self._reopen(None)

    def next_sequence(self) -> int:
        """The number for the next frame. The stream is open afterwards, if it was new."""
        if self.opened == 0:
            self._reopen(None)
        return self._outbox.next_sequence

    def send(self, frame: OutFrame) -> float:
        """Send once the window has room; returns the seconds that the pace and the link took of it,
        or the link for what was sent before (`link_time.py`). Raises TransportError."""
        before_s = self._clock()
        witness = frame.piece or body_tag(self._use, frame.sequence, frame.body)
        self.digest = extended(self.digest, (frame.prefix, witness))
        while not self._outbox.room_for(frame.kept_bytes):
            self.await_answer()
        self._outbox.add(frame)
        try:
            self._transmit(frame)
            self._take_answers()
        except StreamBrokenError as error:
            self._reopen(error)
        # To a limit that somebody has set compression is what it is to a slow link.
        paced_s, self._paced_s = self._paced_s, 0.0
        took_s = max(self._clock() - before_s - paced_s, 0.0)
        return paced_s + (self._link.took_s(took_s) if self._link else 0.0)

    def await_answer(self) -> None:
        """Wait until the oldest frame is acknowledged."""
        before = self._outbox.pending
        while self._outbox.pending >= before > 0:
            try:
                self._take_answer(self._connected())
            except StreamBrokenError as error:
                self._reopen(error)

    def drain(self) -> None:
        """Wait until every frame is acknowledged."""
        while self._outbox.pending:
            self.await_answer()
        if self.bytes_sent - self._sent_before > CONNECTION_BYTES_MAX:
            self._close_socket()  # the next frame, or `ensure_open`, opens one with new keys

    def cut(self) -> None:
        """End whatever the stream is doing, from any thread."""
        stream = self._socket
        if stream is not None:
            tls.cut(stream)

    def close(self) -> None:
        self._close_socket()

    def _transmit(self, frame: OutFrame) -> None:
        stream = self._connected()
        # As a whole: who gets it in small pieces wakes up for each.
        self._paced_s += self._pace.wait_for(frame.kept_bytes)
        with self._link_errors():
            if len(frame.parts) > 1 and frame.kept_bytes <= JOIN_BYTES:
                stream.sendall(b"".join(frame.parts))
            else:
                for part in frame.parts:
                    view = memoryview(part)
                    for begin in range(0, len(view), WRITE_BYTES):
                        stream.sendall(view[begin : begin + WRITE_BYTES])
        self.bytes_sent += frame.kept_bytes

    def _take_answers(self) -> None:
        """Every answer that has arrived."""
        stream = self._connected()
        while self._outbox.pending and self._readable(stream):
            self._take_answer(stream)

    def _take_answer(self, stream: ssl.SSLSocket) -> None:
        with self._link_errors():
            answer = self._read_answer(stream)
        if answer.status != Status.APPLIED:
            raise _refusal(answer.status, self._index)
        self._applied(self._outbox.acknowledged(answer.sequence))

    def _readable(self, stream: ssl.SSLSocket) -> bool:
        return stream.pending() > 0 or bool(self._poll.poll(0))

    def _read_answer(self, stream: ssl.SSLSocket) -> Answer:
        filled = 0
        while filled < ANSWER_BYTES:
            count = self._receive(stream, self._answer[filled:])
            if count == 0:
                raise StreamBrokenError(f"the target closed stream {self._index}")
            filled += count
        return parse_answer(self._answer)

    def _receive(self, stream: ssl.SSLSocket, into: memoryview) -> int:
        """Receive; as long as what was written still leaves, there is no reason to expect more."""
        unsent_bytes = _unsent_bytes(stream)
        while True:
            try:
                return stream.recv_into(into)
            except TimeoutError:
                before, unsent_bytes = unsent_bytes, _unsent_bytes(stream)
                if unsent_bytes >= before:
                    raise

    def _reopen(self, cause: TransportError | None) -> None:
        """Connect, greet, and send again what the target does not have. Raises TransportError."""
        delays_s = _pauses_s()
        end_s = self._clock() + self._patience_s
        while True:
            self._close_socket()
            if self._stopped.wait(next(delays_s)):
                raise AbortedError("the transfer was aborted")
            before = self._outbox.pending
            try:
                self._open()
            except TransportError as error:
                if self._stopped.is_set() or not reopenable(error):
                    raise
                cause = error
                if self._outbox.pending < before:
                    delays_s = _pauses_s()
                    end_s = self._clock() + self._patience_s
                elif self._clock() > end_s:
                    raise StreamBrokenError(
                        f"stream {self._index} cannot be reopened: {cause}"
                    ) from cause
            else:
                return

    def _open(self) -> None:
        try:
            stream = self._open_stream(self._index)
        except OSError as error:
            raise StreamBrokenError(f"stream {self._index} cannot be opened: {error}") from error
        self._socket = stream
        if self._stopped.is_set():  # `cut` may have come before there was something to cut
            raise AbortedError("the transfer was aborted")
        stream.settimeout(STALL_DEADLINE_S)
        self._poll = select.poll()
        self._poll.register(stream, select.POLLIN)
        with tls.handshake_errors("the target"):
            stream.sendall(self._hello)
            answer = self._read_answer(stream)
            self._link = LinkTime(stream)
        if answer.status != Status.ACCEPTED:
            raise _refusal(answer.status, self._index)
        self.opened += 1
        self._sent_before = self.bytes_sent
        done, again = self._outbox.resume(answer.sequence)
        for frame in done:
            self._applied(frame)
        for frame in again:
            self._transmit(frame)
            self._take_answers()

    def _connected(self) -> ssl.SSLSocket:
        if self._socket is None:
            raise StreamBrokenError(f"stream {self._index} is not connected")
        return self._socket

    def _close_socket(self) -> None:
        stream, self._socket = self._socket, None
        if stream is not None:
            stream.close()

    @contextmanager
    def _link_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:  # ssl.SSLError and timeouts are OSErrors
            if self._stopped.is_set():
                raise AbortedError("the transfer was aborted") from error
            raise StreamBrokenError(f"stream {self._index} broke: {error}") from error


def _unsent_bytes(stream: ssl.SSLSocket) -> int:
    """Bytes that the kernel has taken and the peer has not acknowledged (SIOCOUTQ, tcp(7))."""
    return int.from_bytes(fcntl.ioctl(stream, termios.TIOCOUTQ, bytes(4)), sys.byteorder)


def _pauses_s() -> Iterator[float]:
    yield from REOPEN_DELAYS_S
    while True:
        yield REOPEN_DELAYS_S[-1]


def _refusal(status: Status, index: int) -> TransportError:
    if status == Status.BUSY:
        return StreamBusyError(f"the target has no room for stream {index} now")
    if status == Status.DISTRUSTED:
        return PeerNotTrustedError("the target does not accept this host's certificate")
    if status == Status.SINK_FULL:
        return TargetFullError("the target has no room left for what the container has in memory")
    if status in (Status.SINK_FAILED, Status.BAD_FRAME):
        return TargetFailedError(f"the target failed on stream {index}: {status.name}")
    return StreamRefusedError(f"the target refused stream {index}: {status.name}")
