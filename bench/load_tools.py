"""A load by somebody else's tool, and how much of it is answered when.

    python3 -m bench.load_tools wrk ADDRESS PORT

wrk keeps CONNECTIONS busy with GET, each with the next request when it has its answer. Says and
ends as bench.load does, with the same line of JSON.
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
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from bench.load import BIN_MS, BINS_MAX, Load
from bench.probe import stop_descriptors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


def run(command: Sequence[str], stop_fds: Sequence[int]) -> str:
    """What it has said when it was told to end, or ended. Raises TimeoutExpired."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as tool:
        print("connected", flush=True)
        ended = os.pidfd_open(tool.pid)
        select.select([ended, *stop_fds], [], [])
        os.close(ended)
        tool.send_signal(signal.SIGINT)
        said, _ = tool.communicate(timeout=END_S)
    return said.decode(errors="replace")


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="bench.load_tools", description=__doc__.split("\n")[0])
    parser.add_argument("tool", choices=["wrk"])
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    load = wrk_load(run(wrk_command(options.address, options.port), stop_descriptors()))
    print(json.dumps(asdict(load)), flush=True)
    return 1 if load.error else 0


if __name__ == "__main__":
    sys.exit(main())
