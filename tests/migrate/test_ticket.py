"""A ticket is good once for each stream, for one peer, and for a short time."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from migrate.agent.ticket import LIFE_S, Ticket
from transport.core.frames import Hello, StreamKind
from transport.errors import StreamRefusedError
from transport.identity import Peer, Role

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
