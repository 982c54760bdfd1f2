"""A TCP server on loopback whose answers a test decides."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

DEADLINE_S = 20.0


class FakeServer:
    """Hands the one connection it accepts to `serve`, in a thread, and closes it afterwards."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(DEADLINE_S)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, name="fake-server", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            # Nobody may have connected: this wakes accept(2).
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE_S)
        self._listener.close()
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            connection.settimeout(DEADLINE_S)
            self._serve(connection)


def lines(connection: socket.socket) -> Callable[[], bytes]:
    """A function that returns the next line, b"" at the end."""
    stream = connection.makefile("rb")

    def next_line() -> bytes:
        try:
            return stream.readline()
        except ConnectionResetError:
            return b""

    return next_line
