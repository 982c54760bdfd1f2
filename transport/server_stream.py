"""The accepting end of a TLS connection, made for receiving much: it reads from TCP in large
pieces.

An `ssl.SSLSocket` makes two system calls for every TLS record of 16 KiB. This reads 256 KiB at a
time into a memory BIO and lets OpenSSL take the records from there: a fifth to a quarter more bytes
a second on one core, most of it time that the kernel no longer takes. Sending is for small answers
only.

::

    TCP --recv, 256 KiB--> incoming BIO --SSL, 16 KiB a record--> the caller's buffer
    TCP <----------------- outgoing BIO <------------------------ alerts, answers

Raises what an SSLSocket would: `ssl.SSLError` and other OSErrors, TimeoutError among them.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time

from transport import tls
from transport.errors import StreamBrokenError

READ_BYTES = 256 << 10
"""Larger pieces fall out of a core's cache before OpenSSL comes to their end."""
HANDSHAKE_READ_BYTES = 16 << 10
"""Before the caller has proven who it is, it gets a buffer for a record, not more."""

_PART_DEADLINE_S = 2.0
_PART_READS_MAX = 1024
"""What `part` throws away at most: a stream's window many times over, in pieces of any size."""


class ServerStream:
    """The server's side of the accepted connection `plain`, which it owns. `shake_hands` comes
    first.

    One thread uses it, only `cut` may be called from any.
    """

    def __init__(self, plain: socket.socket, context: ssl.SSLContext) -> None:
        self._plain = plain
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._buffer = memoryview(bytearray(HANDSHAKE_READ_BYTES))
        try:
            tls.tune(plain)
        except OSError as error:
            plain.close()
            raise StreamBrokenError(f"the caller left: {error}") from error

    def shake_hands(self, *, deadline_s: float = tls.HANDSHAKE_DEADLINE_S) -> str:
        """The handshake; returns the peer's verified name. Raises TlsError or StreamBrokenError."""
        cutoff_s = time.monotonic() + deadline_s
        with tls.handshake_errors("the caller"):
            while True:
                try:
                    self._tls.do_handshake()
                    self._flush()
                    break
                except ssl.SSLWantReadError:
                    self._flush()
                    remaining_s = cutoff_s - time.monotonic()
                    if remaining_s <= 0:
                        raise TimeoutError("the handshake took too long") from None
                    self._plain.settimeout(remaining_s)
                    if not self._receive():
                        raise ConnectionResetError("the caller left in the handshake") from None
                except ssl.SSLError:
                    with contextlib.suppress(OSError):
                        self._flush()  # the alert that tells the caller why
                    raise
        self._buffer = memoryview(bytearray(READ_BYTES))
        return tls.peer_name(self._tls)

    def settimeout(self, deadline_s: float) -> None:
        """For every following wait for the peer."""
        self._plain.settimeout(deadline_s)

    def recv_into(self, view: memoryview) -> int:
        """Some bytes into `view` (not empty); 0 when the peer has ended its side."""
        while True:
            try:
                return self._tls.read(len(view), view)  # type: ignore[return-value]
            except ssl.SSLWantReadError:
                self._flush()  # the peer may have asked for an answer of TLS's own
                if not self._receive():
                    return 0
            except ssl.SSLZeroReturnError:
                return 0

    def sendall(self, data: bytes) -> None:
        """For answers: `data` is copied twice."""
        self._tls.write(data)
        self._flush()

    def cut(self) -> None:
        """Make every blocked and later call, in any thread, end at once."""
        with contextlib.suppress(OSError):  # it had ended by itself
            self._plain.shutdown(socket.SHUT_RDWR)

    def part(self) -> None:
        """Close, so that what was sent last still arrives.

        Closing a socket with unread bytes in it sends a reset, which overtakes an alert or an
        answer that the peer has not read yet. So the peer is given a moment to stop, its bytes
        thrown away.
        """
        cutoff_s = time.monotonic() + _PART_DEADLINE_S
        with self._plain, contextlib.suppress(OSError):  # it is gone already
            self._plain.shutdown(socket.SHUT_WR)
            for _ in range(_PART_READS_MAX):
                remaining_s = cutoff_s - time.monotonic()
                if remaining_s <= 0:
                    break
                self._plain.settimeout(remaining_s)
                if not self._plain.recv_into(self._buffer):
                    break

    def _receive(self) -> bool:
        count = self._plain.recv_into(self._buffer)
        self._incoming.write(self._buffer[:count])
        return count > 0

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._plain.sendall(self._outgoing.read())
