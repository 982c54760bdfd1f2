"""What a person or a program sees of a migration while it runs.

The coordinator tells an Observer what happens; here are the two that the command line uses: one for
people (rich; a live line on a terminal, plain lines otherwise) and one for machines (JSON lines on
standard output). Neither decides anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec
from rich.console import Console
from rich.live import Live
from rich.text import Text

if TYPE_CHECKING:
    from types import TracebackType
    from typing import TextIO

MIB = 1 << 20

# Over the lines of the rounds: MiB read, MiB sent, seconds, MiB/s; then what follows from them: how
# fast memory is written (MiB/s), what is left (MiB), and the downtime if frozen now.
ROUNDS_HEADER = "                 MiB      sent       s   MiB/s   dirty/s      left   predicted"


class Started(msgspec.Struct, frozen=True, tag="started", tag_field="event"):
    """A migration begins."""

    migration_id: str
    container: str
    source: str
    target: str
    tracker: str
    restore: str
    memory_bytes: int


class Phase(msgspec.Struct, frozen=True, tag="phase", tag_field="event"):
    """The migration entered a phase; `detail` is a short remark for people."""

    phase: str
    detail: str = ""


class RoundProgress(msgspec.Struct, frozen=True, tag="progress", tag_field="event"):
    """A round under way: what is done of it, and how fast (bytes per second of memory covered)."""

    number: int
    bytes_done: int
    bytes_total: int
    rate_bytes_s: float


class RoundEnded(msgspec.Struct, frozen=True, tag="round", tag_field="event"):
    """A finished round and what follows from it."""

    number: int
    pages: int
    bytes_raw: int
    bytes_sent: int
    duration_ms: float
    rate_bytes_s: float
    dirty_rate_bytes_s: float
    remaining_bytes: int
    predicted_downtime_ms: float
    decision: str


class Throttled(msgspec.Struct, frozen=True, tag="throttled", tag_field="event"):
    """The container is slowed, or slowed more: what it gets of its processor time (per cent), by
    which means, and why."""

    cpu_percent: float
    by: str
    reason: str


class Warned(msgspec.Struct, frozen=True, tag="warning", tag_field="event"):
    """Something the user should know that stops nothing."""

    message: str


class Moved(msgspec.Struct, frozen=True, tag="moved", tag_field="event"):
    """The container runs on the target. downtime_ms: None when a side was lost meanwhile."""

    downtime_ms: float | None
    predicted_downtime_ms: float | None


class Filled(msgspec.Struct, frozen=True, tag="filled", tag_field="event"):
    """All memory has arrived in the container."""

    fill_ms: float
    faults: int


Event = Started | Phase | RoundProgress | RoundEnded | Throttled | Warned | Moved | Filled


class Observer(Protocol):
    """Takes what the coordinator tells; must return quickly and never raise."""

    def tell(self, event: Event) -> None: ...


class Silent:
    """Nobody looks."""

    def tell(self, event: Event) -> None:
        """Ignore it."""


class JsonLines:
    """One JSON object a line, for programs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def tell(self, event: Event) -> None:
        """Write the event as one line."""
        self._stream.write(msgspec.json.encode(event).decode() + "\n")
        self._stream.flush()


class Terminal:
    """Lines that stay, and below them one that lives while a round runs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(Text(""), console=console, transient=True, refresh_per_second=8)
        self._has_header = False

    def __enter__(self) -> Terminal:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def tell(self, event: Event) -> None:
        """Show the event."""
        if isinstance(event, RoundProgress):
            self._live.update(_progress_line(event))
            return
        self._live.update(Text(""))
        if isinstance(event, RoundEnded) and not self._has_header:
            self._has_header = True
            self._console.print(Text(ROUNDS_HEADER, "dim"))
        self._console.print(describe(event), highlight=False)


def describe(event: Event) -> Text:
    """One line of an event for people."""
    match event:
        case Started():
            text = Text.assemble(
                (event.container, "bold"), f"  {event.source} → {event.target}", "  "
            )
            text.append(
                f"{mib(event.memory_bytes)}, tracker {event.tracker}, {event.restore} restore",
                "dim",
            )
            return text
        case Phase():
            return Text(f"  {event.phase:<10} {event.detail}")
        case RoundProgress():
            return _progress_line(event)
        case RoundEnded():
            return Text(
                f"  round {event.number:<4}{event.bytes_raw / MIB:9.1f}"
                f"{event.bytes_sent / MIB:10.1f}"
                f"{event.duration_ms / 1000:8.2f}{event.rate_bytes_s / MIB:8.0f}"
                f"{event.dirty_rate_bytes_s / MIB:10.1f}{event.remaining_bytes / MIB:10.1f}"
                f"{event.predicted_downtime_ms:9.0f} ms"
            )
        case Throttled():
            return Text(
                f"  throttled  to {event.cpu_percent:g} % of its CPU, by {event.by}", "yellow"
            )
        case Warned():
            return Text(f"  warning    {event.message}", "yellow")
        case Moved():
            return Text.assemble(
                "  moved      downtime ",
                ("unknown", "bold yellow")
                if event.downtime_ms is None
                else (f"{event.downtime_ms:.0f} ms", "bold green"),
                f" (predicted {event.predicted_downtime_ms:.0f} ms)"
                if event.predicted_downtime_ms is not None
                else "",
            )
        case Filled():
            return Text(f"  filled     in {event.fill_ms / 1000:.2f} s, {event.faults} faults")


def mib(size_bytes: float) -> str:
    """A size for people."""
    return f"{size_bytes / MIB:.1f} MiB"


def rate(bytes_s: float) -> str:
    """A rate for people."""
    return f"{bytes_s / MIB:.0f} MiB/s"


def _progress_line(event: RoundProgress) -> Text:
    share = event.bytes_done / event.bytes_total if event.bytes_total else 1.0
    width = 30
    filled = round(width * min(share, 1.0))
    return Text.assemble(
        f"  round {event.number:<4} ",
        ("━" * filled, "green"),
        ("━" * (width - filled), "dim"),
        f" {mib(event.bytes_done)} of {mib(event.bytes_total)}  {rate(event.rate_bytes_s)}",
    )
