"""The ticket of a session: what a data stream has to show, once for each stream.

It is good for one peer, for the session that it was made for, and so for that session's container,
target and epoch; for the streams that the source has announced; and each of these has to come a
first time before the ticket expires. The first greeting of a stream binds it to the `use` that its
sender has drawn: a reconnection shows the same, anybody else who has seen the ticket does not.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from typing import TYPE_CHECKING

from transport.core.frames import TICKET_BYTES
from transport.errors import StreamRefusedError
from transport.identity import Role

if TYPE_CHECKING:
    from collections.abc import Callable

    from transport.core.frames import Hello
    from transport.identity import Peer

LIFE_S = 60.0
"""From the opening of a session to the first connection of each of its data streams: they come
right after the control channel, with two broken links in between at the worst."""


class Ticket:
    """See the module. Any thread."""

    def __init__(
        self, peer: str, streams: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.secret = secrets.token_bytes(TICKET_BYTES)
        self._peer = peer
        self._streams = streams
        self._clock = clock
        self._expires_s = clock() + LIFE_S
        self._uses: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Ticket(peer={self._peer})"

    def is_shown_by(self, hello: Hello) -> bool:
        """Whether the greeting names this ticket, in a time that tells nothing about it."""
        return hmac.compare_digest(self.secret, hello.ticket)

    def admit(self, hello: Hello, peer: Peer) -> None:
        """Let a stream in that shows this ticket. Raises StreamRefusedError, for the log alone."""
        if peer.role is not Role.HOST or peer.name != self._peer:
            raise StreamRefusedError(f"the ticket of {self._peer}, shown by {peer}")
        if hello.stream >= self._streams:
            raise StreamRefusedError(f"stream {hello.stream} of {self._streams}")
        with self._lock:
            use = self._uses.get(hello.stream)
            if use is None and self._clock() > self._expires_s:
                raise StreamRefusedError("the ticket has expired")
            if use is not None and not hmac.compare_digest(use, hello.use):
                raise StreamRefusedError("the ticket has been used for this stream")
            self._uses[hello.stream] = hello.use
