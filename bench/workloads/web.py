"""A web server of several processes, as Python's own library has it: it runs in a container.

    python3 web.py PORT MEMORY_MIB

WORKERS processes accept from one socket, each connection has a thread. Every answer tells how many
its connection has had, and what it was asked for::

    GET /17 HTTP/1.1   ->   HTTP/1.1 200 …   17 /17\\n

The processes share a table that was made before they were. Each request looks at the next part of
it, and is answered 500 if that is not what it was. It needs the standard library alone.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import socket
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

WORKERS: Final = 3
PART_BYTES: Final = 64 * 1024
BACKLOG: Final = 64
# Which part a process looks at next.
TURNS = itertools.count()


class Table:
    """Random bytes, and what they were."""

    def __init__(self, mib: int) -> None:
        chance = random.Random(1)  # noqa: S311 - bytes that no page has by itself
        count = (mib << 20) // PART_BYTES
        self._parts = [chance.randbytes(PART_BYTES) for _ in range(count)]
        self._digests = [hashlib.blake2b(part).digest() for part in self._parts]

    def is_whole(self, turn: int) -> bool:
        at = turn % len(self._parts)
        return hashlib.blake2b(self._parts[at]).digest() == self._digests[at]


class Server(ThreadingHTTPServer):
    """Of one process; the socket is that of all of them."""

    def __init__(self, listening: socket.socket, table: Table) -> None:
        address = listening.getsockname()[:2]
        super().__init__(address, Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.table = table


class Handler(BaseHTTPRequestHandler):
    """One connection, for as long as its client wants."""

    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    requests = 0

    def do_GET(self) -> None:
        self.requests += 1
        body = f"{self.requests} {self.path}\n".encode()
        self.send_response(200 if self.server.table.is_whole(next(TURNS)) else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


def main() -> None:
    """Never returns: the first process only waits for the others."""
    port, mib = map(int, sys.argv[1:])
    listening = socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=BACKLOG
    )
    # Who comes too late to accept goes back to wait with the others.
    listening.setblocking(False)
    table = Table(mib)
    for _ in range(WORKERS):
        if os.fork() == 0:
            Server(listening, table).serve_forever()
    os.wait()


if __name__ == "__main__":
    main()
