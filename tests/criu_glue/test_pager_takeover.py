"""Every place between two instructions at which a worker may die: another one begins with exactly
what would be there then. The pager's loop runs in this process, so the place can be chosen."""

from __future__ import annotations

import os
import select
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from criu_glue import pager_watch, store_users
from criu_glue.core.fill_journal import Kind
from criu_glue.core.pagemap import PAGE_BYTES
from criu_glue.lazy_pages_socket import RESTORE_FINISHED, listen
from criu_glue.pager_journal import Journal
from criu_glue.pager_loop import Pager, RestoreFailedError
from criu_glue.pager_pair import Pair, descriptors, open_connections, open_userfaultfds
from criu_glue.pager_state import PagerState, Phase
from tests.criu_glue.pager_rig import BASE, BASE_PAGE, ELSEWHERE, Restore, Task, new_restore

PAGES = 64


class Takeover:
    """What a worker left that is dead: `pager` is the next one."""

    def __init__(self, restore: Restore) -> None:
        self.restore = restore
        restore.has_task(5, [(BASE_PAGE, PAGES)])
        self.state = PagerState.create(restore.work)
        self.journal = Journal(self.state)
        self.listener = listen(restore.work)
        restore.connect()
        self.connection = self.listener.accept()[0].detach()
        alive = os.open(pager_watch.make_alive(restore.work), os.O_RDWR | os.O_NONBLOCK)
        users = store_users.use(restore.store.directory)
        self._descriptors = [alive, *os.pipe(), users]
        self.pair = Pair(
            images=restore.images,
            store=restore.store.directory,
            state=self.state,
            journal=self.journal,
            listener=self.listener,
            alive=alive,
            signals=self._descriptors[1],
            # The test plays CRIU in this process too; its end of the connection is not the pager's.
            common=frozenset(descriptors()) - {self.connection},
            users=users,
            on_demand=False,
        )
        self.pager: Pager | None = None

    def task(self) -> Task:
        """A task whose userfaultfd is in the table of descriptors."""
        return self.restore.make_task(pages=PAGES)

    def opened(self) -> tuple[Task, int]:
        """A task that has been written down, and its number."""
        task = self.task()
        self.state.connected = 1
        return task, self.journal.opened(5, task.uffd)

    def number(self, number: int) -> None:
        """The number that was received last."""
        self.state.criu_number[:] = struct.pack("<i", number)

    def begin(self) -> Pager:
        """Another worker."""
        self.pager = Pager(self.pair)
        self.pager.begin()
        return self.pager

    def turn_until(self, done: Callable[[], bool]) -> None:
        """Turn the loop until `done()`."""
        assert self.pager
        for _ in range(20_000):
            if done():
                return
            self.pager.turn(0.01)
        raise AssertionError("did not become true")

    def do(self, task: Task, *operations: list[Any]) -> list[Any]:
        """Have a task do something while the pager turns."""
        task.start(*operations)
        self.turn_until(lambda: has_answered(task))
        return task.results()

    def finish(self) -> None:
        """CRIU says that it is finished and goes; the loop turns until all is filled."""
        self.restore.finish()
        assert self.pager
        self.turn_until(self.pager.is_finished)
        self.pager.finish()
        assert self.state.phase is Phase.DONE
        assert self.state.error == ""

    def close(self) -> None:
        if self.pager:
            self.pager.leave()
        for fd in (*open_userfaultfds(), *open_connections(self.pair.common), *self._descriptors):
            os.close(fd)
        self.listener.close()


def has_answered(task: Task) -> bool:
    """Whether a task has done what it was told."""
    assert task.process.stdout
    return bool(select.select([task.process.stdout], [], [], 0)[0])


@pytest.fixture
def dead() -> Iterator[Takeover]:
    with new_restore() as restore:
        takeover = Takeover(restore)
        try:
            yield takeover
        finally:
            for task in restore.tasks:
                task.end()
            takeover.close()
            restore.store.close()


WHOLE = ["wrong", BASE, PAGES, BASE_PAGE]
FROM_40 = ["wrong", BASE + 40 * PAGE_BYTES, 24, BASE_PAGE + 40]


def test_a_number_was_received_and_its_descriptor_was_not(dead: Takeover) -> None:
    task = dead.task()
    dead.number(5)
    dead.restore.send_descriptor(task.uffd)
    os.close(task.uffd)
    dead.begin()
    assert dead.do(task, WHOLE) == [[]]
    dead.finish()


