"""Which frame may follow which: the bookkeeping that makes a broken stream resumable.

Pure. The sender's side is an `Outbox` for each stream index, the receiver's an `Inbox` for each
stream index and `Rounds` for each session; all of them outlive the connections that carry the
stream.

What they guarantee, together with the receiver's rule that **a stream's former connection has
ended, its last sink call included, before a new one is accepted**:

1. Every frame is applied exactly once and in order within its stream. Sequence numbers of a stream
   index grow by one; the inbox takes the next number only. On a new connection the server tells the
   last number applied; the outbox drops what is known by that and sends the rest again, in order.
2. No frame of a round is applied after a frame of a later round, whichever streams carry them. A
   sender begins a round only when every frame of the former one is acknowledged, that is applied; a
   frame can't be applied twice (1), so that no copy of it can lie around in a forgotten connection.
   `Rounds` checks it: a round below the newest one seen in the session ends the stream that brought
   it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from transport.core.frames import FRAME_RAW_BYTES_MAX, PREFIX_BYTES_MAX
from transport.core.transcript import NOTHING
from transport.errors import FrameOutOfOrderError

WINDOW_BYTES = 8 * (PREFIX_BYTES_MAX + FRAME_RAW_BYTES_MAX)
"""Unacknowledged bytes of one stream: what it can have in flight, and the memory that costs."""
WINDOW_FRAMES = 64
"""Unacknowledged frames of one stream: their answers must fit into socket buffers unread."""


class Numbered(Protocol):
    """A frame that was given its number, and the bytes that it keeps in memory."""

    @property
    def sequence(self) -> int: ...

    @property
    def kept_bytes(self) -> int: ...


FrameT = TypeVar("FrameT", bound=Numbered)


class Outbox(Generic[FrameT]):
    """The frames of one stream index that the target has not acknowledged, oldest first."""

    def __init__(
        self, *, window_bytes: int = WINDOW_BYTES, window_frames: int = WINDOW_FRAMES
    ) -> None:
        self._frames: deque[FrameT] = deque()
        self._bytes = 0
        self._window_bytes = window_bytes
        self._window_frames = window_frames
        self._last = 0
        self._greeted = False

    @property
    def next_sequence(self) -> int:
        return self._last + 1

    @property
    def pending(self) -> int:
        """Frames that are not acknowledged."""
        return len(self._frames)

    def room_for(self, kept_bytes: int) -> bool:
        """Whether a frame fits; an empty window takes any."""
        if not self._frames:
            return True
        return (
            len(self._frames) < self._window_frames
            and self._bytes + kept_bytes <= self._window_bytes
        )

    def add(self, frame: FrameT) -> None:
        if frame.sequence != self.next_sequence:
            raise ValueError(f"frame {frame.sequence} added, {self.next_sequence} is next")
        self._last = frame.sequence
        self._frames.append(frame)
        self._bytes += frame.kept_bytes

    def acknowledged(self, sequence: int) -> FrameT:
        """The target applied this frame, which must be the oldest. Raises FrameOutOfOrderError."""
        if not self._frames or self._frames[0].sequence != sequence:
            raise FrameOutOfOrderError(f"the target acknowledged frame {sequence} out of turn")
        frame = self._frames.popleft()
        self._bytes -= frame.kept_bytes
        return frame

    def resume(self, applied: int) -> tuple[list[FrameT], list[FrameT]]:
        """A connection begins, `applied` being the last frame the target has.

        Returns the frames known by that to be acknowledged, and those to be sent again. Raises
        FrameOutOfOrderError if the target has lost what it had acknowledged, or claims what was
        never sent.
        """
        if not self._greeted and self._last == 0:
            # A former sender of this session may have used the stream: go on with its numbers.
            self._last = applied
        self._greeted = True
        acknowledged_before = self._frames[0].sequence - 1 if self._frames else self._last
        if not acknowledged_before <= applied <= self._last:
            raise FrameOutOfOrderError(
                f"the target has frame {applied} of a stream, but {acknowledged_before} to "
                f"{self._last} is possible: it lost the session, or the session is used twice"
            )
        done = [self._frames.popleft() for _ in range(applied - acknowledged_before)]
        self._bytes = sum(frame.kept_bytes for frame in self._frames)
        return done, list(self._frames)


@dataclass(slots=True)
class Inbox:
    """The last frame of one stream index that was applied, and the digest of all up to it."""

    applied: int = 0
    digest: bytes = NOTHING

    def expect(self, sequence: int) -> None:
        """Raise FrameOutOfOrderError unless this is the next frame."""
        if sequence != self.applied + 1:
            raise FrameOutOfOrderError(f"frame {sequence} came after frame {self.applied}")

    def done(self, sequence: int, digest: bytes) -> None:
        """A frame was applied; `digest` has it in it (`transcript.extended`)."""
        self.applied, self.digest = sequence, digest


@dataclass(slots=True)
class Rounds:
    """The newest round of a session, over all of its streams."""

    newest: int = 0

    def admit(self, number: int) -> None:
        """Raise FrameOutOfOrderError for a round that is over."""
        if number < self.newest:
            raise FrameOutOfOrderError(f"a frame of round {number} came in round {self.newest}")
        self.newest = number
