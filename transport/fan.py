"""One stream that goes to several targets: a frame is made once and sent to each of them.

::

    worker ── frame ──┬── OutStream ── TLS ── target 0
                      ├── OutStream ── TLS ── target 1
                      └── ...

A frame counts as applied when all targets have applied it. So the slowest one decides how fast
frames are made, and what is kept to be sent again is one window, whatever the number of targets.

A target that can't go on is left out of all streams at once, and the others go on; the error of the
last one is everybody's. With one target this is an `OutStream`, and no more.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from transport.core.frames import USE_BYTES
from transport.errors import AbortedError, TransportError
from transport.pace import Pace
from transport.stream import OutStream

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from transport.stream import OutFrame

_ResultT = TypeVar("_ResultT")


@dataclass(frozen=True, slots=True)
class Outlet:
    """A target of a transfer: `open_stream(index)` connects to it, TLS done (`tls.connect`), and
    `ticket` (32 bytes) is what its streams are greeted with. lost: hears from some thread that it
    is left out, and why, while others go on."""

    open_stream: Callable[[int], ssl.SSLSocket]
    ticket: bytes
    lost: Callable[[TransportError], None] = lambda _: None


class Targets:
    """Which of a transfer's targets are left, and how many bytes a second may go to all of them
    together; for all of its streams. From any thread."""

    def __init__(
        self, outlets: Sequence[Outlet], rate: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        if not outlets:
            raise ValueError("a transfer needs a target")
        self.outlets = tuple(outlets)
        self._ended = threading.Event()
        self.pace = Pace(rate, self._ended, clock)
        # Set when that one's streams are to end: alone, or with all.
        self.stopped = [threading.Event() for _ in outlets]
        self._lock = threading.Lock()
        self._lost: set[int] = set()
        self._streams: list[tuple[int, OutStream]] = []

    def is_lost(self, number: int) -> bool:
        """Whether it was left out."""
        return number in self._lost

    def add(self, number: int, stream: OutStream) -> None:
        """A stream of this target."""
        self._streams.append((number, stream))

    def lose(self, number: int, error: TransportError) -> bool:
        """Leave one out, unless it is the last; whether it is left out now."""
        with self._lock:
            if number in self._lost:
                return True
            if len(self._lost) + 1 == len(self.outlets):
                return False
            self._lost.add(number)
        self._stop(number)
        self.outlets[number].lost(error)
        return True

    def stop(self) -> None:
        """End all of them."""
        self._ended.set()
        for number in range(len(self.outlets)):
            self._stop(number)

    def _stop(self, number: int) -> None:
        self.stopped[number].set()
        for of_target, stream in self._streams:
            if of_target == number:
                stream.cut()


@dataclass(slots=True, eq=False)
class _Branch:
    """The way to one target. acknowledged: the last frame that it has applied."""

    number: int
    stream: OutStream = field(init=False)
    acknowledged: int = 0


class Fan:
    """Stream `index` to all targets; to be used as an `OutStream` is."""

    def __init__(
        self,
        index: int,
        targets: Targets,
        applied: Callable[[OutFrame], None],
        *,
        patience_s: float,
    ) -> None:
        self._targets = targets
        self._applied = applied
        self._pending: deque[OutFrame] = deque()
        self._all: list[OutStream] = []
        # One for all: so is their digest.
        use = secrets.token_bytes(USE_BYTES)
        self._branches: list[_Branch] = []
        for number, outlet in enumerate(targets.outlets):
            branch = _Branch(number)
            branch.stream = OutStream(
                index,
                ticket=outlet.ticket,
                use=use,
                open_stream=outlet.open_stream,
                stopped=targets.stopped[number],
                applied=self._acknowledged_by(branch),
                pace=targets.pace,
                patience_s=patience_s,
            )
            targets.add(number, branch.stream)
            self._all.append(branch.stream)
            self._branches.append(branch)

    @property
    def frames(self) -> int:
        """How many were given to `send`."""
        return self._branches[0].stream.frames

    @property
    def digest(self) -> bytes:
        """Of all frames, the same for every target."""
        return self._branches[0].stream.digest

    @property
    def bytes_sent(self) -> int:
        """To all targets together."""
        return sum(stream.bytes_sent for stream in self._all)

    @property
    def reopened(self) -> int:
        """Connections that were replaced after a break."""
        return sum(stream.reopened for stream in self._all)

    def ensure_open(self) -> None:
        """See `OutStream`; so are the others."""
        self._each(OutStream.ensure_open)

    def next_sequence(self) -> int:
        self._each(OutStream.next_sequence)
        return self._branches[0].stream.next_sequence()

    def send(self, frame: OutFrame) -> float:
        self._pending.append(frame)
        return sum(self._each(lambda stream: stream.send(frame)))

    def await_answer(self) -> None:
        """Wait until the oldest frame is applied everywhere."""
        if not self._pending:
            return
        oldest = self._pending[0].sequence
        for branch in list(self._branches):
            while branch in self._branches and branch.acknowledged < oldest:
                self._try(branch, OutStream.await_answer)

    def drain(self) -> None:
        self._each(OutStream.drain)

    def close(self) -> None:
        for stream in self._all:
            stream.close()

    def _each(self, act: Callable[[OutStream], _ResultT]) -> list[_ResultT]:
        results = []
        for branch in list(self._branches):
            results += self._try(branch, act)
        return results

    def _try(self, branch: _Branch, act: Callable[[OutStream], _ResultT]) -> list[_ResultT]:
        """The result; none of a target that is left out now. Raises TransportError."""
        try:
            return [act(branch.stream)]
        except TransportError as error:
            is_lost = self._targets.is_lost(branch.number)
            if not is_lost and isinstance(error, AbortedError):
                raise
            if not is_lost and not self._targets.lose(branch.number, error):
                raise
        branch.stream.close()
        self._branches.remove(branch)
        self._settle()
        return []

    def _acknowledged_by(self, branch: _Branch) -> Callable[[OutFrame], None]:
        def acknowledged(frame: OutFrame) -> None:
            branch.acknowledged = frame.sequence
            self._settle()

        return acknowledged

    def _settle(self) -> None:
        """Let go of what every target that is left has applied."""
        done = min(branch.acknowledged for branch in self._branches)
        while self._pending and self._pending[0].sequence <= done:
            self._applied(self._pending.popleft())
