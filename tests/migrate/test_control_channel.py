"""Both ends of the control channel, the agent's front, and a wire that breaks, over real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from aiohttp import web

from migrate import config
from migrate.agent.channel import ControlChannel
from migrate.agent.front_http import Gateway
from migrate.conversation import Conversation
from migrate.core import messages as m
from migrate.core.events import SourceEventKind as E
from migrate.errors import MigrateError, Unreachable
from migrate.target_link import SessionGone, TargetLink
from tests.identities import Fleet
from tests.migrate.wire import Wire
from transport.identity import HostIdentity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

OPENED = m.SessionOpened(
    "m1", "ab" * 32, 1, "localhost", m.Versions("6", "4", "runc", "x86_64"), 1 << 30
)
DEADLINE_S = 20.0


def numbered(number: int) -> m.State:
    return m.State("m1", number, "x")


async def until(what: str, condition: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110  (of things that know no events)
                await asyncio.sleep(0.002)
    except TimeoutError:
        raise AssertionError(f"not within {DEADLINE_S} s: {what}") from None


class Target:
    """The target's end: what it hears, and what it is told of the link."""

    def __init__(self) -> None:
        self.heard: list[m.SourceMessage] = []
        self.link: list[str] = []
        self.patience_s = 1000.0
        self.exists = True
        self.channel = ControlChannel(
            self._hear,
            lost=self._told("lost"),
            back=self._told("back"),
            patience_s=lambda: self.patience_s,
        )

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if not self.exists:
            raise web.HTTPNotFound
        return await self.channel.answer(request)

    async def _hear(self, message: m.SourceMessage) -> None:
        if isinstance(message, m.Ping):
            await self.channel.tell(m.Pong(message.t_us, 1))
        else:
            self.heard.append(message)

    def _told(self, what: str) -> Callable[[], Awaitable[None]]:
        async def tell() -> None:
            self.link.append(what)

        return tell


class Ends:
    """A target, a wire, and a source's link and conversation that is not connected yet."""

    def __init__(self, target: Target, wire: Wire, paths: config.HostPaths) -> None:
        self.target = target
        self.wire = wire
        self.paths = paths
        self.events: list[E] = []
        self.errors: list[MigrateError] = []
        self.heard: list[int] = []
        self.link = TargetLink("localhost", wire.port, paths)
        self.link.opened = OPENED
        self.conversation = self.converse(1000)

    def converse(self, patience_s: float, silence_s: float = 5) -> Conversation:
        self.conversation = Conversation(
            self.link,
            self._post,
            self.errors.append,
            patience_s=patience_s,
            silence_s=silence_s,
        )
        return self.conversation

    async def _post(self, kind: E) -> None:
        self.events.append(kind)

    async def told(self, number: int) -> None:
        """Returns when the target has heard a message and what was before it."""
        await self.conversation.tell(numbered(number))
        await until("heard", lambda: numbered(number) in self.target.heard)


@pytest.fixture
def paths(tmp_path: Path) -> config.HostPaths:
    paths = config.HostPaths(config=tmp_path)
    Fleet(tmp_path).host("localhost", at=paths.tls.directory)
    return paths


def server_context(paths: config.HostPaths) -> ssl.SSLContext:
    return HostIdentity.load(paths.tls).server_context()


@pytest.fixture
async def ends(
    paths: config.HostPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Ends]:
    monkeypatch.setattr(config, "RECONNECT_PAUSE_S", 0.01)
    target = Target()
    app = web.Application()
    app.router.add_get("/v1/sessions/m1/control", target.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "agent.sock")).start()
    gateway = Gateway(str(tmp_path / "agent.sock"))
    front = web.AppRunner(gateway.application(), shutdown_timeout=0.1)
    await front.setup()
    await web.TCPSite(front, "127.0.0.1", 0, ssl_context=server_context(paths)).start()
    wire = Wire(front.addresses[0][1])
    await wire.start()
    ends = Ends(target, wire, paths)
    yield ends
    await ends.conversation.close()
    await target.channel.part("the test is over")
    await wire.close()
    await front.cleanup()
    await gateway.close()
    await runner.cleanup()


