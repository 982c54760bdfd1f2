"""Who may say what to an agent: the real one with its front, over real TLS. Root is needed."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, MutableMapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from migrate import config, standing
from migrate.agent.app import Agent
from migrate.core import messages as m
from migrate.errors import MigrateError, UsageError
from migrate.journal import Journal, Migration
from migrate.operating import say_word, tell_agent
from migrate.policy import PolicyError
from tests.identities import Fleet
from transport.errors import CertificateRevokedError
from transport.identity import HostIdentity, IdentityPaths

HERE = socket.gethostname()
DEADLINE_S = 60.0
RECOVER = m.encode(m.Recover("m-1", ""))
ASK = m.encode(m.Ask("m-1", 1))


class Site:
    """This host's agent, and others of the fleet that call it."""

    def __init__(self, base: Path) -> None:
        self.fleet = Fleet(base)
        self.paths = config.HostPaths(base / "run", base / "state", base / "etc")
        self.fleet.host(HERE, at=self.paths.tls.directory)
        self.log: list[MutableMapping[str, Any]] = []
        self._client = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=DEADLINE_S))

    async def start(self) -> None:
        self.agent = Agent(self.paths, {}, "127.0.0.1", 0, 0)
        self._serving = asyncio.create_task(self.agent.serve())
        ask = asyncio.create_task(self.status(self.paths.tls, "PUT", "/v1/crl", b"x"))
        await asyncio.wait({ask, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        assert ask.result() == 409

    async def stop(self) -> None:
        await self._client.close()
        signal.raise_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            await self._serving

    async def status(
        self, caller: IdentityPaths, method: str, path: str, body: bytes | BytesIO
    ) -> int:
        url = f"https://127.0.0.1:{self.agent.ports[0]}{path}"
        context = HostIdentity.load(caller).client_context()
        async with self._client.request(
            method, url, data=body, ssl=context, server_hostname=HERE
        ) as answer:
            await answer.read()
            return answer.status


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    with capture_logs() as site.log:
        await site.start()
        yield site
        await site.stop()


async def test_roles(site: Site) -> None:
    own, person, other = site.paths.tls, site.fleet.operator("alice"), site.fleet.host("other")
    unknown = 404
    assert await site.status(own, "POST", "/v1/operator", RECOVER) == unknown
    assert await site.status(person, "POST", "/v1/operator", RECOVER) == unknown
    assert await site.status(other, "POST", "/v1/operator", RECOVER) == 403
    assert await site.status(other, "POST", "/v1/migrations/m-1/target", ASK) == 200
    assert await site.status(person, "POST", "/v1/migrations/m-1/target", ASK) == 403
    assert await site.status(person, "POST", "/v1/sessions", ASK) == 403
    assert await site.status(other, "GET", "/v1/sessions/m-1/control", b"") == 404
    (stray,) = [line for line in site.log if line["event"] == "channel refused"]
    assert (stray["peer"], stray["path"]) == ("other", "/v1/sessions/m-1/control")
    refused = [line for line in site.log if line["event"] == "request refused"]
    assert [(line["peer"], line["path"]) for line in refused] == [
        ("other", "/v1/operator"),
        ("operator alice", "/v1/migrations/m-1/target"),
        ("operator alice", "/v1/sessions"),
    ]
    assert all(str(line["address"]).startswith("127.0.0.1") for line in refused)


async def test_an_operator_speaks_from_elsewhere(site: Site) -> None:
    person, port = HostIdentity.load(site.fleet.operator("alice")), site.agent.ports[0]
    word = m.Recover("m-1", "")
    with pytest.raises(MigrateError, match="no such migration"):
        await tell_agent(word, person, host=HERE, address="127.0.0.1", port=port)
    other = HostIdentity.load(site.fleet.host("other"))
    with pytest.raises(MigrateError, match="only an operator"):
        await tell_agent(word, other, host=HERE, address="127.0.0.1", port=port)


async def test_an_operator_sees_what_is_there_and_hears_why_it_can_not_be_cancelled(
    site: Site,
) -> None:
    """As on the host itself, also in how it is refused."""
    with Journal.open(site.paths.journal) as journal:
        journal.begin(Migration("m-2", "source", 1, "web", "runc", "other", time.time()))
        for state in ("precopy", "rolling_back", "aborted"):
            journal.append("m-2", "source", state, "test", at_wall_s=time.time())
    person = HostIdentity.load(site.fleet.operator("alice"))
    say = partial(say_word, host=HERE, address="127.0.0.1", port=site.agent.ports[0])
    overview = await say(m.Status(), person, "operator")
    assert isinstance(overview, m.Overview)
    assert list(overview.migrations) == standing.status(site.paths, None)
    assert [one.state for one in overview.migrations] == ["aborted"]
    with pytest.raises(UsageError, match="m-2 has ended: web undone"):
        await say(m.Cancel("m-2"), person, "operator")
    with pytest.raises(UsageError, match="knows no migration 'm-3'"):
        await say(m.Status("m-3"), person, "operator")
    other = HostIdentity.load(site.fleet.host("other"))
    for word in (m.Status(), m.Cancel("m-2")):
        with pytest.raises(MigrateError, match="only an operator"):
            await say(word, other, "operator")


async def test_an_operator_is_no_host_of_the_same_name(site: Site) -> None:
    """Who is told from whom by name alone would let alice the person speak for alice the host."""
    assert await site.status(site.fleet.operator(HERE), "POST", "/v1/sessions", ASK) == 403


async def test_anybody_brings_revocations_and_only_the_authority_makes_them(
    site: Site, tmp_path: Path
) -> None:
    other, bad = site.fleet.host("other"), site.fleet.host("bad")
    first = site.fleet.authority.crl_pem
    stranger = Fleet(tmp_path / "elsewhere")
    foreign = stranger.revoke(stranger.host("other"))
    for wrong in (b"", b"x" * 1000, foreign, first[:-60]):
        assert await site.status(other, "PUT", "/v1/crl", wrong) == 409
    assert await site.status(other, "PUT", "/v1/crl", BytesIO(bytes(3 << 20))) == 413
    assert await site.status(bad, "POST", "/v1/migrations/m-1/target", ASK) == 200
    assert await site.status(other, "PUT", "/v1/crl", site.fleet.revoke(bad)) == 204
    async with asyncio.timeout(DEADLINE_S):
        while await is_heard(site, bad):  # noqa: ASYNC110  until the front has its copy
            await asyncio.sleep(0.05)
    assert await site.status(other, "PUT", "/v1/crl", first) == 204
    assert not await is_heard(site, bad)
    assert await site.status(other, "POST", "/v1/migrations/m-1/target", ASK) == 200
    taken = [line for line in site.log if line["event"] == "revocations taken"]
    assert [(line["peer"], line["number"]) for line in taken] == [("other", 2)]


async def is_heard(site: Site, caller: IdentityPaths) -> bool:
    try:
        return await site.status(caller, "POST", "/v1/migrations/m-1/target", ASK) == 200
    except (aiohttp.ClientError, ConnectionError):
        return False


async def test_an_agent_has_the_name_of_its_host(tmp_path: Path) -> None:
    paths = config.HostPaths(tmp_path / "run", tmp_path / "state", tmp_path / "etc")
    fleet = Fleet(tmp_path)
    with pytest.raises(MigrateError, match="no identity"):
        Agent(paths, {}, "127.0.0.1", 0, 0)
    fleet.host("another", at=paths.tls.directory)
    with pytest.raises(MigrateError, match="that of host another"):
        Agent(paths, {}, "127.0.0.1", 0, 0)
    fleet.operator(HERE, at=paths.tls.directory)
    with pytest.raises(MigrateError, match="that of operator"):
        Agent(paths, {}, "127.0.0.1", 0, 0)


async def test_an_agent_whose_identity_was_revoked_does_not_start(site: Site) -> None:
    own = HostIdentity.load(site.paths.tls)
    own.take_revocations(site.fleet.revoke(site.paths.tls))
    with pytest.raises(CertificateRevokedError):
        HostIdentity.load(site.paths.tls)
    with pytest.raises(MigrateError, match="revoked"):
        Agent(site.paths, {}, "127.0.0.1", 0, 0)


async def test_an_agent_does_not_start_with_a_policy_that_it_cannot_read(tmp_path: Path) -> None:
    paths = config.HostPaths(tmp_path / "run", tmp_path / "state", tmp_path / "etc")
    paths.config.mkdir()
    paths.policy.write_text("[receive]\nfrm = ['a']\n")
    with pytest.raises(PolicyError, match=r"line 2: .* unknown field `frm`"):
        Agent(paths, {}, "127.0.0.1", 0, 0)
