"""The demo: a container with a client moves from lab host A to B and back, and nobody notices.
With --clone it stays on A instead, and copies of it run on B and C (`bench/flock.py`).

It is a user of the product like any other: it starts two hosts, a container on A and a client, runs
`migrate NAME --to B` on A and `migrate NAME --to A` on B, and then asks the client what it saw and
the container whether its memory is what it should be. Exit code 0 only if nothing was lost.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from bench.containers import ContainerSpec, create, start
from bench.flock import run_flock
from bench.lab.lab import Lab
from bench.probe_process import ProbeProcess, run_module, start_probe
from bench.workloads import postgres

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bench.lab.host import Host
    from bench.probe import Report

MIB = 1 << 20
NAME = "sheep"
ADDRESS = "10.77.0.50/24"
VERSIONS = "/tmp/dolly-versions"  # noqa: S108  (inside the client's lab host, whose /tmp is its own)
REPORT = "/tmp/dolly-report.json"  # noqa: S108
MIGRATION_DEADLINE_S = 600.0
REQUESTS_PER_S = 1000.0
# To answer a thousand takes most of an emulated processor, and leaves nothing for the migration.
MACHINE_REQUESTS_PER_S = 50.0
SELF_PROVING = ("nginx", "web")
"""Their client has checked every answer, of which each one proves some more."""


@dataclass(slots=True)
class Workload:
    """What runs in the container and how its memory is checked afterwards."""

    kind: str
    memory_mib: int
    dirty_mib_s: int
    writer: ProbeProcess | None = None
    checks: list[str] = field(default_factory=list)

    @property
    def spec(self) -> ContainerSpec:
        """The container."""
        arguments = (str(self.dirty_mib_s),) if self.kind == "memory" else ()
        return ContainerSpec(
            NAME, self.kind, args=arguments, memory_mib=self.memory_mib, address=ADDRESS
        )

    def begin(self, client: Host) -> None:
        """Fill it and start what dirties its memory."""
        if self.kind == "postgres":
            postgres.fill(client, self.spec.ip, self.memory_mib)
        if self.kind != "redis":
            return
        ip, port, size = self.spec.ip, str(self.spec.port), f"--mib={self.memory_mib}"
        run_module(client, "bench.workloads.redis_data", "fill", ip, port, size)
        rate = f"--rate-mib-s={self.dirty_mib_s}"
        arguments = [ip, port, f"--versions={VERSIONS}", size, rate]
        self.writer = ProbeProcess("bench.workloads.redis_writer", arguments, host=client)
        self.writer.wait_connected()

    def verify(self, client: Host) -> bool:
        """Whether every byte is what it should be; the words of the check are kept."""
        if self.kind in SELF_PROVING:
            return True
        ip, port = self.spec.ip, str(self.spec.port)
        if self.kind == "postgres":
            proven, answer = postgres.sums(client, ip)
            self.checks.append(answer)
            return proven
        if self.kind == "memory":
            answer = run_module(client, "bench.workloads.ask", ip, port, "VERIFY")
            self.checks.append(answer)
            return answer.startswith("VERIFY ok")
        assert self.writer is not None
        report = self.writer.stop()
        size = f"--mib={self.memory_mib}"
        answer = run_module(
            client, "bench.workloads.redis_data", "verify", ip, port, size, "--versions", VERSIONS
        )
        self.checks.append(answer)
        return report.out_of_order == 0 and report.resets == 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo saw."""

    migrations: list[dict[str, Any]]
    client: Report
    memory_verified: bool

    @property
    def nothing_lost(self) -> bool:
        """No answer lost or out of order, no connection broken, every byte right."""
        return self.client.clean and self.memory_verified

    def as_json(self) -> dict[str, Any]:
        """The demo's result for machines."""
        client = self.client
        return {
            "migrations": self.migrations,
            "client": {
                "sent": client.sent,
                "received": client.received,
                "out_of_order": client.out_of_order,
                "resets": client.resets,
                "gap_max_ms": client.gap_max_ms,
            },
            "memory_verified": self.memory_verified,
        }


