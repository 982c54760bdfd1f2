"""The demo of copies: a redis on lab host A, sheep of it on B and C, made by one command.

While a client streams to the original and a writer changes it, `migrate clone` makes all sheep of
one moment. Then all of them are asked for what the original had before, each is told something that
the others must not know, and the client says how long the original kept it waiting.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich.table import Table

from bench.containers import create, start
from bench.lab.lab import Lab
from bench.probe_process import start_probe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from bench.demo import Workload
    from bench.lab.host import Host

MIB: Final = 1 << 20
FOLDS: Final = ("B", "C")
POOLS: Final = ("10.77.0.60-10.77.0.99/24", "fd77::60-fd77::99")
"""The sheep's addresses: containers of a lab have up to 100."""
REPORT: Final = "/tmp/dolly-clone.json"  # noqa: S108  (inside the host, whose /tmp is its own)
CLONE_DEADLINE_S: Final = 600.0


class Sheep(NamedTuple):
    """A copy: where it runs, at which address."""

    name: str
    host: str
    address: str


def run_flock(count: int, workload: Workload, options: Sequence[str], console: Console) -> bool:
    """Make `count` copies and look at them; whether all is as it should be."""
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(["A", *FOLDS]))
        lab.start_agents()
        spec = workload.spec
        create(lab.host("A"), spec)
        start(lab.host("A"), spec.name)
        workload.begin(lab.client)
        assert workload.writer is not None
        stack.enter_context(workload.writer)
        _redis(lab.client, spec.ip, "SET", "told", "before")
        probe = stack.enter_context(
            start_probe(workload.spec.client, spec.ip, spec.port, host=lab.client)
        )
        report = _clone(lab, count, spec.name, options)
        flock = [Sheep(one["name"], one["host"], one["addresses"][0]) for one in report["copies"]]
        keys = _redis(lab.client, spec.ip, "DBSIZE")
        same = all(
            (_redis(lab.client, one.address, "GET", "told"), one_size) == ("before", keys)
            for one in flock
            for one_size in [_redis(lab.client, one.address, "DBSIZE")]
        )
        for one in flock:
            _redis(lab.client, one.address, "SET", "told", one.name)
        apart = all(_redis(lab.client, one.address, "GET", "told") == one.name for one in flock)
        apart = apart and _redis(lab.client, spec.ip, "GET", "told") == "before"
        client = probe.stop()
        verified = workload.verify(lab.client)
    _show(flock, report, console)
    console.print(f"every sheep has the same {keys} keys: {_said(same)}; then each says its own")
    console.print(f"name, and the original what it said before: {_said(apart)}")
    console.print(
        f"client of the original: {client.sent} requests, {client.received} answers,"
        f" {client.out_of_order} out of order, {client.resets} resets,"
        f" longest gap {client.gap_max_ms:.0f} ms; its memory is right: {_said(verified)}"
    )
    return same and apart and verified and client.clean


def _clone(lab: Lab, count: int, original: str, options: Sequence[str]) -> dict[str, Any]:
    """Run the command on A, its terminal being ours; the report."""
    source, hosts = lab.host("A"), FOLDS[:count]
    command = ["migrate", "clone", original, "--to", ",".join(hosts), "--count", str(count)]
    command += ["--name", "sheep-{n}", "--report", REPORT, *options]
    command += [word for pool in POOLS for word in ("--ip", pool)]
    process = source.popen(command, stdout=None, stderr=None)
    code = process.wait(CLONE_DEADLINE_S)
    if code != 0:
        raise SystemExit(code)
    report: dict[str, Any] = json.loads(source.read_text(REPORT))
    return report


def _redis(client: Host, address: str, *words: str) -> str:
    return client.run(["redis-cli", "-h", address, *words]).stdout.strip()


def _show(flock: Sequence[Sheep], report: dict[str, Any], console: Console) -> None:
    table = Table()
    for heading in ("sheep", "host", "address"):
        table.add_column(heading)
    for one in flock:
        table.add_row(*one)
    console.print(table)
    copying = report["copying"]
    console.print(
        f"the original stood still for {report['pause_ms']:.0f} ms,"
        f" {copying['bytes_sent'] / MIB:.0f} MiB were sent, all within"
        f" {copying['total_ms'] / 1000:.1f} s"
    )


def _said(is_so: bool) -> str:
    return "[bold green]yes[/]" if is_so else "[bold red]NO[/]"
