"""The program that rsync takes for its remote shell: it joins rsync to a unix socket.

Run by path (`python3 -ISE rsync_relay.py SOCKET HOST COMMAND…`) and free of imports of this
project, because it stands between rsync and the frozen container. HOST and COMMAND are what rsync
would give to a remote shell; the agent runs a command of its own instead.
"""

from __future__ import annotations

import os
import selectors
import socket
import sys

CHUNK_BYTES = 256 * 1024


def main(socket_path: str) -> None:
    """Copy stdin to the socket and the socket to stdout until the socket ends."""
    peer = socket.socket(socket.AF_UNIX)
    peer.connect(socket_path)
    selector = selectors.DefaultSelector()
    selector.register(peer, selectors.EVENT_READ)
    selector.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is peer:
                data = peer.recv(CHUNK_BYTES)
                if not data:
                    return
                _write_all(data)
            else:
                data = os.read(0, CHUNK_BYTES)
                if data:
                    peer.sendall(data)
                else:
                    selector.unregister(0)
                    peer.shutdown(socket.SHUT_WR)


def _write_all(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


if __name__ == "__main__":
    main(sys.argv[1])
