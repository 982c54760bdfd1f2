"""The pager's process, seen from the agent: started before CRIU, heard on a pipe, outlives us.

What the pager does is in `criu_glue/pager.py`; this only starts it and reads its progress.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from criu_glue import pager
from migrate import config
from migrate.errors import RestoreFailed
from migrate.processes import Outliving, kill_tree

if TYPE_CHECKING:
    from collections.abc import Callable

# A line of the pager's progress has a handful of numbers.
LINE_BYTES_MAX = 64 * 1024
SOURCE = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class FillResult:
    """What the fill took. faults: pages that were needed before the fill brought them."""

    fill_ms: float
    faults: int
    filled_bytes: int


class PagerProcess:
    """One pager. `start` returns when CRIU may be started."""

    def __init__(
        self,
        process: Outliving,
        progress: asyncio.StreamReader,
        transport: asyncio.ReadTransport,
    ) -> None:
        self._process = process
        self._progress = progress
        self._transport = transport

    @classmethod
    async def start(cls, work_dir: Path, store_dir: Path, image_dir: Path) -> PagerProcess:
        """Start the pager of one restore. Raises RestoreFailed."""
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        command = pager.command(
            work=work_dir, images=image_dir, store=store_dir, progress_fd=write_fd
        )
        try:
            with (work_dir / "pager.log").open("wb") as log:
                process = Outliving(
                    command,
                    env={**os.environ, "PYTHONPATH": str(SOURCE)},
                    stdout=log.fileno(),
                    stderr=log.fileno(),
                    pass_fds=(write_fd,),
                )
        finally:
            os.close(write_fd)
        reader = asyncio.StreamReader(LINE_BYTES_MAX)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb", buffering=0)
        )
        self = cls(process, reader, transport)
        async with asyncio.timeout(config.PREPARE_DEADLINE_S):
            await self._until("listening")
        return self

    async def wait_filled(
        self, deadline_s: float, on_progress: Callable[[int, int], None] = lambda *_: None
    ) -> FillResult:
        """Wait until every page is in place. `on_progress` hears (filled, missing) bytes."""
        async with asyncio.timeout(deadline_s):
            done = await self._until("done", on_progress)
            await self._process.wait()
        self._transport.close()
        return FillResult(done["fill_ms"], done["faults"], done["filled_bytes"])

    async def end(self) -> None:
        """End a pager whose tasks are dead, or never came. Idempotent."""
        if self._process.returncode is None:
            # Its worker ends by itself only when all is filled, or before any task came.
            kill_tree(self._process.pid)
            await self._process.wait()
        self._transport.close()

    async def _until(
        self, wanted: str, on_progress: Callable[[int, int], None] = lambda *_: None
    ) -> dict[str, Any]:
        while line := await self._progress.readline():
            event: dict[str, Any] = json.loads(line)
            match event["event"]:
                case "error":
                    raise RestoreFailed(f"the pager failed: {event['reason']}", phase="fill")
                case "fault_stats":
                    on_progress(event["filled_bytes"], event["missing_bytes"])
                case name if name == wanted:
                    return event
        raise RestoreFailed(f"the pager ended before {wanted!r}", phase="fill")
