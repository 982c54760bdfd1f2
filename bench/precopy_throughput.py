"""How fast the first round of pre-copy is, against one plain TLS stream between the same two hosts.

A container whose memory does not compress and does not change moves back and forth between lab
hosts A and B. Before each move one plain TLS stream carries as many bytes the same way
(`bench/plain_stream.py`); so both sides of the comparison see the same machine. What is compared:

    plain      bytes / seconds from the first byte to the receiver's answer
    pre-copy   round 1 of the report: bytes_raw / duration_ms; it is collected, read from the
               running container, hashed, framed, sent, checked, and written to the page store

Rates are MB/s (1e6). `p95_mb_s` is the rate that 95 % of the repetitions reach; `ratio` is of the
medians. The load of the machine before and after is part of the result: the lab's hosts share its
cores with whatever else runs.

Usage: python -m bench.precopy_throughput [--mib 1024] [--repetitions 4]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.containers import ContainerSpec, create, start
from bench.lab.lab import Lab
from bench.probe_process import PYTHON_INSIDE, run_module

if TYPE_CHECKING:
    from bench.lab.host import Host

MIB: Final = 1 << 20
NAME: Final = "precopy"
PORT: Final = 7400
REPORT: Final = "/tmp/precopy-report.json"  # noqa: S108  (inside a lab host)
PERCENTILE: Final = 95
END_DEADLINE_S: Final = 30.0
MIGRATION_DEADLINE_S: Final = 300.0


def plain_mb_s(source: Host, target: Host, mib: int) -> float:
    """The rate of one plain stream."""
    command = ["python3", "-m", "bench.plain_stream", "receive", str(PORT)]
    receiver = target.popen(command, env=PYTHON_INSIDE, stdout=subprocess.PIPE)
    try:
        assert receiver.stdout is not None
        if receiver.stdout.readline() != "listening\n":
            raise SystemExit(f"the receiver on {target.name} did not start")
        sending = ("send", target.name, str(PORT), str(mib))
        elapsed_s = float(run_module(source, "bench.plain_stream", *sending))
        receiver.wait(END_DEADLINE_S)
    finally:
        receiver.kill()
        receiver.communicate()
    return mib * MIB / elapsed_s / 1e6


def precopy(source: Host, target: Host) -> dict[str, Any]:
    """The report of one migration."""
    command = ["migrate", NAME, "--to", target.name, "--report", REPORT]
    source.run(command, timeout_s=MIGRATION_DEADLINE_S)
    report: dict[str, Any] = json.loads(source.read_text(REPORT))
    return report


def round_mb_s(report: dict[str, Any], mib: int) -> float:
    """The rate of the first round, in which all of the memory must have travelled."""
    first = report["rounds"][0]
    if first["bytes_raw"] < mib * MIB:
        raise SystemExit(f"the first round had only {first['bytes_raw']} bytes")
    rate: float = first["bytes_raw"] / first["duration_ms"] / 1e3
    return rate


def summary(rates: list[float]) -> dict[str, Any]:
    """Median, and the rate that 95 % of the repetitions reach."""
    return {
        "median_mb_s": round(statistics.median(rates), 1),
        "p95_mb_s": round(float(np.percentile(rates, 100 - PERCENTILE)), 1),
        "all_mb_s": [round(rate, 1) for rate in rates],
    }


def measure(mib: int, repetitions: int) -> dict[str, Any]:
    """All repetitions, in a lab of their own."""
    spec = ContainerSpec(NAME, "memory", args=("0",), memory_mib=mib)
    rates: dict[str, list[float]] = {"plain": [], "precopy": []}
    with Lab(["A", "B"]) as lab:
        lab.start_agents()
        source, target = lab.hosts
        create(source, spec)
        start(source, NAME)
        for _ in range(repetitions):
            rates["plain"].append(plain_mb_s(source, target, mib))
            report = precopy(source, target)
            rates["precopy"].append(round_mb_s(report, mib))
            source, target = target, source
        (verdict,) = run_module(
            lab.client, "bench.workloads.ask", spec.ip, str(spec.port), "VERIFY"
        ).splitlines()
        openssl = source.run(["python3", "-c", "import ssl; print(ssl.OPENSSL_VERSION)"]).stdout
    if not verdict.startswith("VERIFY ok"):
        raise SystemExit(f"memory was lost: {verdict}")
    ratio = statistics.median(rates["precopy"]) / statistics.median(rates["plain"])
    versions = report["versions"]["A"]
    return {
        "openssl": openssl.strip(),
        "criu": versions["criu"],
        "runtime": versions["runtime"],
        "tracker": report["tracker"],
        **{name: summary(values) for name, values in rates.items()},
        "ratio": round(ratio, 3),
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the container's memory")
    parser.add_argument("--repetitions", type=int, default=4)
    options = parser.parse_args()
    if options.repetitions < 1 or options.mib < 1:
        parser.error("nothing to measure")
    load_before = os.getloadavg()[0]
    measured = measure(options.mib, options.repetitions)
    result = {
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "workload": f"memory, {options.mib} MiB, incompressible, not written to",
        "n": options.repetitions,
        "load_1min": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        **measured,
    }
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
