"""A port of another host, brought to this host's loopback through SSH (direct-tcpip, RFC 4254 7.2).

    127.0.0.1:PORT ── here ──> SSH channel ──> sshd over there ──> HOST:PORT as it sees it

Whoever is on this host can reach the local port, so what listens at the other end has to ask for
proof, as TLS with certificates on both sides does. A connection has two threads, one a direction.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING, Final, Self

from transport.ssh.errors import SshError

if TYPE_CHECKING:
    from types import TracebackType

    import paramiko

    from transport.ssh.connection import SshConnection

CONNECTIONS_MAX: Final = 128
"""Streams, channels and passes of one migration are a fifth of this."""
_CHUNK_BYTES: Final = 64 << 10


class Forward:
    """Listens from its making to `close`; connections that stand then are ended."""

    def __init__(self, ssh: SshConnection, host: str, port: int) -> None:
        self._ssh = ssh
        self._to = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=CONNECTIONS_MAX)
        # Of 127.0.0.1, here.
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._open: set[_Joint] = set()
        self._closed = False
        self._acceptor = threading.Thread(target=self._accept, name="ssh-forward", daemon=True)
        self._acceptor.start()

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed = True
            standing = list(self._open)
        # A blocked accept(2) ends with shutdown(2), not with close(2).
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for joint in standing:
            joint.cut()
        self._acceptor.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                is_welcome = not self._closed and len(self._open) < CONNECTIONS_MAX
            if not is_welcome:
                plain.close()
                continue
            threading.Thread(
                target=self._serve, args=(plain,), name="ssh-tunnel", daemon=True
            ).start()

    def _serve(self, plain: socket.socket) -> None:
        try:
            channel = self._ssh.open_tunnel(*self._to)
        except SshError:
            # The caller sees a connection that ends, which is what has happened.
            plain.close()
            return
        joint = _Joint(plain, channel)
        with self._lock:
            self._open.add(joint)
            is_late = self._closed
        if is_late:
            joint.cut()
        joint.run()
        with self._lock:
            self._open.discard(joint)


class _Joint:
    """A connection here and its channel."""

    def __init__(self, plain: socket.socket, channel: paramiko.Channel) -> None:
        self._plain = plain
        self._channel = channel

    def run(self) -> None:
        """Carry bytes both ways until both have ended."""
        plain, channel = self._plain, self._channel
        back = threading.Thread(target=self._back, name="ssh-tunnel-back", daemon=True)
        back.start()
        try:
            while piece := plain.recv(_CHUNK_BYTES):
                channel.sendall(piece)
            channel.shutdown_write()
        except (OSError, EOFError):
            self.cut()
        back.join()
        plain.close()
        channel.close()

    def cut(self) -> None:
        """End both, from any thread."""
        with contextlib.suppress(OSError, EOFError):
            self._channel.close()
        with contextlib.suppress(OSError):
            self._plain.shutdown(socket.SHUT_RDWR)

    def _back(self) -> None:
        try:
            while piece := self._channel.recv(_CHUNK_BYTES):
                self._plain.sendall(piece)
            self._plain.shutdown(socket.SHUT_WR)
        except (OSError, EOFError):
            self.cut()
