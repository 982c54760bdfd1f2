"""Where connections go is one thing, who answers there another."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from migrate import config, peer
from migrate.core import messages
from migrate.errors import Unreachable
from migrate.way import DIRECT, Way
from tests.identities import Fleet
from transport.identity import TlsIdentity

ASK = messages.Ask("m1", 1)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "fleet")


@pytest.fixture
async def port(fleet: Fleet) -> AsyncIterator[int]:
    """The agent of B, somewhere on loopback."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=messages.encode(messages.State("m1", 1, "done")))

    app = web.Application()
    app.router.add_post("/v1/migrations/{id}/{role}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context = TlsIdentity(fleet.host("B")).server_context()
        await web.SockSite(runner, listener, ssl_context=context).start()
        yield listener.getsockname()[1]
        await runner.cleanup()


def _paths(fleet: Fleet) -> config.HostPaths:
    return config.HostPaths().with_identity(fleet.host("A").directory)


async def test_a_host_is_reached_at_another_place(fleet: Fleet, port: int) -> None:
    way = Way({7337: ("127.0.0.1", port)})
    assert await peer.say("B", 7337, _paths(fleet), "target", ASK, way) == "done"


async def test_another_host_at_that_place_proves_nothing(fleet: Fleet, port: int) -> None:
    way = Way({7337: ("127.0.0.1", port)})
    with pytest.raises(Unreachable, match="proves nothing"):
        await peer.say("C", 7337, _paths(fleet), "target", ASK, way)


async def test_other_ports_go_to_the_host_itself(fleet: Fleet, port: int) -> None:
    way = Way({7337: ("127.0.0.1", 1)})
    with pytest.raises(Unreachable):
        await peer.say("b.invalid", port, _paths(fleet), "target", ASK, way)


def test_places() -> None:
    assert DIRECT.to("B", 5) == ("B", 5)
    assert Way({5: ("::1", 6)}).to("B", 5) == ("::1", 6)
    assert Way({5: ("::1", 6)}).to("B", 7) == ("B", 7)


def test_a_migration_of_its_own_shares_nothing_but_where_containers_are() -> None:
    host = config.HostPaths()
    once = host.once("0123456789ab")
    assert once.containers == host.containers
    assert once.policy == host.policy
    for path in (once.journal, once.tls.directory, once.agent_claim, once.session("x", "target")):
        assert "once/0123456789ab" in str(path)
