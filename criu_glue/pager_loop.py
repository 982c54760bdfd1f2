"""The pager's loop: page faults first, the background fill in between.

One thread. A turn serves every page fault that waits and then fills one chunk, so a fault waits
for one chunk at most, and the fill goes on however often the tasks fault. Events of a
userfaultfd, decisions and copies can't overtake each other that way (uffd_memory.py says why that
matters). Knows the order of things; the copying is in uffd_memory.py.

Everything that another worker needs to go on is in what the pager's processes share
(pager_pair.py); `begin` takes it up, whether or not there was a worker before.

    CRIU announces tasks  ->  faults are served at once
    "restore finished"    ->  background fill where it is wanted, forked children after
                              those that were restored
    nothing missing       ->  userfaultfd closed, the kernel goes on alone
"""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Final

from criu_glue.core.fill_journal import Space
from criu_glue.core.fill_map import FillMap
from criu_glue.errors import CriuGlueError, TaskGoneError
from criu_glue.fill_source import CHUNK_BYTES, Buffer, FillSourceError, StoreFile
from criu_glue.images import pager_ranges
from criu_glue.lazy_pages_socket import (
    Ended,
    LazyPagesPeer,
    LazyPagesProtocolError,
    Received,
    RestoreFinished,
    TaskAnnounced,
)
from criu_glue.page_store import pages_file_name
from criu_glue.pager_pair import open_connections, open_userfaultfds
from criu_glue.pager_state import Phase, tell
from criu_glue.uffd_memory import Filled, UffdError, UffdMemory, is_gone

if TYPE_CHECKING:
    from criu_glue.core.fill_journal import Replayed
    from criu_glue.pager_pair import Pair

_REPORT_S: Final = 0.5
_COUNT_S: Final = 0.05
# A page fault that has to wait for a change of mappings is tried again after this: the change
# takes microseconds once whoever makes it gets a processor.
_RETRY_S: Final = 0.001
# A task whose cgroup is full waits like any other that allocates; trying more often would only
# keep its reclaim busy.
_NO_MEMORY_S: Final = 0.05


# From CRIU's end of restore the tasks have some 10 ms to go to their first instruction, and what
# they need first they need now: this process is more urgent than they are, and a page fault that
# has to wait for a piece of the fill takes three times as long.
_HEAD_START_S: Final = 0.1


class RestoreFailedError(CriuGlueError):
    """CRIU went away before it had finished the restore."""