def run_demo(
    workload: Workload, options: Sequence[str], console: Console, *, machines: bool = False
) -> Outcome:
    """Move a container there and back, with a client that looks; two lab hosts of its own, or two
    virtual machines."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(["A", "B"], machines=machines))
        lab.start_agents()
        console.print(f"[dim]two hosts, A {lab.host('A').address} and B {lab.host('B').address}[/]")
        create(lab.host("A"), workload.spec)
        start(lab.host("A"), NAME)
        workload.begin(lab.client)
        if workload.writer is not None:
            stack.enter_context(workload.writer)
        spec, rate_per_s = workload.spec, MACHINE_REQUESTS_PER_S if machines else REQUESTS_PER_S
        probe = stack.enter_context(
            start_probe(spec.client, spec.ip, spec.port, host=lab.client, rate_per_s=rate_per_s)
        )
        console.print(
            f"[dim]{workload.kind} with {workload.memory_mib} MiB runs on A at {spec.ip}; "
            f"a client streams {rate_per_s:.0f} requests a second over one connection[/]"
        )
        migrations = [
            migrate(lab.host("A"), "B", options),
            migrate(lab.host("B"), "A", options),
        ]
        client = probe.stop()
        verified = workload.verify(lab.client)
    return Outcome(migrations, client, verified)


def migrate(source: Host, target: str, options: Sequence[str]) -> dict[str, Any]:
    """Run the command on the source, its terminal being ours; its report."""
    command = ["migrate", NAME, "--to", target, "--report", REPORT, *options]
    process = source.popen(command, stdout=None, stderr=None)
    code = process.wait(MIGRATION_DEADLINE_S)
    if code != 0:
        raise SystemExit(code)
    report: dict[str, Any] = json.loads(source.read_text(REPORT))
    return report


def show(outcome: Outcome, workload: Workload, console: Console) -> None:
    """The short table at the end."""
    console.print("\nWhat the client and the container noticed")
    table = Table()
    table.add_column("")
    for report in outcome.migrations:
        table.add_column(f"{report['source']} → {report['target']}", justify="right")
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "downtime": lambda r: f"{r['downtime_ms']:.0f} ms",
        "predicted": lambda r: f"{r['predicted_downtime_ms']:.0f} ms",
        "whole migration": lambda r: f"{r['total_ms'] / 1000:.1f} s",
        "memory": lambda r: f"{r['memory_bytes'] / MIB:.0f} MiB",
        "sent": lambda r: f"{r['bytes_sent'] / MIB:.0f} MiB",
        "rounds": lambda r: str(len(r["rounds"])),
    }
    for name, cell in rows.items():
        table.add_row(name, *(cell(report) for report in outcome.migrations))
    console.print(table)
    client = outcome.client
    console.print(
        f"client: {client.sent} requests, {client.received} answers, "
        f"{client.out_of_order} out of order, {client.resets} resets, "
        f"longest gap {client.gap_max_ms:.0f} ms"
    )
    for check in workload.checks:
        console.print(f"memory: {check}")
    verdict = "[bold green]nothing was lost[/]" if outcome.nothing_lost else "[bold red]LOST[/]"
    console.print(verdict)


def size_mib(text: str) -> int:
    """ "256", "256M" or "1G" in MiB."""
    match = re.fullmatch(r"(\d{1,7})([MG]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 256M or 1G")
    return int(match[1]) * (1024 if match[2] == "G" else 1)


def copies(text: str) -> int:
    """How many copies are to be made: each takes memory and an address."""
    if not text.isdecimal() or not 1 <= int(text) <= 20:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 20")
    return int(text)


def main() -> int:
    """Run the demo; 0 when nothing was lost."""
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=["redis", "memory"], default="redis")
    parser.add_argument(
        "--memory",
        type=size_mib,
        metavar="SIZE",
        help="512M, 1G (256M; between virtual machines 64M)",
    )
    parser.add_argument(
        "--dirty-rate",
        type=size_mib,
        metavar="SIZE",
        help="written per second, 50M (8M; between virtual machines 1M)",
    )
    parser.add_argument("--restore", choices=["lazy", "eager"], default="lazy")
    parser.add_argument(
        "--tracker",
        choices=["auto", "write-protect", "soft-dirty", "predump", "none"],
        default="auto",
    )
    parser.add_argument("--clone", type=copies, metavar="N", help="make N copies, 1 to 20")
    parser.add_argument("--vm", action="store_true", help="between virtual machines: slow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here")
    arguments = parser.parse_args()
    if arguments.json is not None and not arguments.json.parent.is_dir():
        parser.error(f"{arguments.json.parent} is no directory")
    console = Console(highlight=False)
    # An emulated machine sends two or three MiB/s: what has or writes more takes many minutes.
    if arguments.memory is None:
        arguments.memory = 64 if arguments.vm else 256
    if arguments.dirty_rate is None:
        arguments.dirty_rate = 1 if arguments.vm else 8
    workload = Workload(arguments.workload, arguments.memory, arguments.dirty_rate)
    options = ["--restore", arguments.restore, "--tracker", arguments.tracker]
    if arguments.clone:
        if arguments.vm or workload.kind != "redis":
            parser.error("--clone copies a redis between hosts of the lab")
        return 0 if run_flock(arguments.clone, workload, options, console) else 1
    outcome = run_demo(workload, options, console, machines=arguments.vm)
    show(outcome, workload, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(outcome.as_json(), indent=1) + "\n")
    return 0 if outcome.nothing_lost else 1


if __name__ == "__main__":
    sys.exit(main())
