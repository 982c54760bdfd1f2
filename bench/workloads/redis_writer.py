"""Rewrites keys of a Redis workload at a given rate and remembers what was acknowledged.

    python3 -m bench.workloads.redis_writer ADDRESS PORT --versions FILE [--rate-mib-s N]
            [--hot-keys N] [--mib N] [--text PERCENT] [--value-bytes N] [--seconds N]

It is a probe (bench/probe.py) whose requests are SETs: one connection, streamed, stopped by a line
on standard input, a report at the end. The versions file then tells `redis_data verify` which
version each key must hold at least (acknowledged) and at most (sent).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from bench.probe import DRAIN_S, Probe, Report, connect, stop_descriptors
from bench.probe_accounting import AnswerError, OrderChecker
from bench.workloads.redis_data import MIB, DataSet, Versions, add_data_arguments, data_from, key
from bench.workloads.resp import Decoder, encode

if TYPE_CHECKING:
    from collections.abc import Sequence

SEED = 1
"""The same keys in the same order in every run, so that runs can be compared."""


class Writes:
    """SETs of growing versions of random hot keys. Implements bench.probe_accounting.Answers."""

    def __init__(self, data: DataSet, hot_keys: int) -> None:
        self.order = OrderChecker()
        self.versions = Versions(data.keys)
        self._data = data
        self._hot_keys = min(hot_keys, data.keys)
        self._random = random.Random(SEED)  # noqa: S311 - a load, not a secret
        self._decoder = Decoder()
        # Bounded by what Probe lets be under way: UNSENT_BYTES_MAX and the socket's buffers.
        self._outstanding: deque[tuple[int, int]] = deque()

    def request(self, number: int) -> bytes:
        del number  # SETs carry no sequence: Redis answers in order, and each key its version
        index = self._random.randrange(self._hot_keys)
        version = int(self.versions.sent[index]) + 1
        self.versions.sent[index] = version
        self._outstanding.append((index, version))
        return encode("SET", key(index), self._data.value(index, version))

    def feed(self, data: bytes) -> int:
        replies = self._decoder.feed(data)
        for reply in replies:
            if reply != "OK" or not self._outstanding:
                raise AnswerError(f"not the answer to a SET: {reply!r:.80}")
            index, version = self._outstanding.popleft()
            self.versions.acknowledged[index] = version
            self.order.check(self.order.received + 1)
        return len(replies)


def main(arguments: Sequence[str] | None = None) -> int:
    """The same exit statuses as bench.probe."""
    parser = argparse.ArgumentParser(prog="bench.workloads.redis_writer")
    add_data_arguments(parser)
    parser.add_argument("--versions", type=Path, required=True)
    parser.add_argument("--rate-mib-s", type=float, default=8.0)
    parser.add_argument("--hot-keys", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--drain-s", type=float, default=DRAIN_S)
    options = parser.parse_args(arguments)
    stop_fds = stop_descriptors()
    writes = Writes(data_from(options), options.hot_keys)
    try:
        connection = connect(options.address, options.port)
    except OSError as error:
        print(json.dumps(asdict(Report(error=f"connecting: {error!r}"))), flush=True)
        return 2
    with connection:
        probe = Probe(
            connection,
            writes,
            rate_per_s=options.rate_mib_s * MIB / options.value_bytes,
            drain_s=options.drain_s,
            on_connected=lambda: print("connected", flush=True),
        )
        report = probe.run(stop_fds, options.seconds)
    writes.versions.save(options.versions)
    print(json.dumps(asdict(report)), flush=True)
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
