"""One connection in a network namespace of its own: how long sending takes, and the link's part.

Usage: link_rig.py ADDRESS SLOW_S [RATE]

ADDRESS is one of the namespace's loopback device, which has 127.0.0.1 and OUTSIDE, and is shaped to
RATE (tc-tbf(8)) if that is given. The receiver sleeps SLOW_S after each MiB. The answer is one line
of JSON.
"""

from __future__ import annotations

import ctypes
import json
import socket
import subprocess
import sys
import threading
import time
from typing import Final

from transport.link_time import LinkTime

OUTSIDE: Final = "10.9.9.9"
MIB: Final = 1 << 20
SENT_MIB: Final = 8
BUFFER_BYTES: Final = 256 << 10
_CLONE_NEWNET: Final = 0x40000000
_TBF: Final = ("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "burst", "64k", "latency", "1s")


def main(address: str, slow_s: float, rate: str | None = None) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    commands = [["ip", "link", "set", "lo", "up"], ["ip", "addr", "add", OUTSIDE, "dev", "lo"]]
    if rate is not None:
        # Segments of 64 KiB would be larger than its bucket.
        commands += [["ip", "link", "set", "lo", "mtu", "1500"], [*_TBF, "rate", rate]]
    for command in commands:
        subprocess.run(command, check=True)
    with socket.create_server((address, 0)) as server:
        # The receiver's program is to read, not its kernel.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        reader = threading.Thread(target=read, args=(server, slow_s))
        reader.start()
        with socket.create_connection(server.getsockname()) as connection:
            link, began_s = LinkTime(connection), time.monotonic()
            took_s = 0.0
            for _ in range(SENT_MIB):
                before_s = time.monotonic()
                connection.sendall(bytes(MIB))
                took_s += link.took_s(time.monotonic() - before_s)
            print(json.dumps({"elapsed_s": time.monotonic() - began_s, "took_s": took_s}))
        reader.join()


def read(server: socket.socket, slow_s: float) -> None:
    connection, _ = server.accept()
    with connection:
        left = 0
        while count := len(connection.recv(64 << 10)):
            left += count
            if left >= MIB:
                left -= MIB
                time.sleep(slow_s)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
