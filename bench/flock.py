"""The demo of copies: a redis on lab host A, sheep of it on B and C, each of a moment of its own.

While a client streams to the original and a writer changes it, `migrate clone` is run once for each
sheep. Then all of them are asked for what the original had before, each is told something that the
others must not know, and the client says how long the original kept it waiting.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

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
ADDRESS: Final = "10.77.0.{}"
FIRST: Final = 60
"""The last byte of the first sheep's address: containers of a lab have up to 100."""
REPORT: Final = "/tmp/dolly-clone.json"  # noqa: S108  (inside the host, whose /tmp is its own)
CLONE_DEADLINE_S: Final = 600.0


class Sheep:
    """A copy: where it runs, at which address, and the report of its making."""

    def __init__(self, name: str, host: str, address: str, report: dict[str, Any]) -> None:
        self.name = name
        self.host = host
        self.address = address
        self.report = report


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
        flock = [_clone(lab, number, spec.name, options) for number in range(count)]
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
    _show(flock, console)
    console.print(f"every sheep has the same {keys} keys: {_said(same)}; then each says its own")
    console.print(f"name, and the original what it said before: {_said(apart)}")
    console.print(
        f"client of the original: {client.sent} requests, {client.received} answers,"
        f" {client.out_of_order} out of order, {client.resets} resets,"
        f" longest gap {client.gap_max_ms:.0f} ms; its memory is right: {_said(verified)}"
    )
    return same and apart and verified and client.clean


def _clone(lab: Lab, number: int, original: str, options: Sequence[str]) -> Sheep:
    """Run the command on A, its terminal being ours."""
    name, host = f"sheep-{number + 1}", FOLDS[number % len(FOLDS)]
    address = ADDRESS.format(FIRST + number)
    source = lab.host("A")
    command = ["migrate", "clone", original, "--to", host, "--name", name, "--ip", address]
    process = source.popen([*command, "--report", REPORT, *options], stdout=None, stderr=None)
    code = process.wait(CLONE_DEADLINE_S)
    if code != 0:
        raise SystemExit(code)
    return Sheep(name, host, address, json.loads(source.read_text(REPORT)))


def _redis(client: Host, address: str, *words: str) -> str:
    return client.run(["redis-cli", "-h", address, *words]).stdout.strip()


def _show(flock: Sequence[Sheep], console: Console) -> None:
    table = Table()
    for heading in ("sheep", "host", "address", "the original stood still", "sent"):
        table.add_column(heading)
    for one in flock:
        sent = one.report["copying"]["bytes_sent"] / MIB
        pause = f"{one.report['pause_ms']:.0f} ms"
        table.add_row(one.name, one.host, one.address, pause, f"{sent:.0f} MiB")
    console.print(table)


def _said(is_so: bool) -> str:
    return "[bold green]yes[/]" if is_so else "[bold red]NO[/]"
