"""One plain TLS stream between two hosts, as the transport's own contexts make it.

    python3 -m bench.plain_stream receive PORT           accepts one stream, throws it away, answers
    python3 -m bench.plain_stream send HOST PORT MIB     sends random bytes; prints the seconds

The yardstick for `bench/precopy_throughput.py`: what TLS and the network can do on these hosts with
nothing else to do. The receiver prints "listening" first, and ends after its one stream.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from pathlib import Path
from typing import Final

from transport import tls
from transport.identity import HostIdentity, IdentityPaths

MIB: Final = 1 << 20
END: Final = b"."
ACCEPT_DEADLINE_S: Final = 30.0
TRANSFER_DEADLINE_S: Final = 120.0
IDENTITY: Final = IdentityPaths(Path("/etc/migrate/tls"))


def receive(port: int) -> None:
    """Take one stream to its end."""
    context = HostIdentity.load(IDENTITY).server_context()
    buffer = memoryview(bytearray(MIB))
    with socket.create_server(("0.0.0.0", port)) as listening:  # noqa: S104
        listening.settimeout(ACCEPT_DEADLINE_S)
        print("listening", flush=True)
        plain, _ = listening.accept()
        tls.tune(plain)
        with context.wrap_socket(plain, server_side=True) as stream:
            stream.settimeout(TRANSFER_DEADLINE_S)
            remaining = int.from_bytes(stream.recv(8), "big")
            while remaining:
                count = stream.recv_into(buffer)
                if not count:
                    raise SystemExit(f"the stream ended {remaining} bytes early")
                remaining -= count
            stream.sendall(END)


def send(host: str, port: int, mib: int) -> float:
    """Seconds from the first byte to the receiver's answer; the handshake is not counted."""
    context = HostIdentity.load(IDENTITY).client_context()
    data = os.urandom(MIB)
    with tls.connect(host, port, context, server_name=host) as stream:
        stream.settimeout(TRANSFER_DEADLINE_S)
        stream.sendall((mib * MIB).to_bytes(8, "big"))
        before_s = time.perf_counter()
        for _ in range(mib):
            stream.sendall(data)
        if stream.recv(1) != END:
            raise SystemExit("the receiver has not confirmed the stream")
        return time.perf_counter() - before_s


def main() -> int:
    """Either end."""
    parser = argparse.ArgumentParser(prog="bench.plain_stream")
    ends = parser.add_subparsers(dest="end", required=True)
    receiver = ends.add_parser("receive")
    receiver.add_argument("port", type=int)
    sender = ends.add_parser("send")
    sender.add_argument("host")
    sender.add_argument("port", type=int)
    sender.add_argument("mib", type=int)
    options = parser.parse_args()
    if options.end == "receive":
        receive(options.port)
    else:
        print(send(options.host, options.port, options.mib))
    return 0


if __name__ == "__main__":
    sys.exit(main())
