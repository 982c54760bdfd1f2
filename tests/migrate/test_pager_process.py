"""The pager as agents see it: one starts it, another one follows it, and whoever it is hears of the
end, of a failure and of a loss."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from criu_glue import pager_watch
from criu_glue.core.pagemap import PAGE_BYTES
from criu_glue.pager_state import PagerState
from migrate.agent.pager_process import PagerLost, PagerProcess
from migrate.errors import RestoreFailed
from migrate.processes import Outliving, kill_tree
from tests.criu_glue.pager_rig import (
    BASE,
    BASE_PAGE,
    DEADLINE_S,
    PROJECT,
    Restore,
    Task,
    new_restore,
    wait_until,
)

PAGES = 1024
WHOLE = ["wrong", BASE, PAGES, BASE_PAGE]

# An agent that starts a pager, says so, and is killed.
AGENT = """
import asyncio, sys, time
from pathlib import Path
from migrate.agent.pager_process import PagerProcess

async def main():
    pager = await PagerProcess.start(*map(Path, sys.argv[1:]))
    print("started", flush=True)
    time.sleep(1000)

asyncio.run(main())
"""


@pytest.fixture
def restore() -> Iterator[Restore]:
    with new_restore() as made:
        made.has_task(5, [(BASE_PAGE, PAGES)])
        try:
            yield made
        finally:
            pager_watch.kill(made.work, DEADLINE_S)


async def start(restore: Restore) -> PagerProcess:
    return await PagerProcess.start(restore.work, restore.store.directory, restore.images)


@contextlib.contextmanager
def agent_that_starts(restore: Restore) -> Iterator[subprocess.Popen[bytes]]:
    directories = (restore.work, restore.store.directory, restore.images)
    with subprocess.Popen(
        [sys.executable, "-c", AGENT, *map(str, directories)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
    ) as agent:
        assert agent.stdout
        assert agent.stdout.readline() == b"started\n"
        yield agent


def announce(restore: Restore) -> Task:
    restore.connect()
    task = restore.announce(5, pages=PAGES)
    restore.wait_for_tasks(1)
    return task


async def test_it_is_followed_to_its_end(restore: Restore) -> None:
    pager = await start(restore)
    task = announce(restore)
    heard: list[tuple[int, int]] = []
    waiting = asyncio.create_task(
        pager.wait_filled(DEADLINE_S, lambda filled, missing: heard.append((filled, missing)))
    )
    await asyncio.sleep(0)
    restore.finish()
    result = await waiting
    assert result.filled_bytes == PAGES * PAGE_BYTES
    assert result.fill_ms > 0
    assert heard
    assert not restore.is_alive()
    assert task.do(WHOLE) == [[]]
    await pager.end()


async def test_a_replacement_is_not_taken_for_the_end(restore: Restore) -> None:
    pager = await start(restore)
    task = announce(restore)
    waiting = asyncio.create_task(pager.wait_filled(DEADLINE_S))
    for _ in range(3):
        await asyncio.to_thread(restore.kill_keeper)
        await asyncio.to_thread(restore.kill_worker)
    assert not waiting.done()
    restore.finish()
    assert (await waiting).filled_bytes == PAGES * PAGE_BYTES
    assert task.do(WHOLE) == [[]]


async def test_another_agent_follows_the_fill(restore: Restore) -> None:
    with agent_that_starts(restore) as agent:
        task = announce(restore)
        agent.kill()
    restore.kill_keeper()
    assert task.do(["wrong", BASE, 16, BASE_PAGE]) == [[]]
    waiting = asyncio.create_task((await PagerProcess.adopt(restore.work)).wait_filled(DEADLINE_S))
    await asyncio.sleep(0)
    restore.finish()
    result = await waiting
    assert result.filled_bytes == PAGES * PAGE_BYTES
    assert result.faults > 0
    # And one that comes when all is over.
    late = await PagerProcess.adopt(restore.work)
    assert await late.wait_filled(DEADLINE_S) == result
    assert task.do(WHOLE) == [[]]


@pytest.mark.parametrize("is_adopted", [False, True])
async def test_a_loss_is_told_at_once(restore: Restore, is_adopted: bool) -> None:
    """In time to freeze the container, before anything else is done about it."""
    pager = await start(restore)
    announce(restore)
    wait_until(lambda: restore.state.missing_bytes > 0)
    first = pager
    if is_adopted:
        restore.kill_both()
        pager = await PagerProcess.adopt(restore.work)
    frozen: list[int] = []

    async def freeze(lost_bytes: int) -> None:
        frozen.append(lost_bytes)

    waiting = asyncio.create_task(pager.wait_filled(DEADLINE_S, on_lost=freeze))
    await asyncio.sleep(0)
    if not is_adopted:
        restore.kill_both()
    with pytest.raises(PagerLost) as caught:
        await waiting
    assert frozen == [PAGES * PAGE_BYTES]
    assert caught.value.lost_bytes == PAGES * PAGE_BYTES
    assert str(PAGES * PAGE_BYTES) in str(caught.value)
    await pager.end()
    await first.end()


async def test_an_end_is_told_to_who_comes_after_it(restore: Restore) -> None:
    """Also when another one still follows it, and has not taken what was told before the end."""
    other = pager_watch.open_alive(restore.work)
    PagerState.create(restore.work)
    with (restore.work / pager_watch.ALIVE_NAME).open("wb") as alive:
        alive.write(b".")
    pager = await PagerProcess.adopt(restore.work)
    with pytest.raises(PagerLost):
        await pager.wait_filled(1.0)
    pager.close()
    os.close(other)


async def test_a_failure_is_told(restore: Restore) -> None:
    pager = await start(restore)
    announce(restore)
    waiting = asyncio.create_task(pager.wait_filled(DEADLINE_S))
    await asyncio.sleep(0)
    restore.disconnect()
    with pytest.raises(RestoreFailed, match="CRIU closed the connection"):
        await waiting
    assert restore.is_alive()
    await pager.end()
    assert not restore.is_alive()


@pytest.mark.parametrize("is_adopted", [False, True])
async def test_it_ends_whatever_it_consists_of(restore: Restore, is_adopted: bool) -> None:
    pager = await start(restore)
    announce(restore)
    restore.kill_keeper()
    restore.kill_worker()
    first = pager
    if is_adopted:
        pager = await PagerProcess.adopt(restore.work)
    await pager.end()
    assert not restore.is_alive()
    await pager.end()
    await first.end()


async def test_none_is_ended_by_the_number_of_another_process(restore: Restore) -> None:
    """Numbers are given again: one in an old state must not end whoever has it now."""
    other = Outliving(["sleep", "1000"])
    alive = os.open(pager_watch.make_alive(restore.work), os.O_RDWR)
    state = PagerState.create(restore.work)
    state.keeper = state.group = other.pid
    state.keeper_ticks = (pager_watch.start_ticks(other.pid) or 0) - 1
    with pytest.raises(pager_watch.PagerStaysError):
        pager_watch.kill(restore.work, 0.1)
    os.close(alive)
    assert other.returncode is None
    kill_tree(other.pid)
    await other.wait()


async def test_one_that_cannot_begin_is_told(restore: Restore) -> None:
    (restore.work / "lazy-pages.socket").mkdir()
    with pytest.raises(RestoreFailed, match="ended before it could begin"):
        await start(restore)
    assert "can't begin" in (restore.work / "pager.log").read_text()


async def test_there_is_none_to_follow(restore: Restore) -> None:
    with pytest.raises(RestoreFailed, match="no pager was started"):
        await PagerProcess.adopt(restore.work)
