"""All copies that go to one host: the transfer is for the first, the others have what it has.

    open      sessions of all of them          prepare   each comes to its restore's gate
    copy_rootfs, send_snapshot: the first's    restore   each is held before its first instruction
                                               run       each runs

`failed` is done, with an exception, when nothing can come to this host any more. A copy that fails
for itself is left out, as long as it is not the one that all others live on.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from migrate.copying import rootfs_source, told_pass
from migrate.errors import MigrateError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from pathlib import Path

    from migrate.copy_session import CopySession
    from migrate.facts import ContainerFacts
    from migrate.options import Options
    from migrate.progress import Observer
    from migrate.rootfs import RootfsSource
    from migrate.rootfs_snapshot import RootfsSnapshot

_T = TypeVar("_T")


class HostCopies:
    """See the module. `left_out` is told of a copy that is given up, and why."""

    def __init__(
        self,
        copies: Sequence[CopySession],
        facts: ContainerFacts,
        options: Options,
        observer: Observer,
        left_out: Callable[[CopySession, MigrateError], None],
    ) -> None:
        self.first = copies[0]
        self.copies = list(copies)
        self.host = self.first.host
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self.first.failed.add_done_callback(self._first_failed)
        self._facts = facts
        self._options = options
        self._observer = observer
        self._left_out = left_out
        self._rootfs: RootfsSource | None = None

    def fail(self, error: MigrateError) -> None:
        """Nothing can come to this host any more."""
        if not self.failed.done():
            self.failed.set_exception(error)

    def begin(self, directory: Path, source: str) -> None:
        """Files can be sent from here on; `directory` is for that."""
        directory.mkdir(mode=0o700)
        link = self.first.link
        bytes_s = self._options.bandwidth_bytes_s
        self._rootfs = rootfs_source(
            self._facts, self._options, link, directory, source, lambda: bytes_s
        )

    async def or_failure(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, or what has ended the transfer meanwhile."""
        running = asyncio.create_task(work)
        try:
            ways: set[asyncio.Future[Any]] = {running, self.failed}
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if self.failed.done():
                self.failed.result()
            return await running
        finally:
            running.cancel()

    async def copy_rootfs(self) -> None:
        """A pass over the root file system while the container runs."""
        assert self._rootfs is not None
        self._observer.tell(told_pass(await self._rootfs.start(gated=False).wait()))

    async def send_snapshot(self, snapshot: RootfsSnapshot) -> None:
        """Make of the host's files what the snapshot was taken of."""
        assert self._rootfs is not None
        await self._rootfs.send_snapshot(snapshot.copy, snapshot.changed)

    async def each(self, step: Callable[[CopySession], Awaitable[None]]) -> None:
        """A step of each copy, one after the other, the first one's before all. Raises what that
        one's ends with."""
        for copy in list(self.copies):
            try:
                await step(copy)
            except MigrateError as error:
                if copy is self.first:
                    raise
                await self.leave_out(copy, error)

    async def leave_out(self, copy: CopySession, error: MigrateError) -> None:
        """Go on without this copy."""
        self.copies.remove(copy)
        self._left_out(copy, error)
        await copy.abandon(error.message)

    async def give_up(self, error: MigrateError) -> None:
        """Go on without this host."""
        if self._rootfs is not None:
            self._rootfs.cancel()
        # All at once: a host that is silent takes a while for each.
        await asyncio.gather(*(self.leave_out(copy, error) for copy in list(self.copies)))

    def _first_failed(self, ended: asyncio.Future[None]) -> None:
        if not ended.cancelled() and isinstance(error := ended.exception(), MigrateError):
            self.fail(error)
