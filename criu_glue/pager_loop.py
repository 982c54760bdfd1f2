"""The pager's loop: page faults first, the background fill in between.

One thread. A turn serves every page fault that waits and then fills one chunk, so a fault waits
for one chunk at most, and the fill goes on however often the tasks fault. Events of a
userfaultfd, decisions and copies can't overtake each other that way (uffd_memory.py says why that
matters). Knows the order of things; the copying is in uffd_memory.py.

    CRIU announces tasks  ->  faults are served at once
    "restore finished"    ->  background fill, forked children after those that were restored
    nothing missing       ->  userfaultfd closed, the kernel goes on alone
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from criu_glue.core.fill_journal import FillJournalError, replay
from criu_glue.core.fill_map import FillMap
from criu_glue.errors import CriuGlueError, TaskGoneError
from criu_glue.fill_source import CHUNK_BYTES, Buffer, FillSourceError, StoreFile
from criu_glue.images import pager_ranges
from criu_glue.lazy_pages_socket import (
    Ended,
    LazyPagesPeer,
    LazyPagesProtocolError,
    RestoreFinished,
    TaskAnnounced,
)
from criu_glue.page_store import pages_file_name
from criu_glue.pager_journal import (
    CONNECTION_NUMBER,
    JOURNAL_BYTES_MAX,
    JOURNAL_NAME,
    Held,
    Journal,
    Keeper,
)
from criu_glue.uffd_memory import Filled, UffdError, UffdMemory, is_gone

if TYPE_CHECKING:
    from pathlib import Path

    from criu_glue.core.fill_journal import Replayed, Space
    from criu_glue.pager_progress import Progress

_REPORT_S: Final = 0.5
# A page fault that has to wait for a change of mappings is tried again after this: the change
# takes microseconds once whoever makes it gets a processor.
_RETRY_S: Final = 0.001
# A task whose cgroup is full waits like any other that allocates; trying more often would only
# keep its reclaim busy.
_NO_MEMORY_S: Final = 0.05
# How often a pager that can't go on looks whether the tasks whose memory it holds have ended.
_HOLD_S: Final = 0.2


class RestoreFailedError(CriuGlueError):
    """CRIU went away before it had finished the restore."""


class Pager:
    """Fills the memory of the tasks of one restore. `turn` until `is_finished`.

    `images` is CRIU's image directory after attach_page_store, `store` the page store's
    directory; both are read when a task is announced.
    """

    def __init__(self, images: Path, store: Path, progress: Progress, keeper: Keeper) -> None:
        self._images = images
        self._store = store
        self._progress = progress
        self._keeper = keeper
        self._listener: socket.socket | None = None
        self._peer: LazyPagesPeer | None = None
        self._epoll = select.epoll()
        self._memories: dict[int, UffdMemory] = {}
        # Could not be filled for a reason that should not occur. Their descriptors stay open.
        self._broken: list[UffdMemory] = []
        # Descriptors whose map is not known (yet): given back by the keeper, or with bad images.
        self._left: list[Held] = []
        self._waiting: list[tuple[UffdMemory, int]] = []
        self._waiting_s = _RETRY_S
        self._resting_until_s = 0.0
        self._buffer = Buffer(CHUNK_BYTES)
        self._journal: Journal | None = None
        self._tasks = 0
        self._filling = False
        self._restored_s: float | None = None
        self._reported_s = 0.0
        self._fault_us_max = 0
        self._fault_us_sum = 0

    def begin(self, listener: socket.socket) -> None:
        """Wait for CRIU on `listener`, or go on where another worker ended, with what it left in
        the journal and at the keeper. Raises CriuGlueError and OSError; every descriptor is still
        held then."""
        held = self._keeper.receive_held()
        self._left = [each for each in held if each.number != CONNECTION_NUMBER]
        found = self._read_journal()
        self._journal = Journal(self._store / JOURNAL_NAME, number_max=found.number_max)
        stores: dict[int, StoreFile] = {}
        while self._left:
            each, space = self._left[-1], found.spaces.get(self._left[-1].number)
            if space is None:
                # Closed in the journal: nothing was missing any more.
                os.close(each.fd)
                self._keeper.release(each.number)
            else:
                if space.root not in stores:
                    stores[space.root] = self._open_store(space.task)
                self._resume(each, space, stores[space.root])
            self._left.pop()
        connections = [each.fd for each in held if each.number == CONNECTION_NUMBER]
        if connections:
            listener.close()
            self._connect(LazyPagesPeer(socket.socket(fileno=connections[0])))
        elif not found.number_max:
            self._listener = listener
            self._epoll.register(listener, select.EPOLLIN)
            self._progress.report("listening")
        elif not found.finished:
            raise RestoreFailedError("CRIU has closed the connection before the restore ended")
        if found.finished:
            self._finish_restore()

    def _read_journal(self) -> Replayed:
        path = self._store / JOURNAL_NAME
        try:
            with path.open("rb") as file:
                data = file.read(JOURNAL_BYTES_MAX + 1)
        except FileNotFoundError:
            if self._left:
                raise
            data = b""
        if len(data) > JOURNAL_BYTES_MAX:
            raise FillJournalError(f"{path} is longer than {JOURNAL_BYTES_MAX} bytes")
        return replay(data, lambda task: FillMap.of(pager_ranges(self._images, task)))

    def _resume(self, held: Held, space: Space, store: StoreFile) -> None:
        memory = UffdMemory(
            held.fd, space.task, space.missing, store, self._journal_now, number=held.number
        )
        self._tasks += space.root == space.number
        self._take(memory)
        memory.wake_all()

    @property
    def has_tasks(self) -> bool:
        """Whether anybody's memory is in this pager's hands."""
        return bool(self._memories or self._broken or self._left)

    def start_filling(self) -> None:
        """Begin the background fill before CRIU says that the restore is finished; only when all
        mappings of all tasks are registered, as they are at CRIU's post-restore hook."""
        self._filling = True

    def wake_on(self, fd: int) -> None:
        """Have the loop turn when `fd` becomes readable; whoever calls `turn` empties it."""
        self._epoll.register(fd, select.EPOLLIN)

    def is_finished(self) -> bool:
        """Whether everything is filled and given back to the kernel."""
        return self._restored_s is not None and not self.has_tasks

    def turn(self, wait_s: float) -> None:
        """Do what there is to do; wait at most `wait_s` for something. Raises when nothing is left
        to do though not everything is filled: hold() then."""
        if self._restored_s is not None and self.has_tasks and not self._memories:
            raise UffdError(f"{len(self._broken) + len(self._left)} tasks can't be filled")
        for fd, _ in self._epoll.poll(self._wait_s(wait_s)):
            memory = self._memories.get(fd)
            if memory is not None:
                self._read_events(memory)
            elif self._listener is not None and fd == self._listener.fileno():
                self._accept(self._listener)
            elif self._peer is not None and fd == self._peer.fileno():
                self._receive(self._peer)
        self._serve_waiting()
        if self._filling and time.monotonic() >= self._resting_until_s:
            self._fill_some()
        self._report_now_and_then()

    def hold(self) -> None:
        """After an error: keep the userfaultfds until the tasks are gone, since closing one turns
        what is missing into zeros, and a task that waits for ever is better than that."""
        self._broken += self._memories.values()
        self._memories.clear()
        if self.has_tasks:
            self._progress.report("holding", count=len(self._broken) + len(self._left))
        while self._broken or self._left:
            self._broken = [memory for memory in self._broken if not memory.is_gone()]
            self._left = [held for held in self._left if not is_gone(held.fd)]
            self._progress.flush()
            time.sleep(_HOLD_S)

    def finish(self) -> None:
        """Report the end."""
        assert self._restored_s is not None
        counters = self._journal_now.counters
        self._progress.report(
            "done",
            tasks=self._tasks,
            faults=counters.faults,
            filled_bytes=counters.filled_bytes,
            zero_bytes=counters.zero_bytes,
            present_bytes=counters.present_bytes,
            unplaced_bytes=counters.unplaced_bytes,
            fill_ms=round(1e3 * (time.monotonic() - self._restored_s), 1),
            fault_us_mean=self._fault_us_sum // max(counters.faults, 1),
            fault_us_max=self._fault_us_max,
        )

    def _wait_s(self, wait_s: float) -> float:
        if self._waiting:
            wait_s = min(wait_s, self._waiting_s)
        if self._filling and any(memory.missing for memory in self._memories.values()):
            wait_s = min(wait_s, max(self._resting_until_s - time.monotonic(), 0.0))
        return wait_s

    # -- CRIU --

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        self._keeper.hold(CONNECTION_NUMBER, CONNECTION_NUMBER, connection.fileno())
        self._connect(LazyPagesPeer(connection))
        # There is one restore for one pager.
        self._epoll.unregister(listener)
        listener.close()
        self._listener = None

    def _connect(self, peer: LazyPagesPeer) -> None:
        self._peer = peer
        self._epoll.register(peer, select.EPOLLIN)

    def _receive(self, peer: LazyPagesPeer) -> None:
        while (message := peer.receive()) is not None:
            if isinstance(message, TaskAnnounced):
                self._announce(message.task, message.uffd)
            elif isinstance(message, RestoreFinished):
                self._finish_restore()
            elif isinstance(message, Ended):
                self._epoll.unregister(peer)
                peer.close()
                self._peer = None
                self._keeper.release(CONNECTION_NUMBER)
                if self._restored_s is None:
                    raise RestoreFailedError("CRIU closed the connection before the restore ended")
                return

    def _announce(self, task: int, uffd: int) -> None:
        held = Held(CONNECTION_NUMBER, task, uffd)
        self._left.append(held)
        try:
            missing = FillMap.of(pager_ranges(self._images, task))
            store = self._open_store(task)
        except CriuGlueError as error:
            self._progress.report("error", reason=f"task {task}: {error}")
            return
        self._left.remove(held)
        self._adopt(UffdMemory(uffd, task, missing, store, self._journal_now))
        self._tasks += 1
        self._progress.report("tasks", count=self._tasks)

    def _open_store(self, task: int) -> StoreFile:
        try:
            return StoreFile(self._store / pages_file_name(task))
        except OSError as error:
            raise FillSourceError(f"page store of task {task}: {error}") from error

    @property
    def _journal_now(self) -> Journal:
        assert self._journal is not None, "neither listening nor resumed"
        return self._journal

    def _finish_restore(self) -> None:
        if self._restored_s is not None:
            raise LazyPagesProtocolError("CRIU finished the same restore twice")
        self._restored_s = time.monotonic()
        self._journal_now.finished()
        self._progress.report("restored")
        self._filling = True
        for memory in list(self._memories.values()):
            self._drop_if_filled(memory)

    # -- tasks --

    def _adopt(self, memory: UffdMemory) -> None:
        if not self._keeper.hold(memory.number, memory.task, memory.uffd):
            self._progress.report("unkept", task=memory.task)
        self._take(memory)

    def _take(self, memory: UffdMemory) -> None:
        self._memories[memory.uffd] = memory
        self._epoll.register(memory.uffd, select.EPOLLIN)

    def _forget(self, memory: UffdMemory) -> None:
        self._waiting = [entry for entry in self._waiting if entry[0] is not memory]
        self._epoll.unregister(memory.uffd)
        del self._memories[memory.uffd]

    def _drop(self, memory: UffdMemory) -> None:
        """Nothing is missing, or nobody is there to miss it."""
        self._forget(memory)
        memory.close()
        self._keeper.release(memory.number)

    def _drop_if_filled(self, memory: UffdMemory) -> None:
        # Before the end of the restore CRIU may still register mappings with it.
        if self._restored_s is not None and not memory.missing:
            self._drop(memory)

    def _give_up(self, memory: UffdMemory, error: CriuGlueError | OSError) -> None:
        """Leave one task waiting for ever rather than give it wrong memory; serve the others."""
        self._forget(memory)
        self._broken.append(memory)
        self._progress.report("error", reason=f"task {memory.task}: {error}")

    def _read_events(self, memory: UffdMemory) -> None:
        try:
            events = memory.read_events()
        except UffdError as error:
            self._give_up(memory, error)
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                self._give_up(memory, error)
                return
            # No room for a forked child's descriptor; children that ended still hold some. The
            # parent waits until the event can be read.
            for other in [other for other in self._memories.values() if other.is_gone()]:
                self._drop(other)
            return
        for child in events.children:
            self._adopt(child)
        for address in dict.fromkeys(events.faults):
            self._serve(memory, address)
        if self._is_held(memory):
            self._drop_if_filled(memory)

    def _is_held(self, memory: UffdMemory) -> bool:
        return self._memories.get(memory.uffd) is memory

    def _serve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._waiting_s = _RETRY_S
        for memory, address in waiting:
            self._serve(memory, address)

    def _serve(self, memory: UffdMemory, address: int) -> None:
        if not self._is_held(memory):
            return
        started_ns = time.monotonic_ns()
        try:
            result = memory.serve_fault(address, self._buffer)
        except TaskGoneError:
            self._drop(memory)
            return
        except (UffdError, FillSourceError, OSError) as error:
            self._give_up(memory, error)
            return
        if result is Filled.DONE:
            memory.counters.faults += 1
            taken_us = (time.monotonic_ns() - started_ns) // 1000
            self._fault_us_sum += taken_us
            self._fault_us_max = max(self._fault_us_max, taken_us)
            return
        self._waiting.append((memory, address))
        if result is Filled.NO_MEMORY:
            self._waiting_s = _NO_MEMORY_S

    def _fill_some(self) -> None:
        memory = next((memory for memory in self._memories.values() if memory.missing), None)
        if memory is None:
            return
        try:
            result = memory.fill_some(self._buffer)
        except TaskGoneError:
            self._drop(memory)
            return
        except (UffdError, FillSourceError, OSError) as error:
            self._give_up(memory, error)
            return
        if result is Filled.AGAIN:
            # Whoever changes its mappings has to run before anything can be copied.
            os.sched_yield()
        elif result is Filled.NO_MEMORY:
            self._resting_until_s = time.monotonic() + _NO_MEMORY_S
        self._drop_if_filled(memory)

    def _report_now_and_then(self) -> None:
        now_s = time.monotonic()
        if now_s - self._reported_s < _REPORT_S:
            return
        self._reported_s = now_s
        if self._memories:
            counters = self._journal_now.counters
            self._progress.report(
                "fault_stats",
                faults=counters.faults,
                filled_bytes=counters.filled_bytes,
                missing_bytes=sum(memory.missing.bytes for memory in self._memories.values()),
            )