def hear_numbers(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ends.heard` grows by what the source hears."""

    async def hear(message: Any) -> None:
        ends.heard.append(message.attempt)

    monkeypatch.setattr(ends.conversation, "_hear", hear)


@pytest.mark.parametrize("seed", range(4))
async def test_every_message_arrives_once_and_in_order(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    chance = random.Random(seed)
    hear_numbers(ends, monkeypatch)
    # A handshake takes some 3 KiB each way; a few connections do not even get that far.
    ends.wire.budget = lambda: chance.randint(2500, 6000)
    while not ends.link.is_open:
        with contextlib.suppress(Unreachable):
            await ends.conversation.connect()
    for number in range(1, 51):
        await ends.conversation.tell(numbered(number))
        await ends.target.channel.tell(numbered(number))
        if chance.random() < 0.3:
            ends.wire.reset()
        await asyncio.sleep(chance.choice((0, 0, 0.01)))
    ends.wire.budget = lambda: 1 << 40
    await until("all arrive", lambda: len(ends.heard) >= 50 and len(ends.target.heard) >= 50)
    expected = list(range(1, 51))
    assert (ends.heard, [one.attempt for one in ends.target.heard]) == (expected, expected)  # type: ignore[union-attr]
    assert ends.wire.connections > 3
    assert (ends.events, ends.errors, ends.target.link) == ([], [], [])


async def test_clocks_are_related_although_the_link_breaks(ends: Ends) -> None:
    await ends.conversation.connect()
    relating = asyncio.create_task(ends.conversation.relate_clocks())
    await asyncio.sleep(0)
    ends.wire.reset()
    async with asyncio.timeout(DEADLINE_S):
        await relating


async def test_the_end_of_patience_loses_the_link(ends: Ends) -> None:
    ends.converse(0.1)
    await ends.conversation.connect()
    await ends.told(1)
    await ends.wire.stop()
    ends.wire.reset()
    await until("lost", lambda: ends.events)
    assert ends.events == [E.LINK_LOST]
    assert "was not back within 0.1 s" in ends.errors[0].message
    assert ends.target.link == []


async def test_a_host_that_refuses_connections_is_not_waited_for(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "LINK_REFUSED_S", 0.1)
    await ends.conversation.connect()
    await ends.wire.stop()
    ends.wire.reset()
    await until("lost", lambda: ends.events)
    assert "Connection refused" in ends.errors[0].message


async def test_a_session_that_is_gone_is_not_waited_for(ends: Ends) -> None:
    await ends.conversation.connect()
    ends.target.exists = False
    ends.wire.reset()
    await until("lost", lambda: ends.events)
    assert "has no such session any more (404" in ends.errors[0].message


async def test_what_the_target_ends_itself_is_not_opened_again(ends: Ends) -> None:
    await ends.conversation.connect()
    await ends.target.channel.part("the agent stops")
    await until("lost", lambda: ends.events and ends.target.link)
    assert ends.errors[0].message == "localhost ended the session: the agent stops"
    assert ends.target.link == ["lost"]
    assert ends.wire.connections == 1


async def test_the_handover_does_not_wait_for_a_broken_link(ends: Ends) -> None:
    await ends.conversation.connect()
    ends.target.patience_s = 0
    ends.conversation.stop_watching()
    ends.wire.reset()
    await until("lost", lambda: ends.events and ends.target.link)
    assert (ends.events, ends.target.link) == ([E.LINK_LOST], ["lost"])
    # The machine asks over a new connection; what was told meanwhile comes first.
    await ends.target.channel.tell(m.Running({"resumed": 5}))
    await ends.conversation.connect()
    await until("heard", lambda: E.TARGET_RUNNING in ends.events)
    assert ends.conversation.marks == {"resumed": 5}
    assert ends.target.link == ["lost", "back"]


async def test_a_source_that_ends_in_order_is_not_waited_for(ends: Ends) -> None:
    await ends.conversation.connect()
    await ends.told(1)
    await ends.conversation.close()
    await until("lost", lambda: ends.target.link)
    assert ends.target.link == ["lost"]


async def test_a_source_that_died_is_waited_for_shortly(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reset may come from the link, and its source come back; a FIN comes from its kernel."""
    await ends.conversation.connect()
    await ends.told(1)
    monkeypatch.setattr(config, "LINK_ORPHAN_S", 0.1)
    ends.wire.reset()
    await until("is back", lambda: ends.wire.connections == 2 and ends.target.channel.is_open)
    await ends.told(2)
    ends.target.exists = False
    ends.wire.hang_up()
    await until("lost", lambda: ends.target.link)
    assert ends.target.link == ["lost"]


async def test_an_agent_that_stops_waits_for_nobody(ends: Ends) -> None:
    await ends.conversation.connect()
    await ends.told(1)
    ends.target.exists = False
    ends.wire.reset()
    await until("broken", lambda: not ends.target.channel.is_open)
    assert ends.target.link == []
    await ends.target.channel.part("the agent stops")
    assert ends.target.link == ["lost"]


async def test_a_new_connection_takes_over_from_one_that_is_silent(ends: Ends) -> None:
    """The source has noticed a silent link before the target has."""
    await ends.conversation.connect()
    await ends.told(1)
    other = Ends(ends.target, ends.wire, ends.paths)
    await other.conversation.connect()
    await until("the former one is ended", lambda: ends.wire.connections >= 2)
    await other.told(2)
    assert ends.target.link == []
    await other.conversation.close()


@pytest.mark.parametrize(("heard", "status"), [("7", 409), ("-1", 400), ("1e3", 400), ("", 400)])
async def test_hostile_counts_are_refused(ends: Ends, heard: str, status: int) -> None:
    client = ends.link._client()
    url = ends.link._session_url(f"control?heard={heard}")
    upgrade = {"Connection": "Upgrade"}
    async with client.get(url, headers=upgrade, ssl=ends.link.context) as answer:
        assert answer.status == status


async def test_a_target_that_has_forgotten_is_noticed(ends: Ends) -> None:
    """It has lost the session that it acknowledged messages of: nothing can go on."""
    await ends.conversation.connect()
    await ends.told(1)
    ends.wire.reset()
    await until("is back", lambda: ends.wire.connections == 2)
    await ends.told(2)
    ends.target.channel._heard = 0
    with pytest.raises(SessionGone, match="has heard 0 messages, but 1 to 2"):
        await ends.link.connect()


async def test_a_message_that_can_not_be_ends_the_session_at_once(ends: Ends) -> None:
    await ends.conversation.connect()
    assert ends.link._control is not None
    await ends.link._control.send_str('{"type":"unheard-of"}')
    await until("lost", lambda: ends.target.link and ends.events)
    assert ends.target.link == ["lost"]
    assert "ended the session" in ends.errors[0].message


async def test_silence_while_the_container_stands_still(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "FROZEN_PING_S", 0.02)
    conversation = ends.converse(1000, silence_s=0.5)
    await conversation.connect()
    conversation.watch()
    await ends.told(4)
    # As when this process gets no processor: longer than the target may be silent.
    time.sleep(0.6)  # noqa: ASYNC251
    await ends.told(1)
    for connections in (2, 3):
        ends.wire.reset()
        await until("is back", lambda: ends.wire.connections == connections)  # noqa: B023
        await ends.told(connections)
    assert ends.events == []
    await ends.wire.stop()
    ends.wire.reset()
    await until("lost", lambda: ends.events)
    assert set(ends.events) == {E.LINK_LOST}
