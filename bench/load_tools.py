"""A load by somebody else's tool, and how much of it is answered when.

    python3 -m bench.load_tools wrk|pgbench ADDRESS PORT

CONNECTIONS are kept busy, each with the next request when it has its answer: wrk's with GET,
pgbench's with its transactions. Says and ends as bench.load does, with the same line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench.load import BIN_MS, BINS_MAX, Load
from bench.probe import stop_descriptors
from bench.workloads.postgres import USER

CONNECTIONS: Final = 8
END_S: Final = 20.0
LASTS_S: Final = BINS_MAX * BIN_MS // 1000
"""It is ended before."""
SCRIPT: Final = Path(__file__).parent / "workloads/answers.lua"
_ANSWERS: Final = re.compile(r"^((?:\d+:\d+ )*)bad (\d+)$", re.MULTILINE)


def wrk_command(address: str, port: int) -> list[str]:
    """One thread: the server is what is to be busy."""
    options = ["-t1", f"-c{CONNECTIONS}", f"-d{LASTS_S}s", "-s", str(SCRIPT)]
    return ["wrk", *options, f"http://{address}:{port}/"]


def wrk_load(said: str) -> Load:
    """Of what bench/workloads/answers.lua has said."""
    found = _ANSWERS.search(said)
    if found is None:
        return Load(0.0, BIN_MS, (), f"wrk said {said[-400:]!r}")
    bins: dict[int, int] = {}
    for pair in found[1].split():
        place, count = map(int, pair.split(":"))
        bins[place] = bins.get(place, 0) + count
    bins.pop(0, None)  # of before the first answer
    return in_bins(bins, f"{found[2]} connections or answers were bad" if int(found[2]) else "")


def in_bins(bins: Mapping[int, int], error: str) -> Load:
    """bins: how many answers in each BIN_MS since CLOCK_MONOTONIC began."""
    if not bins:
        return Load(0.0, BIN_MS, (), error or "there was no answer")
    first, last = min(bins), max(bins)
    if last - first >= BINS_MAX:
        return Load(0.0, BIN_MS, (), f"answers of {(last - first) * BIN_MS / 1000:.0f} s")
    counts = [bins.get(place, 0) for place in range(first, last + 1)]
    return Load(first * BIN_MS / 1000, BIN_MS, counts, error)


def pgbench_command(address: str, port: int, log: Path) -> list[str]:
    """It writes when each transaction has ended to files whose names begin with `log`."""
    where = ["-h", address, "-p", str(port), "-U", USER, USER]
    options = ["-n", f"-c{CONNECTIONS}", f"-T{LASTS_S}", "--log", f"--log-prefix={log}"]
    return ["pgbench", *options, *where]


def pgbench_load(said: str, log: str, wall_to_monotonic_s: float) -> Load:
    """Of its log: client, number, µs taken, script, then the end in s and µs of the wall clock.
    Source: pgbench(1), "Per-Transaction Logging"."""
    bins: dict[int, int] = {}
    for line in log.splitlines():
        _, _, _, _, seconds, micros = map(int, line.split())
        at_s = seconds + micros / 1e6 + wall_to_monotonic_s
        place = int(at_s * 1000 / BIN_MS)
        bins[place] = bins.get(place, 0) + 1
    return in_bins(bins, said[-400:] if "aborted" in said else "")


def wrk(address: str, port: int, stop_fds: Sequence[int]) -> Load:
    """Until told to stop."""
    return wrk_load(run(wrk_command(address, port), signal.SIGINT, stop_fds))


def pgbench(address: str, port: int, stop_fds: Sequence[int]) -> Load:
    """Until told to stop: by the signal by which it ends itself when its time is over."""
    with tempfile.TemporaryDirectory() as directory:
        command = pgbench_command(address, port, Path(directory) / "log")
        said = run(command, signal.SIGALRM, stop_fds)
        log = "".join(path.read_text() for path in Path(directory).iterdir())
    return pgbench_load(said, log, time.monotonic() - time.time())


TOOLS: Final[Mapping[str, Callable[[str, int, Sequence[int]], Load]]] = {
    "wrk": wrk,
    "pgbench": pgbench,
}


def run(command: Sequence[str], end: signal.Signals, stop_fds: Sequence[int]) -> str:
    """What it has said when it was told to end, or ended. Raises TimeoutExpired."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as tool:
        print("connected", flush=True)
        ended = os.pidfd_open(tool.pid)
        select.select([ended, *stop_fds], [], [])
        os.close(ended)
        tool.send_signal(end)
        said, _ = tool.communicate(timeout=END_S)
    return said.decode(errors="replace")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="bench.load_tools", description=__doc__.split("\n")[0])
    parser.add_argument("tool", choices=sorted(TOOLS))
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    load = TOOLS[options.tool](options.address, options.port, stop_descriptors())
    print(json.dumps(asdict(load)), flush=True)
    return 1 if load.error else 0


if __name__ == "__main__":
    sys.exit(main())
