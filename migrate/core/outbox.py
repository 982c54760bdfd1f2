"""What makes a control channel outlive its connections: every message arrives once, and in order.

    one end                                    the other end
      | 1 2 3 ---------------------------------> |   heard 2, then the connection breaks
      | <----------------- "I have heard 2" ---- |   on the next connection, each tells the other
      | 3 -------------------------------------> |

Each end counts the messages that it has heard, and keeps in an `Outbox` those that it has sent.
Pings and what answers them are neither counted nor kept: late, they would be worth nothing. Pure.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from migrate.core.messages import MAX_MESSAGE_BYTES
from migrate.errors import ProtocolError

MESSAGES_MAX: Final = 64
"""Kept of one session and end. A whole migration sends about ten; a target that is asked over and
over answers one for each question, and a new connection makes room."""
BYTES_MAX: Final = 2 * MAX_MESSAGE_BYTES


class Outbox:
    """The messages of one end that the other may not have heard, as texts, oldest first.

    Bounded: beyond the limits the oldest is forgotten. A peer that has not heard a forgotten one
    can't go on; it is refused, never served a gap.
    """

    def __init__(self, *, messages_max: int = MESSAGES_MAX, bytes_max: int = BYTES_MAX) -> None:
        self._messages_max = messages_max
        self._bytes_max = bytes_max
        self._texts: deque[str] = deque()
        self._bytes = 0
        self._sent = 0

    def add(self, text: str) -> None:
        """Keep a message, which is about to be sent for the first time."""
        self._texts.append(text)
        self._bytes += len(text)
        self._sent += 1
        while len(self._texts) > self._messages_max or (
            self._bytes > self._bytes_max and len(self._texts) > 1
        ):
            self._drop()

    def can_resume(self, heard: int) -> bool:
        """Whether a peer that has heard so many messages can be sent all the others."""
        return self._sent - len(self._texts) <= heard <= self._sent

    def resume(self, heard: int) -> tuple[str, ...]:
        """What to send again to a peer that has heard `heard` messages; the others are forgotten.

        Raises ProtocolError for a number that is more than was sent, or less than is kept.
        """
        if not self.can_resume(heard):
            raise ProtocolError(
                f"the peer has heard {heard} messages, but {self._sent - len(self._texts)} to"
                f" {self._sent} is possible: one of both ends has lost its session"
            )
        while self._sent - len(self._texts) < heard:
            self._drop()
        return tuple(self._texts)

    def _drop(self) -> None:
        self._bytes -= len(self._texts.popleft())
