"""`migrate`, with a stop at one moment of its state machines, for a test to do its deed there.

    python3 -m tests.faults.halting ARGUMENTS    as `migrate ARGUMENTS`, inside a lab host

    DIRECTORY/armed/MOMENT      made by the test: the first process that comes to it
    DIRECTORY/reached/MOMENT    moves it here, and waits until it is removed

A moment is "SIDE.WHAT.before" or "SIDE.WHAT.after" of an act (`record_commit`) or of the record of
a state in the journal (`enter_frozen`). The wait is one of the event loop's: the process goes on
answering pings, hears its peer, and an undoing may overtake the act that waits, all as if that act
took long. The product contains nothing of this: the performer of every driver is wrapped.

Runs with the host's own Python and must not import anything that only tests have.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

from migrate.cli import main
from migrate.core.states import SourceState
from migrate.driver import Driver

DIRECTORY: Final = Path("/var/lib/faults")
ARMED: Final = DIRECTORY / "armed"
REACHED: Final = DIRECTORY / "reached"
_POLL_S: Final = 0.005


class _Halting:
    """A performer that stops before and after what it has another one do."""

    def __init__(self, performer: Any, side: str) -> None:
        self._performer = performer
        self._side = side

    async def perform(self, action: Any) -> Any:
        await self._halt(f"{action}.before")
        answer = await self._performer.perform(action)
        await self._halt(f"{action}.after")
        return answer

    async def record(self, state: Any, kind: Any) -> None:
        await self._halt(f"enter_{state}.before")
        await self._performer.record(state, kind)
        await self._halt(f"enter_{state}.after")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._performer, name)

    async def _halt(self, moment: str) -> None:
        reached = REACHED / f"{self._side}.{moment}"
        try:
            (ARMED / reached.name).rename(reached)
        except FileNotFoundError:
            return
        while reached.exists():  # noqa: ASYNC110 - another process removes it
            await asyncio.sleep(_POLL_S)


def install() -> None:
    """Wrap the performer of every driver that is made from now on."""
    original = Driver.__init__

    def init(self: Any, machine: Any, performer: Any, **kwargs: Any) -> None:
        side = "source" if isinstance(machine.state, SourceState) else "target"
        original(self, machine, _Halting(performer, side), **kwargs)

    Driver.__init__ = init  # type: ignore[method-assign]


if __name__ == "__main__":
    install()
    main()
