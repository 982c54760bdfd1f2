"""A ticket is good once for each stream, for one peer, and for a short time."""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from migrate.agent.ticket import LIFE_S, Ticket
from tests.identities import Fleet
from tests.transport.transfer_parts import (
    TARGET_NAME,
    FileSink,
    Memory,
    Recorder,
    Target,
    wait_until,
)
from transport import tls
from transport.core.frames import Hello, StreamKind
from transport.errors import StreamRefusedError
from transport.fan import Outlet
from transport.identity import HostIdentity, Peer, Role
from transport.sender import PageSender

USE, OTHER = os.urandom(16), os.urandom(16)
ALPHA, BETA = Peer("alpha", Role.HOST, 1), Peer("beta", Role.HOST, 2)


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ticket(clock: Clock) -> Ticket:
    return Ticket("alpha", 3, clock=clock)


def hello(ticket: Ticket, stream: int = 0, use: bytes = USE) -> Hello:
    return Hello(StreamKind.PAGES, stream, ticket.secret, use)


def test_each_stream_once_and_each_reconnection_of_it(ticket: Ticket) -> None:
    for stream in (0, 1, 2, 1, 0, 2):
        ticket.admit(hello(ticket, stream), ALPHA)
    with pytest.raises(StreamRefusedError, match="has been used for this stream"):
        ticket.admit(hello(ticket, 1, OTHER), ALPHA)
    ticket.admit(hello(ticket, 1), ALPHA)


def test_nobody_else(ticket: Ticket) -> None:
    with pytest.raises(StreamRefusedError, match="of alpha, shown by beta"):
        ticket.admit(hello(ticket), BETA)
    with pytest.raises(StreamRefusedError, match="shown by operator alpha"):
        ticket.admit(hello(ticket), Peer("alpha", Role.OPERATOR, 1))
    ticket.admit(hello(ticket, use=OTHER), ALPHA)


@pytest.mark.parametrize("stream", [3, 15])
def test_no_more_streams_than_announced(ticket: Ticket, stream: int) -> None:
    with pytest.raises(StreamRefusedError, match=f"stream {stream} of 3"):
        ticket.admit(hello(ticket, stream), ALPHA)


def test_it_expires_for_what_has_not_come(ticket: Ticket, clock: Clock) -> None:
    ticket.admit(hello(ticket, 0), ALPHA)
    clock.now_s += LIFE_S
    ticket.admit(hello(ticket, 1), ALPHA)
    clock.now_s += 0.1
    ticket.admit(hello(ticket, 0), ALPHA)
    with pytest.raises(StreamRefusedError, match="expired"):
        ticket.admit(hello(ticket, 2), ALPHA)


def test_which_ticket_it_is(ticket: Ticket) -> None:
    other = Ticket("alpha", 3)
    assert ticket.is_shown_by(hello(ticket))
    assert not ticket.is_shown_by(hello(other))


def test_it_is_not_told(ticket: Ticket) -> None:
    assert ticket.secret.hex() not in repr(ticket)
    assert str(ticket.secret) not in repr(ticket)
    with pytest.raises(StreamRefusedError) as refused:
        ticket.admit(hello(ticket), BETA)
    assert ticket.secret.hex() not in str(refused.value)


# --- real streams ---


@dataclass
class Shown:
    """A listener that admits by a ticket."""

    target: Target
    ticket: Ticket
    log: Recorder
    fleet: Fleet

    def sender(self, host: str = "alpha", streams: int = 1) -> PageSender:
        identity = HostIdentity.load(self.fleet.host(host))

        def opened(_index: int) -> ssl.SSLSocket:
            context, port = identity.client_context(), self.target.port
            return tls.connect("127.0.0.1", port, context, server_name=TARGET_NAME)

        memory = Memory(10)
        return PageSender([Outlet(opened, self.ticket.secret)], read=memory.read, streams=streams)

    def refused(self, sender: PageSender) -> str:
        """Connects in vain; what the log says: a line for each stream that was not let in or had
        to end."""
        before = len(self.log.complaints)
        with sender, pytest.raises(StreamRefusedError):
            sender.connect()
        wait_until(lambda: len(self.log.complaints) > before, "it is logged")
        assert self.ticket.secret.hex() not in repr(self.log.lines)
        return "\n".join(str(fields["reason"]) for _, fields in self.log.complaints[before:])


@pytest.fixture
def shown(tmp_path: Path, ticket: Ticket) -> Iterator[Shown]:
    log, fleet = Recorder(), Fleet(tmp_path / "fleet")
    context = HostIdentity.load(fleet.host(TARGET_NAME)).server_context()
    with Target(context, tmp_path, log) as target:

        def authorise(hello: Hello, peer: Peer) -> FileSink | None:
            if not ticket.is_shown_by(hello):
                return None
            ticket.admit(hello, peer)
            return target.sink

        target.listener._authorise = authorise
        yield Shown(target, ticket, log, fleet)


def test_a_ticket_that_is_replayed(shown: Shown) -> None:
    """By the same host, with the same identity, while the stream is open and when it has ended."""
    with shown.sender() as sender:
        sender.connect()
        assert "has been used for this stream" in shown.refused(shown.sender())
        sender.connect()
    assert "has been used for this stream" in shown.refused(shown.sender())


def test_a_ticket_that_another_host_has_seen(shown: Shown) -> None:
    assert "of alpha, shown by beta" in shown.refused(shown.sender("beta"))
    with shown.sender() as sender:
        sender.connect()


def test_a_ticket_that_comes_too_late(shown: Shown, clock: Clock) -> None:
    clock.now_s += LIFE_S + 1
    assert "expired" in shown.refused(shown.sender())


def test_more_streams_than_announced(shown: Shown) -> None:
    assert "stream 3 of 3" in shown.refused(shown.sender(streams=4))