def test_a_descriptor_was_received_and_not_written_down(dead: Takeover) -> None:
    task = dead.task()
    dead.number(5)
    dead.begin()
    assert dead.do(task, WHOLE) == [[]]
    dead.finish()


def test_a_task_was_written_down_and_its_number_not_settled(dead: Takeover) -> None:
    task, _ = dead.opened()
    dead.number(5)
    dead.begin()
    assert dead.do(task, WHOLE) == [[]]
    dead.finish()


@pytest.mark.parametrize("is_written", [False, True])
def test_the_end_of_the_restore_was_received_and_not_settled(
    dead: Takeover, is_written: bool
) -> None:
    task, _ = dead.opened()
    dead.number(RESTORE_FINISHED)
    if is_written:
        dead.journal.finished()
    pager = dead.begin()
    assert dead.state.phase is Phase.FILLING
    dead.restore.disconnect()
    dead.turn_until(pager.is_finished)
    assert task.do(WHOLE) == [[]]


def test_criu_came_and_nothing_else(dead: Takeover) -> None:
    """The connection was accepted, and not even that was noted."""
    task = dead.task()
    dead.restore.send_task(5, task.uffd)
    os.close(task.uffd)
    dead.begin()
    assert dead.state.connected
    assert dead.do(task, WHOLE) == [[]]
    dead.finish()


def test_criu_went_too_early(dead: Takeover) -> None:
    task, _ = dead.opened()
    os.close(dead.connection)
    with pytest.raises(RestoreFailedError):
        dead.begin()
    assert dead.pager
    dead.pager.hold()
    assert dead.pager.has_tasks
    task.end()
    dead.pager.hold()
    assert not dead.pager.has_tasks


@pytest.mark.parametrize("is_written", [False, True])
def test_a_userfaultfd_was_about_to_be_closed(dead: Takeover, is_written: bool) -> None:
    """All is filled. What stays open by mistake has its task wait for ever at the next page."""
    task, number = dead.opened()
    pager = dead.begin()
    assert dead.do(task, WHOLE) == [[]]
    dead.state.closing = task.uffd + 1
    dead.journal.finished()
    if is_written:
        dead.journal.closed(number)
    pager.leave()
    pager = dead.begin()
    assert (task.uffd in open_userfaultfds()) is not is_written
    dead.restore.disconnect()
    dead.turn_until(pager.is_finished)
    assert open_userfaultfds() == []
    assert task.do(["dontneed", BASE, 4], ["wrong", BASE, 4, None]) == [None, []]


@pytest.mark.parametrize("with_child", [False, True])
def test_events_were_read_and_nothing_more(dead: Takeover, with_child: bool) -> None:
    """The task has gone on already: what was read is known from the journal alone."""
    task, number = dead.opened()
    operations: list[list[Any]] = [
        ["dontneed", BASE, 8],
        ["move", BASE + 16 * PAGE_BYTES, 8, ELSEWHERE, 8, False],
        ["unmap", BASE + 32 * PAGE_BYTES, 8],
    ]
    if with_child:
        operations.append(["fork_waiting", [["wrong", BASE, 8, None], FROM_40]])
    task.start(*operations)
    while not has_answered(task):
        if select.select([task.uffd], [], [], 0.01)[0]:
            units = dead.journal.read(number, task.uffd)
            assert all(kind != Kind.PAGEFAULT for kind, *_ in units)
    task.results()
    dead.begin()
    assert len(open_userfaultfds()) == 1 + with_child
    assert dead.do(
        task,
        ["wrong", BASE, 8, None],
        ["wrong", BASE + 8 * PAGE_BYTES, 8, BASE_PAGE + 8],
        ["wrong", ELSEWHERE, 8, BASE_PAGE + 16],
        FROM_40,
    ) == [[], [], [], []]
    if with_child:
        assert dead.do(task, ["child_results"]) == [[[], []]]
    dead.finish()
    assert dead.state.unplaced_bytes == 0


def test_a_userfaultfd_of_nobody_is_never_closed(dead: Takeover) -> None:
    """Zeros would be the end of it; it waits, and that is told."""
    dead.opened()
    stranger = dead.task()
    dead.begin()
    assert "1 userfaultfds are of no known task" in dead.state.error
    stranger.start(WHOLE)
    for _ in range(50):
        assert dead.pager
        dead.pager.turn(0.001)
    assert stranger.is_waiting()
    assert stranger.uffd in open_userfaultfds()
