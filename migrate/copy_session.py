"""The source's side of one copy that is to run on a target, from the question to its fill.

The target goes the way of every container that comes (`core/target_machine.py`). What differs is
here: the source's container runs on whatever becomes of the copy, so nobody's ownership is in
question. What a copy's target is told when it asks follows from that: until the commit nothing is
decided, after it the copy is the target's, and it is given up with the coordinator.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from migrate import config, signing
from migrate.conversation import Conversation
from migrate.core import messages
from migrate.core.events import SourceEventKind as E
from migrate.core.manifest import Binding
from migrate.core.states import SourceState as S
from migrate.driver import quietly
from migrate.errors import DeadlineExceeded, MigrateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migrate.copy_identity import CopyIdentity
    from migrate.core.manifest import SignedManifest
    from migrate.core.messages import OpenSession, SessionOpened
    from migrate.target_link import TargetLink
    from migrate.undertaking import Entry
    from transport.core.transcript import Carried

_FAILURES = frozenset({E.TARGET_FAILED, E.TARGET_ABORTED, E.LINK_LOST, E.TARGET_REFUSED})


class CopySession:
    """See the module. `failed` is done, with an exception, when the target can't go on."""

    def __init__(
        self, link: TargetLink, identity: CopyIdentity, entry: Entry, *, patience_s: float
    ) -> None:
        self.link = link
        self.identity = identity
        self.entry = entry
        self.talk = Conversation(link, self._hear, self._note, patience_s=patience_s)
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.failed.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        self._seen: dict[E, asyncio.Event] = {}
        self._error: MigrateError | None = None
        self._request: OpenSession | None = None
        self._state = S.HELD

    @property
    def host(self) -> str:
        """The target, as the user calls it."""
        return self.link.host

    @property
    def request(self) -> OpenSession:
        """What was asked; there is one from `open` on."""
        assert self._request is not None
        return self._request

    @property
    def is_filled(self) -> bool:
        """Whether all of its memory is to be brought in."""
        return self.identity.fill

    async def open(self, request: OpenSession) -> SessionOpened:
        """Ask for the session. Raises SessionRefused, Unreachable."""
        opened = await self.link.open_session(request)
        self._request = request
        await self.talk.connect()
        return opened

    async def prepare(self, descriptors: tuple[str, str, str]) -> None:
        """Have the target start everything up to the restore; `prepared` waits for it."""
        await self.talk.tell(messages.Prepare(descriptors))

    async def prepared(self) -> None:
        """Returns when the restore waits at its gate."""
        await self._until(E.TARGET_PREPARED, config.PREPARE_DEADLINE_S, "to prepare")

    async def restore(self, request: messages.Restore, *, lazy: bool) -> None:
        """Returns when the copy is held before its first instruction."""
        await self.talk.tell(request)
        deadline_s = config.RESTORE_DEADLINE_S if lazy else config.EAGER_RESTORE_DEADLINE_S
        # The target keeps that one itself, and says what hung.
        deadline_s += config.RUNTIME_EXIT_DEADLINE_S + config.COPY_HOOK_DEADLINE_S
        await self._until(E.TARGET_HELD, deadline_s, "to restore the copy")

    async def run(self) -> None:
        """Let the copy run; returns when it does."""
        self._state = S.COMMITTED
        await self.talk.tell(messages.Commit(self.request.migration_id, self.request.attempt))
        deadline_s = config.HANDOVER_DEADLINE_S + config.RUNTIME_EXIT_DEADLINE_S
        await self._until(E.TARGET_RUNNING, deadline_s, "to let the copy run")

    async def abandon(self, reason: str) -> None:
        """Nothing of it is to remain. A copy that was told to run is the target's."""
        if self._request is None or self._state is S.COMMITTED:
            return
        request = self._request
        abort = messages.Abort(
            request.migration_id, request.attempt, reason[: messages.MAX_TEXT] or "given up"
        )
        await quietly(self.talk.tell_even_if_lost(abort))

    async def close(self) -> None:
        """End the conversation. Idempotent."""
        await self.talk.close()

    def sealed(self, source: str, carried: Carried) -> SignedManifest:
        """What was sent, signed by this host for this copy and for no other."""
        assert self.link.opened is not None
        request = self.request
        binding = Binding(
            migration_id=request.migration_id,
            container=request.container,
            epoch=request.attempt,
            source=source,
            target=self.link.opened.host,
            versions=request.versions,
            protocol=messages.PROTOCOL,
        )
        manifest = signing.manifest_of(binding, carried, time.time())
        return signing.sealed(manifest, self.link.identity)

    async def _until(self, kind: E, deadline_s: float, to: str) -> None:
        seen = asyncio.create_task(self._event(kind).wait())
        ways: Sequence[asyncio.Future[object]] = (seen, self.failed)  # type: ignore[assignment]
        try:
            await asyncio.wait(ways, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            seen.cancel()
        if self._event(kind).is_set():
            return
        if self.failed.done():
            self.failed.result()
        raise DeadlineExceeded(f"{self.host} took too long {to}", host=self.host)

    def _event(self, kind: E) -> asyncio.Event:
        return self._seen.setdefault(kind, asyncio.Event())

    def _note(self, error: MigrateError) -> None:
        self._error = self._error or error

    async def _hear(self, kind: E) -> None:
        if kind is E.TARGET_ASKS:
            request = self.request
            said = messages.State(request.migration_id, request.attempt, str(self._state))
            await self.talk.tell(said)
        elif kind in _FAILURES and not self.failed.done():
            what = f"{self.host} has given up the copy {self.identity.name}"
            self.failed.set_exception(self._error or MigrateError(what, host=self.host))
        self._event(kind).set()
