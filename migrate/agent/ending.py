"""The end of a restore that is not to be, whoever began it, and of a container that lost memory."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

import psutil
import structlog

from criu_glue import hooks, pager_watch
from migrate import cgroup, config
from migrate.guard import CRIU_DIED_DEADLINE_S
from migrate.processes import kill_tree, users_of, waited

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.agent.restoring import RestorePlan
    from migrate.runtimes.base import Runtime

log = structlog.get_logger()

_STEP_S = 0.01


def end_restore(session: Path) -> None:
    """Let a restore undo itself, since a CRIU that is killed leaves its mounts behind; then kill
    what is left of it and its pager. Blocking."""
    hold = session / "work" / "hold"
    if hooks.is_refused(hold):
        # It waits for the end of an init that its runtime, which waits for it, would have to reap.
        wait_criu_ended(hold, 0.0)

    def has_ended() -> bool:
        runtimes = [one for one in users_of(session) if "restore" in one.words]
        if not runtimes and hooks.criu_pid(hold) is None:
            return True
        hooks.abort_from_outside(hold)
        return False

    waited(lambda: has_ended() or hooks.has_criu_died(hold), config.RUNTIME_EXIT_DEADLINE_S)
    waited(has_ended, CRIU_DIED_DEADLINE_S)
    wait_criu_ended(hold, 0.0)
    # As one: the pager's processes replace each other.
    with contextlib.suppress(pager_watch.PagerStaysError):
        pager_watch.kill(session / "work", config.RUNTIME_EXIT_DEADLINE_S)
    for user in users_of(session):
        with contextlib.suppress(psutil.NoSuchProcess):
            user.process.kill()


def end_unheard(plan: RestorePlan, runtime: Runtime) -> bool:
    """Kill a copy that was let go and did not come to run, if nobody can have heard of it; whether
    it was so. Blocking.

    Its tasks may have executed: CRIU lets them run also when it can't tell a dead runtime of it. As
    long as their port is not plugged they have spoken to nobody, and their files are this host's.
    """
    hold = plan.session / "work" / "hold"
    wait_criu_ended(hold, 0.0)
    for process, words in users_of(plan.session):
        # The hook that would plug the port, and what waits for CRIU. The pager is needed until the
        # tasks are dead: without it they would wait for their pages for ever.
        if "criu_glue" not in " ".join(words):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                process.wait(CRIU_DIED_DEADLINE_S)
    if hooks.has_seen(hold, "network-unlock"):
        return False
    runtime.delete(plan.container, bundle=plan.bundle)
    return True


def wait_criu_ended(hold: Path, deadline_s: float) -> None:
    """Returns when the CRIU of a hold is gone; it is killed at the deadline. Blocking."""
    if not waited(lambda: hooks.criu_pid(hold) is None, deadline_s):
        while (criu := hooks.criu_pid(hold)) is not None:
            kill_tree(criu)
            time.sleep(_STEP_S)


async def stop_on_zeros(plan: RestorePlan, runtime: Runtime, lost_bytes: int) -> None:
    """What a container reads from now on is not its memory any more: freeze it at once."""
    group = runtime.restored_cgroup(plan.bundle, plan.container)
    log.error("memory is lost, the container is frozen", container=plan.container, bytes=lost_bytes)
    if group is not None:
        await asyncio.to_thread(cgroup.freeze, group, config.FREEZE_DEADLINE_S)
