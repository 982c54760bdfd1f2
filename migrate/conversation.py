"""The coordinator's conversation with the target: what is heard becomes events, silence too.

Wraps the TargetLink of one migration, and reconnects it when it breaks:

    the container runs          for the patience that the user gave
    it stands still (`watch`)   until the target was silent for as long as the user allows
    it is being handed over     not at all: the machine asks (`stop_watching`, until Running)

A target that says that the session is gone, or a host that goes on refusing connections, ends it
sooner. What is told meanwhile is sent when the link is back. This module knows the messages, not
what is to be done about them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any, TypeVar

from migrate import config
from migrate.core import messages
from migrate.core.clock_relation import ClockRelation
from migrate.core.events import SourceEventKind as E
from migrate.core.events import event_of_target_message
from migrate.errors import MigrateError, Unreachable
from migrate.target_link import NobodyListens, SessionGone

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from migrate.core.messages import SourceMessage, TargetMessage
    from migrate.target_link import TargetLink

AskedT = TypeVar("AskedT")


class Conversation:
    """See the module. `post` takes the events, `note` the errors that come with them."""

    def __init__(
        self,
        link: TargetLink,
        post: Callable[[E], Awaitable[None]],
        note: Callable[[MigrateError], None],
        *,
        patience_s: float,
        silence_s: float = config.FROZEN_SILENCE_S,
    ) -> None:
        self.link = link
        self.marks: dict[str, int] = {}
        self._fill: asyncio.Future[messages.FillDone | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._post = post
        self._note = note
        self._patience_s = self._patience_running_s = patience_s
        self._silence_s = silence_s
        self._listening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._is_lost = False

    async def connect(self) -> None:
        """Open the control channel, or open it again. Raises Unreachable."""
        is_first = self._listening is None
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        try:
            await self.link.connect(anew=is_first)
        except SessionGone:
            if is_first:
                raise
            # It may know the session from its journal alone.
            await self.link.connect(anew=True)
        self._is_lost = False
        self._listening = asyncio.create_task(self._listen())

    async def relate_clocks(self) -> ClockRelation:
        """How the target's clock relates to this host's. Raises Unreachable."""
        return ClockRelation.from_samples(await self._patiently(self.link.ping))

    async def wait_heard(self) -> None:
        """Returns when the target has just been heard. Raises Unreachable."""
        await self._patiently(lambda: self.link.ping(1))

    async def tell(self, message: SourceMessage) -> None:
        """Send a message, now or when the link is back."""
        await self.link.tell(message)

    async def tell_even_if_lost(self, message: SourceMessage) -> None:
        """Send a message, over a new channel if need be; a target that can't hear is left alone."""
        with contextlib.suppress(Unreachable, TimeoutError):
            async with asyncio.timeout(config.LAST_WORD_DEADLINE_S):
                if self._is_lost or not self.link.is_open:
                    await self.connect()
                await self.link.tell(message)

    async def wait_filled(self) -> messages.FillDone | None:
        """What the target tells of the end of the fill; None when it can't be heard any more."""
        ways: set[asyncio.Future[Any]] = {self._fill}
        if self._listening is not None:
            ways.add(self._listening)
        # The last try to connect may have failed, and then nobody listens.
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        return self._fill.result() if self._fill.done() else None

    def watch(self) -> None:
        """From now on a target that is silent for too long is a lost link."""
        self._patience_s = self._silence_s
        self._watching = asyncio.create_task(self._watch())

    def stop_watching(self) -> None:
        """Silence is nothing special any more, and a broken link a lost one."""
        self._patience_s = 0.0
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None

    async def close(self) -> None:
        """End it. Idempotent."""
        self.stop_watching()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait({self._listening})
        await self.link.close()

    async def _watch(self) -> None:
        """Silence is counted in turns of this loop: while it does not turn, because this host is
        short of processors, nobody asks and nobody listens."""
        silent_s = 0.0
        while silent_s < self._silence_s:
            heard_s = self.link.heard_s
            asking = asyncio.create_task(self._ask())
            await asyncio.sleep(config.FROZEN_PING_S)
            asking.cancel()
            silent_s = 0.0 if self.link.heard_s > heard_s else silent_s + config.FROZEN_PING_S
        silence = f"{self.link.host} was silent for {self._silence_s:g} s"
        await self._lost(Unreachable(f"{silence} while the container stood still"))

    async def _ask(self) -> None:
        with contextlib.suppress(Unreachable):
            await self.link.ping(1)

    async def _listen(self) -> None:
        try:
            while True:
                async for message in self.link.listen():
                    await self._hear(message)
                await self._reconnect()
        except MigrateError as error:
            await self._lost(error)

    async def _reconnect(self) -> None:
        """Open the channel again. Raises Unreachable when patience ends."""
        broke_s = time.monotonic()
        refused_s: float | None = None
        host, patience_s = self.link.host, self._patience_s
        remedy = f"see that {host} and the network up to it work, and try again"
        error = Unreachable(f"the link to {host} was lost", host=host, remedy=remedy)
        while time.monotonic() - broke_s < self._patience_s:
            try:
                await self.link.connect()
            except SessionGone:
                raise
            except NobodyListens as refusal:
                error = refusal
                refused_s = refused_s or time.monotonic()
                # Nobody stands still for longer than it takes to be told so twice.
                limit_s = config.LINK_REFUSED_S if self._watching is None else 0.0
                if time.monotonic() - refused_s > limit_s:
                    raise
            except Unreachable as failure:
                error, refused_s = failure, None
            else:
                return
            await asyncio.sleep(config.RECONNECT_PAUSE_S)
        if patience_s == 0:
            raise error
        raise Unreachable(
            f"the link to {host} broke and was not back within {patience_s:g} s: {error.message}",
            host=host,
            remedy=error.remedy,
        )

    async def _patiently(self, ask: Callable[[], Awaitable[AskedT]]) -> AskedT:
        """Ask again over new connections for as long as they are waited for."""
        began_s = time.monotonic()
        while True:
            try:
                return await ask()
            except Unreachable:
                if time.monotonic() - began_s > self._patience_s:
                    raise
                await asyncio.sleep(config.RECONNECT_PAUSE_S)

    async def _lost(self, error: MigrateError) -> None:
        self._is_lost = True
        self._note(error.at(host=self.link.host))
        self._filled(None)
        await self._post(E.LINK_LOST)

    def _filled(self, fill: messages.FillDone | None) -> None:
        if not self._fill.done():
            self._fill.set_result(fill)

    async def _hear(self, message: TargetMessage) -> None:
        match message:
            case messages.Held(marks=marks):
                self.marks |= marks
            case messages.Running(marks=marks):
                self.marks |= marks
                # It runs, and nothing depends on the link any more.
                self._patience_s = self._patience_running_s
            case messages.FillDone():
                self._filled(message)
            case messages.Failed(error=error):
                where = self.link.host
                self._note(
                    MigrateError(error.message, host=where, phase=error.phase, remedy=error.remedy)
                )
            case _:
                pass
        event = event_of_target_message(message)
        if event is not None:
            await self._post(event.kind)
