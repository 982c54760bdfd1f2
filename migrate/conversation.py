"""The coordinator's conversation with the target: what is heard becomes events, silence too.

Wraps the TargetLink of one migration. It knows the messages, not what is to be done about them.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from migrate import config
from migrate.core import messages
from migrate.core.clock_relation import ClockRelation
from migrate.core.events import SourceEventKind as E
from migrate.core.events import event_of_target_message
from migrate.errors import MigrateError, Unreachable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from migrate.core.messages import SourceMessage, TargetMessage
    from migrate.target_link import TargetLink


class Conversation:
    """See the module. `post` takes the events, `note` the errors that come with them."""

    def __init__(
        self,
        link: TargetLink,
        post: Callable[[E], Awaitable[None]],
        note: Callable[[MigrateError], None],
    ) -> None:
        self.link = link
        self.marks: dict[str, int] = {}
        self.fill: asyncio.Future[messages.FillDone | None] = (
            asyncio.get_running_loop().create_future()
        )
        self._post = post
        self._note = note
        self._listening: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Open the control channel, or open it again. Raises Unreachable."""
        if self._listening is not None:
            self._listening.cancel()
        await self.link.connect()
        self._listening = asyncio.create_task(self._listen())

    async def relate_clocks(self) -> ClockRelation:
        """How the target's clock relates to this host's."""
        return ClockRelation.from_samples(await self.link.ping())

    async def tell(self, message: SourceMessage) -> None:
        """Send a message. Raises Unreachable."""
        await self.link.tell(message)

    async def tell_even_if_lost(self, message: SourceMessage) -> None:
        """Send a message, over a new channel if need be; a target that can't hear is left alone."""
        with contextlib.suppress(Unreachable, TimeoutError):
            try:
                await self.link.tell(message)
            except Unreachable:
                async with asyncio.timeout(config.LAST_WORD_DEADLINE_S):
                    await self.connect()
                    await self.link.tell(message)

    def watch(self) -> None:
        """From now on a target that is silent for too long is a lost link."""
        self._watching = asyncio.create_task(self._watch())

    def stop_watching(self) -> None:
        """Silence is nothing special any more."""
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
        try:
            while True:
                async with asyncio.timeout(config.FROZEN_SILENCE_S):
                    await self.link.ping(1)
                await asyncio.sleep(config.FROZEN_PING_S)
        except (TimeoutError, Unreachable):
            silence = f"{self.link.host} was silent for {config.FROZEN_SILENCE_S:g} s"
            await self._lost(f"{silence} while the container stood still")

    async def _listen(self) -> None:
        try:
            async for message in self.link.listen():
                await self._hear(message)
        except MigrateError as error:
            self._note(error)
        await self._lost("the link to the target was lost")

    async def _lost(self, why: str) -> None:
        self._note(Unreachable(why, host=self.link.host))
        self._filled(None)
        await self._post(E.LINK_LOST)

    def _filled(self, fill: messages.FillDone | None) -> None:
        if not self.fill.done():
            self.fill.set_result(fill)

    async def _hear(self, message: TargetMessage) -> None:
        match message:
            case messages.Held(marks=marks) | messages.Running(marks=marks):
                self.marks |= marks
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
