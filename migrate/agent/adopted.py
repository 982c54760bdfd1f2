"""A restore that an agent before this one began, driven from outside.

The same steps as `Restoring` has from the hold on. What an earlier agent heard as events is read
from the marks that CRIU's hook has left, and its words are said at the hook's FIFO by name.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING

from criu_glue import hooks
from migrate import config
from migrate.agent.ending import end_restore, stop_on_zeros
from migrate.agent.pager_process import PagerProcess
from migrate.errors import RestoreFailed
from migrate.processes import waited

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from migrate.agent.pager_process import FillResult
    from migrate.agent.restoring import RestorePlan
    from migrate.runtimes.base import Runtime

_STEP_S = 0.02


class AdoptedRestoring:
    """See the module."""

    def __init__(self, plan: RestorePlan, runtime: Runtime, host: str) -> None:
        self.plan = plan
        self._runtime = runtime
        self._host = host
        self._pager: PagerProcess | None = None

    @property
    def _hold(self) -> Path:
        return self.plan.work_dir / "hold"

    async def is_there(self) -> bool:
        """Whether the copy is held, or may have run already; waits for a restore under way."""
        return await asyncio.to_thread(self._is_there)

    def _is_there(self) -> bool:
        limit_s = time.monotonic() + config.RESTORE_DEADLINE_S
        while not hooks.has_seen(self._hold, "post-resume"):
            if hooks.is_refused(self._hold):
                return False
            is_restoring = hooks.criu_pid(self._hold) is not None
            if not is_restoring or time.monotonic() > limit_s:
                return hooks.is_let_go(self._hold)
            if hooks.is_held(self._hold):
                return True
            time.sleep(_STEP_S)
        return True

    async def commit(self, let_in: Callable[[], Awaitable[None]]) -> dict[str, int]:
        """Let the container run. Raises RestoreFailed when nobody can say whether it does."""
        await asyncio.to_thread(self._commit)
        await let_in()
        return {}

    def _commit(self) -> None:
        def is_over() -> bool:
            if hooks.has_seen(self._hold, "post-resume") or hooks.criu_pid(self._hold) is None:
                return True
            if not hooks.is_let_go(self._hold):
                hooks.say(self._hold, "commit")
            return False

        waited(is_over, config.HANDOVER_DEADLINE_S)
        if not hooks.has_seen(self._hold, "post-resume"):
            raise RestoreFailed(
                f"{self.plan.container} was let go and did not come to run",
                host=self._host,
                phase="committed",
                remedy=f"{self._runtime.name} ps {self.plan.container} shows its tasks;"
                f" see {self.plan.work_dir}",
            )

    async def finish(self) -> FillResult | None:
        """Wait for the last page; None for an eager restore."""
        if not self.plan.lazy:
            return None
        self._pager = await PagerProcess.adopt(self.plan.work_dir)
        on_lost = partial(stop_on_zeros, self.plan, self._runtime)
        return await self._pager.wait_filled(self.plan.fill_deadline_s, on_lost=on_lost)

    async def abort(self) -> None:
        """Nothing restored remains, neither do the processes that did it."""
        await asyncio.to_thread(end_restore, self.plan.session)
        if self._hold.exists():
            name, bundle = self.plan.container, self.plan.bundle
            await asyncio.to_thread(self._runtime.delete, name, bundle=bundle)

    def close(self) -> None:
        """There is nothing to give up."""
