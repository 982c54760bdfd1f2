"""The pager, seen from the agent: started before CRIU, followed by any agent, outlives them all.

    started here  ─┐
                   ├─ followed: a byte in a FIFO says "look at the state", its end "nobody is left"
    adopted       ─┘

What the pager does is in `criu_glue/pager.py`. How it is, is never concluded from a child's exit:
its processes replace each other, and an agent that starts later has no child.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from criu_glue import pager, pager_watch
from criu_glue.core.latency import percentile_us
from criu_glue.errors import CriuGlueError
from criu_glue.pager_state import PagerState, PagerStateError, Phase
from migrate import config
from migrate.errors import RestoreFailed
from migrate.processes import Outliving

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class FillResult:
    """What the fill took. faults: pages that were needed before the fill brought them; how long
    half of them waited at most, and 99 % (0 without any)."""

    fill_ms: float
    faults: int
    filled_bytes: int
    fault_p50_us: int
    fault_p99_us: int


class PagerLost(RestoreFailed):
    """No process of the pager is left, and memory was missing: it reads as zeros from now on.

    lost_bytes: so much at most; some of it was filled in the last moments.
    """

    def __init__(self, lost_bytes: int) -> None:
        self.lost_bytes = lost_bytes
        super().__init__(
            f"both processes of the pager were killed with {lost_bytes} bytes of the container's "
            "memory still to come; they read as zeros now",
            phase="fill",
            remedy="end the container and start it anew: its memory can't be trusted",
        )


async def _nobody_asks(_: int) -> None:
    """For who has nothing to do about lost memory."""


class PagerProcess:
    """One pager. Made by `start` or `adopt`, in the event loop that follows it."""

    def __init__(self, work_dir: Path, process: Outliving | None) -> None:
        self._work_dir = work_dir
        self._process = process
        self._alive = pager_watch.open_alive(work_dir)

    @classmethod
    async def start(
        cls, work_dir: Path, store_dir: Path, image_dir: Path, *, on_demand: bool = False
    ) -> Self:
        """Start the pager of one restore; returns when CRIU may be started. on_demand: it is to
        bring what is needed and nothing else. Raises RestoreFailed, and TimeoutError after
        PREPARE_DEADLINE_S."""
        with (work_dir / "pager.log").open("wb") as log:
            process = Outliving(
                pager.command(
                    work=work_dir, images=image_dir, store=store_dir, on_demand=on_demand
                ),
                env={**os.environ, "PYTHONPATH": str(SOURCE)},
                stdout=log.fileno(),
                stderr=log.fileno(),
            )
        self = cls(work_dir, process)
        try:
            async with asyncio.timeout(config.PREPARE_DEADLINE_S):
                await self._until_listening(process)
        except BaseException:
            await self.end()
            raise
        return self

    @classmethod
    async def adopt(cls, work_dir: Path) -> Self:
        """Follow a pager that an earlier agent has started, however it is: at work, ready, or gone.
        Raises RestoreFailed when none was ever started there."""
        try:
            PagerState.read(work_dir)
        except PagerStateError as error:
            raise RestoreFailed(str(error), phase="fill") from error
        return cls(work_dir, None)

    async def wait_filled(
        self,
        deadline_s: float | None,
        on_progress: Callable[[int, int], None] = lambda *_: None,
        on_lost: Callable[[int], Awaitable[None]] = _nobody_asks,
    ) -> FillResult:
        """Wait until every page is in place and the pager has ended.

        `on_progress` hears (filled, missing) bytes. `on_lost` is awaited as soon as no process of
        the pager is left though up to so many bytes are missing: what the container runs on is not
        its memory any more, so this is the place to freeze it. PagerLost is raised after that.
        Raises RestoreFailed when the pager says that it failed, and TimeoutError.
        """
        async with asyncio.timeout(deadline_s):
            while pager_watch.heard(self._alive):
                state = self._read()
                if state.error:
                    raise RestoreFailed(f"the pager failed: {state.error}", phase="fill")
                on_progress(state.filled_bytes, state.missing_bytes)
                await self._change()
        state = self._read()
        if state.ended and state.error:
            # It stayed until nobody waited for memory any more.
            raise RestoreFailed(f"the pager failed: {state.error}", phase="fill")
        if state.phase is not Phase.DONE:
            await on_lost(state.missing_bytes)
            raise PagerLost(state.missing_bytes)
        if self._process is not None:
            # Dead since it was replaced, or in this moment: it would stay a zombie.
            await self._process.wait()
        self.close()
        median_us, p99_us = (percentile_us(state.fault_waits, share) for share in (0.5, 0.99))
        return FillResult(state.fill_us / 1000, state.faults, state.filled_bytes, median_us, p99_us)

    async def end(self) -> None:
        """End a pager whose tasks are dead, or never came, whatever processes it consists of now.
        Idempotent. Raises RestoreFailed when it does not end."""
        try:
            if self._process is not None and self._process.returncode is None:
                # It may not have come so far as to say which processes it is.
                os.killpg(self._process.pid, signal.SIGKILL)
                await self._process.wait()
            deadline_s = config.RUNTIME_EXIT_DEADLINE_S
            await asyncio.to_thread(pager_watch.kill, self._work_dir, deadline_s)
        except CriuGlueError as error:
            raise RestoreFailed(str(error), phase="fill") from error
        finally:
            self.close()

    def close(self) -> None:
        """Follow it no more. Idempotent."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    async def _until_listening(self, process: Outliving) -> None:
        while True:
            is_alive = pager_watch.heard(self._alive)
            state = self._read() if is_alive else None
            if state is not None and state.phase is not Phase.STARTING:
                return
            if process.returncode is not None and not is_alive:
                raise RestoreFailed("the pager ended before it could begin", phase="prepare")
            ways: list[asyncio.Future[object]] = [asyncio.ensure_future(self._change())]
            if process.returncode is None:
                ways.append(asyncio.ensure_future(process.wait()))
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()

    async def _change(self) -> None:
        """Until the pager tells something, or ends."""
        told = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(self._alive, told.set)
        try:
            await told.wait()
        finally:
            loop.remove_reader(self._alive)

    def _read(self) -> PagerState:
        try:
            return PagerState.read(self._work_dir)
        except PagerStateError as error:
            raise RestoreFailed(str(error), phase="fill") from error