class Pager:
    """Fills the memory of the tasks of one restore. `turn` until `is_finished`.

    The pair's `images` is CRIU's image directory after attach_page_store, `store` the page store's
    directory; both are read when a task is announced.
    """

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._state = pair.state
        self._journal = pair.journal
        self._peer: LazyPagesPeer | None = None
        self._epoll = select.epoll()
        self._memories: dict[int, UffdMemory] = {}
        # Userfaultfds of address spaces that can't be filled, for a reason that should not occur.
        self._broken: list[int] = []
        # What those of them still miss that were given up by this worker.
        self._broken_bytes = 0
        # Tasks whose images can't be read.
        self._unreadable: set[int] = set()
        # Faults that can't be served yet: where, and since when (µs).
        self._waiting: list[tuple[UffdMemory, int, int]] = []
        self._waiting_s = _RETRY_S
        self._resting_until_s = 0.0
        self._buffer = Buffer(CHUNK_BYTES)
        self._filling = bool(self._state.overture)
        self._reported_s = 0.0
        self._counted_s = 0.0

    def begin(self) -> None:
        """Wait for CRIU, or go on where another worker ended. Raises CriuGlueError and OSError."""
        found = self._journal.resume(self._missing_at_restore)
        self._settle_descriptors(found)
        stores: dict[int, StoreFile] = {}
        for space in found.spaces.values():
            if space.task in self._unreadable:
                self._broken.append(space.uffd)
                continue
            if space.root not in stores:
                stores[space.root] = self._open_store(space.task)
            self._resume(space, stores[space.root])
        self._count_missing()
        connections = open_connections(self._pair.common)
        if connections:
            self._connect(socket.socket(fileno=connections[0]))
        elif not self._state.connected:
            self._epoll.register(self._pair.listener, select.EPOLLIN)
            self._state.set_phase(Phase.LISTENING, self._pair.alive)
        elif not found.finished:
            raise RestoreFailedError("CRIU has closed the connection before the restore ended")
        if found.finished:
            self._enter_fill()
        if self._peer is not None:
            # Of what an earlier worker had received nobody wakes this one.
            self._receive(self._peer)

    def _missing_at_restore(self, task: int) -> FillMap:
        self._state.beat += 1
        try:
            return FillMap.of(pager_ranges(self._pair.images, task))
        except CriuGlueError as error:
            self._report_error(f"task {task}: {error}")
            self._unreadable.add(task)
            return FillMap()

    def _settle_descriptors(self, found: Replayed) -> None:
        """Bring to its end what an earlier worker had just begun with a userfaultfd."""
        known = {space.uffd for space in found.spaces.values()}
        unknown = [fd for fd in open_userfaultfds() if fd not in known]
        closing = self._state.closing - 1
        if closing in unknown:
            os.close(closing)
            unknown.remove(closing)
        self._state.closing = 0
        received = Received(self._state.criu_number)
        if received.number in found.tasks or (found.finished and received.is_finished):
            received.settle()
        elif received.number > 0 and unknown:
            # It came with its number, and this was not yet written down.
            task, uffd = received.number, unknown.pop()
            number = self._journal.opened(task, uffd)
            missing = self._missing_at_restore(task)
            found.spaces[number] = Space(number, task, number, uffd, missing)
            received.settle()
        if unknown:
            self._broken += unknown
            self._report_error(f"{len(unknown)} userfaultfds are of no known task")
        lost = known - set(open_userfaultfds())
        if lost:
            raise UffdError(f"{len(lost)} userfaultfds were closed by nobody")

    def _resume(self, space: Space, store: StoreFile) -> None:
        memory = UffdMemory(space, store, self._journal, self._state)
        self._take(memory)
        memory.wake_all()
        self._state.beat += 1

    def leave(self) -> list[object]:
        """For a process that was forked from the worker and is none: forget everything without
        closing a descriptor. What is returned must never be forgotten."""
        if self._peer is not None:
            self._peer.detach()
        self._memories.clear()
        self._waiting.clear()
        return [self._epoll]

    @property
    def has_tasks(self) -> bool:
        """Whether anybody's memory is in this pager's hands."""
        return bool(self._memories or self._broken)

    def start_filling(self) -> None:
        """Begin the background fill, though CRIU has not said that the restore is finished or
        nobody wanted it; only when all mappings of all tasks are registered, as they are at CRIU's
        post-restore hook."""
        self._state.overture = 1
        self._filling = True

    def wake_on(self, fd: int) -> None:
        """Have the loop turn when `fd` becomes readable; whoever calls `turn` empties it."""
        self._epoll.register(fd, select.EPOLLIN)

    def wake_no_more_on(self, fd: int) -> None:
        """To be called before `fd` is closed."""
        self._epoll.unregister(fd)

    def is_finished(self) -> bool:
        """Whether everything is filled and given back to the kernel."""
        return self._is_restored and not self.has_tasks

    @property
    def _is_restored(self) -> bool:
        return self._state.restored_us > 0

    def turn(self, wait_s: float) -> None:
        """Do what there is to do; wait at most `wait_s` for something. Raises when nothing is left
        to do though not everything is filled: hold() then."""
        self._state.beat += 1
        if self._is_restored and self._broken and not self._memories:
            raise UffdError(f"{len(self._broken)} tasks can't be filled")
        for fd, _ in self._epoll.poll(self._wait_s(wait_s)):
            memory = self._memories.get(fd)
            if memory is not None:
                self._read_events(memory)
            elif fd == self._pair.listener.fileno():
                self._accept()
            elif self._peer is not None and fd == self._peer.fileno():
                self._receive(self._peer)
        self._serve_waiting()
        if self._filling and time.monotonic() >= self._resting_until_s:
            self._fill_some()
        self._report_now_and_then()

    def hold(self) -> None:
        """After an error: keep every userfaultfd until its task is gone, since closing one turns
        what is missing into zeros, and a task that waits for ever is better than that.

        To be called again and again while `has_tasks`."""
        self._state.beat += 1
        self._memories.clear()
        self._broken = []
        for uffd in open_userfaultfds():
            if is_gone(uffd):
                os.close(uffd)
            else:
                self._broken.append(uffd)
        self._state.broken = len(self._broken)

    def finish(self) -> None:
        """Report the end."""
        self._state.missing_bytes = 0
        self._state.fill_us = max(_now_us() - self._state.restored_us, 1)
        self._state.set_phase(Phase.DONE, self._pair.alive)

    def _wait_s(self, wait_s: float) -> float:
        if self._waiting:
            wait_s = min(wait_s, self._waiting_s)
        if self._filling and any(memory.missing for memory in self._memories.values()):
            wait_s = min(wait_s, max(self._resting_until_s - time.monotonic(), 0.0))
        return wait_s

    # -- CRIU --

    def _accept(self) -> None:
        connection, _ = self._pair.listener.accept()
        self._state.connected = 1
        self._connect(connection)
        # There is one restore for one pager.
        self._epoll.unregister(self._pair.listener)

    def _connect(self, connection: socket.socket) -> None:
        self._state.connected = 1
        self._peer = LazyPagesPeer(connection, Received(self._state.criu_number))
        self._epoll.register(self._peer, select.EPOLLIN)

    def _receive(self, peer: LazyPagesPeer) -> None:
        while (message := peer.receive()) is not None:
            if isinstance(message, Ended):
                self._epoll.unregister(peer)
                peer.close()
                self._peer = None
                if not self._is_restored:
                    raise RestoreFailedError("CRIU closed the connection before the restore ended")
                return
            if isinstance(message, TaskAnnounced):
                self._announce(message.task, message.uffd)
            elif isinstance(message, RestoreFinished):
                self._finish_restore()
            peer.settle()

    def _announce(self, task: int, uffd: int) -> None:
        number = self._journal.opened(task, uffd)
        missing = self._missing_at_restore(task)
        if task in self._unreadable:
            self._broken.append(uffd)
            return
        try:
            store = self._open_store(task)
        except FillSourceError as error:
            self._broken.append(uffd)
            self._report_error(str(error))
            return
        space = Space(number, task, number, uffd, missing)
        self._take(UffdMemory(space, store, self._journal, self._state))
        # Rather too much than too little, until it is counted again.
        self._state.missing_bytes += missing.bytes
        self._state.tasks += 1
        tell(self._pair.alive)

    def _open_store(self, task: int) -> StoreFile:
        try:
            return StoreFile(self._pair.store / pages_file_name(task), self._pair.users)
        except OSError as error:
            raise FillSourceError(f"page store of task {task}: {error}") from error

    def _finish_restore(self) -> None:
        if self._is_restored:
            raise LazyPagesProtocolError("CRIU finished the same restore twice")
        self._journal.finished()
        self._resting_until_s = time.monotonic() + _HEAD_START_S
        self._enter_fill()

    def _enter_fill(self) -> None:
        """Also in the place of another worker."""
        if not self._is_restored:
            self._state.restored_us = _now_us()
        self._state.set_phase(Phase.FILLING, self._pair.alive)
        self._filling = self._filling or not self._pair.on_demand
        for memory in list(self._memories.values()):
            self._drop_if_filled(memory)

    # -- tasks --

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

    def _drop_if_filled(self, memory: UffdMemory) -> None:
        # Before the end of the restore CRIU may still register mappings with it.
        if self._is_restored and not memory.missing:
            self._drop(memory)

    def _give_up(self, memory: UffdMemory, error: CriuGlueError | OSError) -> None:
        """Leave one task waiting for ever rather than give it wrong memory; serve the others."""
        self._forget(memory)
        self._broken.append(memory.uffd)
        self._broken_bytes += memory.missing.bytes
        self._report_error(f"task {memory.task}: {error}")

    def _read_events(self, memory: UffdMemory) -> None:
        heard_us = _now_us()
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
            self._drop_gone()
            return
        for child in events.children:
            self._take(child)
            self._state.missing_bytes += child.missing.bytes
        for address in dict.fromkeys(events.faults):
            self._serve(memory, address, heard_us)
        if self._is_held(memory):
            self._drop_if_filled(memory)

    def _is_held(self, memory: UffdMemory) -> bool:
        return self._memories.get(memory.uffd) is memory

    def _serve_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._waiting_s = _RETRY_S
        for memory, address, heard_us in waiting:
            self._serve(memory, address, heard_us)

    def _serve(self, memory: UffdMemory, address: int, heard_us: int) -> None:
        if not self._is_held(memory):
            return
        try:
            result = memory.serve_fault(address, self._buffer)
        except TaskGoneError:
            self._drop(memory)
            return
        except (UffdError, FillSourceError, OSError) as error:
            self._give_up(memory, error)
            return
        if result is Filled.DONE:
            self._state.count_fault(_now_us() - heard_us)
            return
        self._waiting.append((memory, address, heard_us))
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
            # Whoever changes its mappings has to run before anything can be copied, and is less
            # urgent than this process.
            self._resting_until_s = time.monotonic() + _RETRY_S
        elif result is Filled.NO_MEMORY:
            self._resting_until_s = time.monotonic() + _NO_MEMORY_S
        self._drop_if_filled(memory)

    # -- what others hear --

    def _report_now_and_then(self) -> None:
        now_s = time.monotonic()
        if now_s - self._counted_s < _COUNT_S:
            return
        self._counted_s = now_s
        self._count_missing()
        if now_s - self._reported_s >= _REPORT_S:
            self._reported_s = now_s
            if not self._filling:
                self._drop_gone()
            tell(self._pair.alive)

    def _drop_gone(self) -> None:
        """Tasks end without a word, and who fills nothing would never find out."""
        for memory in [memory for memory in self._memories.values() if memory.is_gone()]:
            self._drop(memory)

    def _count_missing(self) -> None:
        missing = sum(memory.missing.bytes for memory in self._memories.values())
        self._state.missing_bytes = missing + self._broken_bytes

    def _report_error(self, reason: str) -> None:
        # The first one is the cause of those that follow.
        self._state.error = self._state.error or reason
        self._state.broken = len(self._broken)
        tell(self._pair.alive)


def _now_us() -> int:
    return time.monotonic_ns() // 1000
