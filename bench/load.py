"""A load on a Redis of bench.workloads.redis_data, and how much of it is answered when.

    python3 -m bench.load ADDRESS PORT --mib N [--connections N]

Each connection asks for the heads of random values, PIPELINED at a time, and for more when all are
answered: what comes back is the server's throughput, which stops when it stops. Output: "connected"
when the first answers are there, and at the end one line of JSON (`Load`). Ends as bench.probe
does, with exit status 0, or 1 when a connection broke or an answer was not the value's.
"""

from __future__ import annotations

import argparse
import json
import random
import select
import socket
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from bench.probe import connect, stop_descriptors
from bench.workloads.redis_data import HEADER_BYTES, DataSet, key
from bench.workloads.resp import encode

if TYPE_CHECKING:
    from collections.abc import Sequence

PIPELINED: Final = 8
CONNECTIONS: Final = 4
CONNECTIONS_MAX: Final = 100
BIN_MS: Final = 10
BINS_MAX: Final = 60_000
"""Ten minutes."""
RECEIVE_BYTES: Final = 64 << 10
INDEX_DIGITS: Final = 8


@dataclass(frozen=True, slots=True)
class Load:
    """answers: in each BIN_MS since `started_monotonic_s` (CLOCK_MONOTONIC of the machine)."""

    started_monotonic_s: float
    bin_ms: int
    answers: Sequence[int]
    error: str = ""


class Asking:
    """One connection, with its questions on the way."""

    def __init__(self, connection: socket.socket, keys: int, chance: random.Random) -> None:
        self.connection = connection
        self._keys = keys
        self._chance = chance
        self._asked: list[int] = []
        self._heard = b""

    def ask(self) -> None:
        """The next questions."""
        self._asked = [self._chance.randrange(self._keys) for _ in range(PIPELINED)]
        questions = [encode("GETRANGE", key(one), 0, HEADER_BYTES - 1) for one in self._asked]
        self.connection.sendall(b"".join(questions))

    def hear(self) -> int:
        """How many answers have come; asks on when they are all there. Raises OSError."""
        data = self.connection.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError("the server closed the connection")
        *lines, self._heard = (self._heard + data).split(b"\r\n")
        heads = [line for line in lines if not line.startswith(b"$")]
        for head, index in zip(heads, self._asked, strict=False):
            if head[:INDEX_DIGITS] != b"%0*d" % (INDEX_DIGITS, index):
                raise ValueError(f"the value of {index} begins with {head!r}")
        del self._asked[: len(heads)]
        if not self._asked:
            self.ask()
        return len(heads)


def run(connections: Sequence[socket.socket], keys: int, stop_fds: Sequence[int]) -> Load:
    """Until told to stop, or a connection breaks."""
    chance = random.Random(1)  # noqa: S311  which keys matters to nobody
    asking = {one.fileno(): Asking(one, keys, chance) for one in connections}
    bins: list[int] = []
    started_s = time.monotonic()
    error = ""
    try:
        for one in asking.values():
            one.connection.setblocking(True)
            one.ask()
        while len(bins) < BINS_MAX:
            ready = select.select([*asking, *stop_fds], [], [])[0]
            if any(fd in ready for fd in stop_fds):
                break
            place = int((time.monotonic() - started_s) * 1000 / BIN_MS)
            if not bins:
                print("connected", flush=True)
            bins += [0] * (place + 1 - len(bins))
            bins[place] += sum(asking[fd].hear() for fd in ready)
    except (OSError, ValueError) as broken:
        error = str(broken)
    return Load(started_s, BIN_MS, bins, error)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="bench.load", description=__doc__.split("\n")[0])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--mib", type=int, required=True, help="of the data set")
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    options = parser.parse_args()
    if not 1 <= options.connections <= CONNECTIONS_MAX:
        parser.error(f"--connections: 1 to {CONNECTIONS_MAX}")
    stop_fds = stop_descriptors()
    connections = [connect(options.address, options.port) for _ in range(options.connections)]
    load = run(connections, DataSet(options.mib).keys, stop_fds)
    print(json.dumps(asdict(load)), flush=True)
    return 1 if load.error else 0


if __name__ == "__main__":
    sys.exit(main())
