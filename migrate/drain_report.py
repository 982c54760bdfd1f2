"""What people are told of a drain: by the command that watches it, and by `migrate status`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import msgspec

from migrate.config import DOWNTIME_MS_MAX_DEFAULT
from migrate.errors import EXIT_DONE, EXIT_FAILED, EXIT_IN_DOUBT
from migrate.progress import mib

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from migrate.core.messages import Drained, DrainMove


# A downtime that is longer than asked for by more than half is said to be.
OVER: Final = 1.5


class Line(msgspec.Struct, frozen=True, tag="drain_move", tag_field="event"):
    """Something has become of a container. text: for people."""

    move: DrainMove
    text: str


def progress(state: Drained, told: dict[str, str]) -> Iterator[Line]:
    """What is new since `told` was filled by the call before."""
    if state.asked.dry_run:
        return
    for one in state.moves:
        if one.state != "waiting" and told.get(one.container) != one.state:
            told[one.container] = one.state
            yield Line(one, _move(one, state.host))


def lines(state: Drained) -> list[str]:
    """All of a drain."""
    if state.phase == "none":
        return [f"{state.host} was never drained"]
    what = "undrain" if state.asked.act == "home" else "drain"
    how = "is being planned" if state.phase == "planning" else "is under way"
    if state.phase == "ended":
        how = f"has ended with {state.exit_code}"
    elif not state.is_driven:
        how = "was interrupted: migrate drain-node --resume"
    head = f"{what} {state.drain_id} of {state.host} {how}"
    if state.cordoned:
        head += "; the host is cordoned"
    counts = Counter(one.state for one in state.moves)
    numbers = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    below = [_move(one, state.host) for one in sorted(state.moves, key=lambda one: one.begin_s)]
    return [head, *([f"  {state.why}"] if state.why else []), *below, f"  {numbers or 'nothing'}"]


def exit_code(moves: Collection[DrainMove], *, empties: bool) -> int:
    """Of a drain that has done what it could. empties: it is no undrain, which has failed where
    something is still away."""
    if any(one.state == "held" for one in moves):
        return EXIT_IN_DOUBT
    away = [one for one in moves if one.state == "arrived"]
    failed = any(one.why for one in away) if empties else bool(away)
    return EXIT_FAILED if failed or any(one.state == "stays" for one in moves) else EXIT_DONE


def _move(one: DrainMove, host: str) -> str:
    """One container in a line."""
    match one.state:
        case "waiting" if one.predicted_s:
            end_s = one.begin_s + one.predicted_s
            what = f"→ {one.target or 'is stopped'}  from {one.begin_s:.0f} to {end_s:.0f} s"
        case "waiting":
            what = "waits"
        case "moving":
            what = f"→ {one.target}" if one.target else "is being stopped"
        case "arrived":
            what = f"runs on {one.target}, after {one.seconds:.1f} s"
        case "home":
            what = f"is home from {one.target}, after {one.seconds:.1f} s"
        case "stays":
            what = f"stays on {host}"
        case _:
            what = one.state
    if one.downtime_ms is not None and one.state in ("arrived", "home"):
        what += f", downtime {one.downtime_ms:.0f} ms"
        if one.predicted_downtime_ms is not None:
            what += f", predicted {one.predicted_downtime_ms:.0f}"
        if one.downtime_ms > OVER * DOWNTIME_MS_MAX_DEFAULT:
            what += f" (asked for: {DOWNTIME_MS_MAX_DEFAULT})"
    elif one.predicted_downtime_ms is not None and one.state in ("waiting", "moving"):
        what += f", downtime about {one.predicted_downtime_ms:.0f} ms"
    size = mib(one.memory_bytes)
    return f"  {one.container}  {size}  {what}" + (f": {one.why}" if one.why else "")
