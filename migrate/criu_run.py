"""A runtime and the CRIU that it has started, as one thing that ends.

A runtime ends with its CRIU, as a rule. A CRIU that is killed in its work leaves a parasite or
half-restored tasks, though, which have its end of the runtime's connection open: the runtime waits
on, for what will never come. So CRIU is looked at as well.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from criu_glue.core.log_hints import Hint, explain
from criu_glue.hooks import criu_pid, has_criu_died
from migrate.mounts import is_full
from migrate.processes import last_message, tail, wait_ended
from migrate.runtimes.command import LOG_NAME

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.processes import Outliving

# A network namespace that the container's user namespace owns is made by CRIU and filled by the
# agent: one that is made before can't belong to a user namespace that CRIU makes later.
OWN_NETWORK = "empty-ns net"

# CRIU's log of a large container is a few MiB; the lines that matter are at its end.
_LOG_BYTES_MAX = 4 << 20
# A runtime whose CRIU has failed by itself says so and ends within milliseconds.
_LAST_WORDS_S = 0.2


class RuntimeOrCriu:
    """Ends with either. work_dir: where both have their logs, and CRIU its hooks below `hold`."""

    def __init__(self, process: Outliving, work_dir: Path) -> None:
        self._process = process
        self._work_dir = work_dir
        self._hold = work_dir / "hold"

    async def wait(self) -> int:
        """Return when one of them has ended, and the runtime has had its time to say why. While
        there is no CRIU yet, only the runtime can. May be cancelled."""
        runtime = asyncio.create_task(self._process.wait())
        ways: set[asyncio.Task[int] | asyncio.Task[None]] = {runtime}
        if (criu := criu_pid(self._hold)) is not None:
            ways.add(asyncio.create_task(wait_ended(criu)))
        try:
            if not has_criu_died(self._hold):
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({runtime}, timeout=_LAST_WORDS_S)
        finally:
            for way in ways:
                way.cancel()
        return self._process.returncode or 0

    def why(self, log_name: str) -> Hint:
        """Why it did not come as far as it should: by CRIU's log of that name, or the runtime's, or
        else by how the two are now."""
        hint = explain(tail(self._work_dir / log_name, _LOG_BYTES_MAX))
        said = last_message(tail(self._work_dir / LOG_NAME, _LOG_BYTES_MAX))
        now = self._how_it_is()
        return Hint(hint.line or said or now.line, hint.remedy or now.remedy)

    def _how_it_is(self) -> Hint:
        if is_full(self._work_dir):
            return Hint("no space left on the session's tmpfs", "free memory on this host")
        if self._process.returncode is not None:
            return Hint("it ended without a word", "")
        if has_criu_died(self._hold):
            remedy = "was it killed for want of memory? see dmesg on this host, and try again"
            return Hint("CRIU ended without a word, and its runtime waits for it", remedy)
        return Hint("the runtime or CRIU hangs", "")
