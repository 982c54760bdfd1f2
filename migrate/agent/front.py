"""The agent's front: the one process that the network talks to. It has no rights of its own.

    python3 -m migrate.agent.front --control FD --data FD --asks FD --orders FD --root DIR
        --user UID

    peers ══TLS══ front ──HTTP on a unix socket, Link── agent (root): sessions, CRIU, journal
                    └── pages and image files into directories that the agent lends (lending.py)

It terminates TLS with a leaf certificate that is good for a day, proves who calls, parses HTTP and
frames, decompresses, and hands on what it has decoded. The agent starts it (front_keeper.py) with
listening sockets; a front that dies is replaced, and connections break as they do when a link does.

    DIR/tls/{ca,crl,host}.pem    copies that the agent keeps fresh
    DIR/agent.sock               the agent's HTTP
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures.thread
import encodings.idna
import logging
import os
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from migrate import config, heap
from migrate.agent import lockdown
from migrate.agent.front_http import Gateway
from migrate.agent.front_keeper import SOCKET_NAME, identity_in
from migrate.agent.front_link import (
    DESCRIPTORS_MAX,
    Done,
    Failed,
    Granted,
    Greeting,
    Link,
    Message,
    Ready,
    Revoke,
)
from migrate.agent.received import Received
from migrate.agent.site import Site
from migrate.logs import log_to_stderr
from transport.errors import TransportError
from transport.identity import TlsIdentity
from transport.receiver import DataListener

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transport.core.frames import Hello
    from transport.identity import Peer
    from transport.inbound import PageSink, Session

log = structlog.get_logger()

_GIVE_BACK_AFTER_S = 10.0

# Of the standard library, what is imported where it is first needed; then it can't be found.
_NEEDED_LATER = (concurrent.futures.thread, encodings.idna)


class Streams:
    """What the sessions' data streams write into, granted by the agent for each greeting."""

    def __init__(self, asks: Link) -> None:
        self._asks = asks
        self._lock = threading.Lock()
        self._received: dict[bytes, Received] = {}
        self.listener: DataListener | None = None

    def sink_of(self, hello: Hello, peer: Peer) -> PageSink | None:
        """For the data listener, in its threads."""
        answer, directories = self._asks.ask(Greeting.of(hello, peer))
        try:
            if not isinstance(answer, Granted) or len(directories) != DESCRIPTORS_MAX:
                return None
            with self._lock:
                known = self._received.get(hello.ticket)
                if known is None:
                    known = Received(*directories, quota_bytes=answer.quota_bytes)
                    self._received[hello.ticket] = known
                return known
        finally:
            for directory in directories:
                os.close(directory)

    def session_of(self, ticket: bytes) -> Session:
        """For the data listener: a session that it does not know, after `sink_of` has let it in."""
        with self._lock:
            return self._received[ticket].session()

    def obey(self, order: Message) -> tuple[Message, Sequence[int]]:
        """An order of the agent's, in the thread that waits for them."""
        assert isinstance(order, Revoke)
        assert self.listener is not None
        ticket = bytes.fromhex(order.ticket)
        try:
            self.listener.revoke(ticket)
        except TransportError as error:
            return Failed(str(error)), ()
        with self._lock:
            received = self._received.pop(ticket, None)
        if received is not None:
            received.close()
        # Not now: a container may stand still.
        threading.Timer(_GIVE_BACK_AFTER_S, heap.give_back).start()
        return Done(), ()


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until the agent ends."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("control", "data", "asks", "orders", "user"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--root", type=Path, required=True)
    given = parser.parse_args(arguments)
    log_to_stderr(logging.INFO)
    heap.keep_small()
    lockdown.lock_down(given.root, given.user)
    asks, orders = Link(socket.socket(fileno=given.asks)), Link(socket.socket(fileno=given.orders))
    control, data = socket.socket(fileno=given.control), socket.socket(fileno=given.data)
    identity = TlsIdentity(identity_in(Path("/")))
    context = identity.server_context()
    streams = Streams(asks)
    streams.listener = DataListener(data, context, streams.sink_of, remember=streams.session_of)
    threading.Thread(target=_obey, args=(orders, streams), name="orders", daemon=True).start()
    asyncio.run(_serve(control, identity, asks))


def _obey(orders: Link, streams: Streams) -> None:
    orders.serve(streams.obey)
    # The agent has ended: nothing is left to serve, whatever a thread is at.
    os._exit(0)


async def _serve(control: socket.socket, identity: TlsIdentity, asks: Link) -> None:
    gateway = Gateway(f"/{SOCKET_NAME}")
    await Site(gateway.application(), control, identity.server_context()).start()
    await asyncio.to_thread(asks.ask, Ready())
    while True:
        await asyncio.sleep(config.IDENTITY_PERIOD_S)
        await asyncio.to_thread(identity.refresh)


if __name__ == "__main__":
    main()
