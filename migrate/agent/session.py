"""A session on the target: carries out what `core/target_machine.py` asks for, and decides nothing.

One session receives one container. Its control channel is a WebSocket of the source; when that
breaks, the machine says what becomes of the session. Everything that blocks runs in threads.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog
from aiohttp import WSMsgType

from migrate import network
from migrate.agent.restoring import RestorePlan, Restoring
from migrate.agent.workspace import Workspace
from migrate.announce import Announcer
from migrate.core import messages, target_machine
from migrate.core.actions import TargetAction as A
from migrate.core.events import TargetEventKind as E
from migrate.core.events import event_of_source_message
from migrate.core.states import TARGET_TERMINAL
from migrate.core.states import TargetState as S
from migrate.driver import Driver, quietly
from migrate.errors import MigrateError, TransferFailed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp import web

    from migrate import config
    from migrate.journal import JournalWriter
    from migrate.runtimes.base import Runtime
    from transport.receiver import DataListener

log = structlog.get_logger()


class Session:
    """See the module. `run` lasts until the session is done or nothing of it is left."""

    def __init__(
        self,
        request: messages.OpenSession,
        *,
        peer: str,
        host: str,
        paths: config.HostPaths,
        runtime: Runtime,
        journal: JournalWriter,
        data: DataListener,
        opened: messages.SessionOpened,
    ) -> None:
        self.request = request
        self.peer = peer
        self.opened = opened
        self.ticket = bytes.fromhex(opened.ticket)
        self._host = host
        self._runtime = runtime
        self._journal = journal
        self._data = data
        self.workspace = Workspace(request, paths)
        self._network: network.NetworkHandle | None = None
        self._announcer: Announcer | None = None
        self._restoring: Restoring | None = None
        self._channel: web.WebSocketResponse | None = None
        self._was_connected = False
        self.ended = asyncio.Event()
        self._descriptors: tuple[str, str, str] | None = None
        self._restore: messages.Restore | None = None
        self.is_receiving = True
        self._marks: dict[str, int] = {}
        self._fill: messages.FillDone | None = None
        self._error: messages.WireError | None = None
        self._announcing: asyncio.Task[int] | None = None
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.driver = Driver(
            target_machine.machine(),
            self,
            must_record=target_machine.must_record,
            overtaking=frozenset({A.DISCARD}),
            terminal=TARGET_TERMINAL,
            act_failed=E.ACT_FAILED,
            on_state=self._entered,
        )
        self._acts: dict[A, Callable[[], Awaitable[E | None]]] = {
            A.RECEIVE: self._receive,
            A.TELL_OPENED: self._tell_opened,
            A.PREPARE: self._prepare,
            A.TELL_PREPARED: lambda: self._tell(messages.Prepared()),
            A.RESTORE: self._do_restore,
            A.TELL_HELD: lambda: self._tell(messages.Held(self._marks)),
            A.RECORD_COMMIT: self._record_commit,
            A.RESUME: self._resume,
            A.TELL_RUNNING: lambda: self._tell(messages.Running(self._marks)),
            A.FILL: self._do_fill,
            A.TELL_FILLED: self._tell_filled,
            A.CLEAN_UP: self._clean_up,
            A.DISCARD: self._discard,
            A.TELL_ABORTED: self._tell_state,
            A.TELL_FAILED: self._tell_failed,
            A.TELL_STATE: self._tell_state,
            A.CHECK_COPY: self._nothing,
            A.ASK_SOURCE: self._ask_source,
            A.HOLD: self._hold,
        }

    async def run(self) -> S:
        """Drive the session to its end."""
        request = self.request
        await self._journal.begin(
            request.migration_id,
            "target",
            attempt=request.attempt,
            container=request.container,
            runtime=request.runtime,
            peer=self.peer,
            facts={"session": str(self.workspace.session), "bundle": str(self.workspace.bundle)},
        )
        state = await self.driver.run(E.SESSION_ACCEPTED)
        log.info("session ended", migration=self.request.migration_id, state=str(state))
        return state

    async def part(self, why: str) -> None:
        """Close the source's channel."""
        if self._channel is not None:
            await self._channel.close(code=1001, message=why.encode())

    async def serve(self, channel: web.WebSocketResponse) -> None:
        """Read the source's control channel until it ends."""
        self._channel = channel
        if self._was_connected:
            await self.driver.post(E.LINK_BACK, from_peer=True)
        self._was_connected = True
        try:
            async for frame in channel:
                if frame.type is WSMsgType.ERROR:
                    break
                await self._hear(messages.decode_from_source(frame.data))
        finally:
            if self._channel is channel:
                self._channel = None
                await self.driver.post(E.LINK_LOST, from_peer=True)

    # --- what the driver asks of a performer ---

    async def perform(self, action: A) -> E | None:
        """Carry out one act."""
        return await self._acts[action]()

    def failed(self, action: A, error: MigrateError) -> None:
        """Keep the error for TELL_FAILED and for the log."""
        error.at(host=self._host)
        log.error("act failed", migration=self.request.migration_id, action=action, why=str(error))
        self._error = messages.WireError(
            message=error.message[: messages.MAX_TEXT],
            phase=(error.phase or str(self.driver.state))[:128],
            remedy=error.remedy[: messages.MAX_TEXT],
        )
        if not self.ready.done():
            self.ready.set_exception(error)

    async def record(self, state: S, kind: E) -> None:
        """Append the transition to the journal."""
        await self._journal.record(self.request.migration_id, "target", str(state), str(kind))

    # --- acts ---

    async def _receive(self) -> None:
        identity, name = self.request.network, self.request.container
        self._network = await asyncio.to_thread(network.recreate, identity, name)
        await self._journal.note(
            self.request.migration_id,
            "target",
            network=msgspec.to_builtins(self._network),
            made_bundle=True,
        )
        netns = Path(self._network.netns)
        self._announcer = await asyncio.to_thread(Announcer, netns, identity)
        await asyncio.to_thread(self.workspace.make, netns)

    async def _tell_opened(self) -> None:
        self.ready.set_result(None)

    async def _prepare(self) -> E:
        assert self._network is not None
        assert self._descriptors is not None
        plan = RestorePlan(
            container=self.request.container,
            bundle=self.workspace.bundle,
            session=self.workspace.session,
            lazy=self.request.restore == "lazy",
            ports=self._network.ports,
        )
        self._restoring = Restoring(plan, self._runtime, self.workspace.store, self._host)
        await self._restoring.prepare(self._descriptors)
        return E.PREPARED

    async def _do_restore(self) -> E:
        assert self._restoring is not None
        assert self._restore is not None
        assert self._network is not None
        self._check_files(self._restore.files)
        await asyncio.to_thread(self._revoke)
        netns = Path(self._network.netns)
        await asyncio.to_thread(network.hint_neighbours, netns, self.request.network)
        self._marks = await self._restoring.restore()
        return E.CRIU_HELD

    def _check_files(self, files: tuple[messages.ImageFile, ...]) -> None:
        """Every file that the source names is here, whole; otherwise CRIU would guess."""
        for file in files:
            path = self.workspace.image_dir / file.name
            if not path.is_file() or path.stat().st_size != file.size_bytes:
                raise TransferFailed(
                    f"the image file {file.name} did not arrive whole", host=self._host
                )

    async def _record_commit(self) -> E:
        await self._journal.record(
            self.request.migration_id, "target", str(S.COMMITTED), str(E.COMMIT_RECEIVED)
        )
        self._marks = {"commit": time.monotonic_ns() // 1000}
        return E.COMMIT_RECORDED

    async def _resume(self) -> E:
        assert self._restoring is not None
        assert self._announcer is not None
        self._marks |= await self._restoring.commit()
        self._announcer.send()
        self._announcing = asyncio.create_task(self._announcer.announce())
        return E.RESUMED

    async def _do_fill(self) -> E:
        assert self._restoring is not None
        result = await self._restoring.finish()
        self._fill = messages.FillDone(
            fill_ms=result.fill_ms if result else 0.0,
            faults=result.faults if result else 0,
            filled_bytes=result.filled_bytes if result else 0,
        )
        return E.FILL_DONE

    async def _tell_filled(self) -> None:
        assert self._fill is not None
        await self._tell(self._fill)

    async def _clean_up(self) -> None:
        await asyncio.to_thread(self._revoke)
        if self._announcing is not None:
            await quietly(self._announcing)
        self._close_announcer()
        await asyncio.to_thread(self.workspace.wipe_session)

    async def _discard(self) -> E:
        await asyncio.to_thread(self._revoke)
        if self._restoring is not None:
            await self._restoring.abort()
        self._close_announcer()
        if self._network is not None:
            await asyncio.to_thread(network.destroy, self._network)
        await asyncio.to_thread(self.workspace.discard)
        return E.DISCARDED

    def _revoke(self) -> None:
        """No stream writes here any more, and none is let in."""
        self.is_receiving = False
        self._data.revoke(self.ticket)

    def _close_announcer(self) -> None:
        if self._announcer is not None:
            self._announcer.close()
            self._announcer = None

    async def _tell_failed(self) -> None:
        error = self._error or messages.WireError(
            f"the session ended in state {self.driver.state}", phase=str(self.driver.state)
        )
        await self._tell(messages.Failed(error))

    async def _tell_state(self) -> None:
        request = self.request
        await self._tell(
            messages.State(request.migration_id, request.attempt, str(self.driver.settled_state))
        )

    async def _ask_source(self) -> None:
        if self._channel is None:
            # It can be asked when it comes back; nobody is told otherwise what is held here.
            await self._hold()
        await self._tell(messages.Ask(self.request.migration_id, self.request.attempt))

    async def _hold(self) -> None:
        log.warning(
            "the container is held and waits for its source",
            migration=self.request.migration_id,
            container=self.request.container,
            state=str(self.driver.state),
        )

    async def _nothing(self) -> None:
        return

    # --- the channel ---

    def _entered(self, state: S) -> None:
        log.info("session", migration=self.request.migration_id, state=str(state))

    async def _hear(self, message: messages.SourceMessage) -> None:
        match message:
            case messages.Ping(t_us=t_us):
                await self._tell(messages.Pong(t_us, time.monotonic_ns() // 1000))
            case messages.Prepare(descriptors=descriptors):
                self._descriptors = descriptors
            case messages.Restore():
                self._restore = message
            case _:
                pass
        event = event_of_source_message(message)
        if event is not None:
            await self.driver.post(event.kind, from_peer=True)

    async def _tell(self, message: messages.TargetMessage) -> None:
        """Send to the source if it hears; a telling never fails (the machine's rule)."""
        channel = self._channel
        if channel is None or channel.closed:
            return
        try:
            await channel.send_str(messages.encode(message).decode())
        except ConnectionError:
            log.info("the source does not hear", migration=self.request.migration_id)


def new_ticket() -> str:
    """32 random bytes in hex, for the data streams of one session."""
    return secrets.token_hex(32)
