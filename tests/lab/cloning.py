"""Copies that a test disturbs while they are made.

with threatened(lab, "c1") as under, cloning(lab, under.name) as underway:
    ... something happens ...
    told = failed(underway)                      # one message, and what it says
    assert_undone(under)                         # as it was, and of the copy nothing remains
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.invariants import Told, explained
from tests.lab.migrating import Underway

COPY: Final = "lamb"
IP: Final = "10.77.0.154"


@contextlib.contextmanager
def cloning(lab: Lab, name: str, *options: str) -> Iterator[Underway]:
    """`migrate clone NAME --to B` on A, for the test to disturb; ended with the block."""
    words = ["clone", name, "--to", "B", "--name", COPY, "--ip", IP, "--json", *options]
    underway = Underway(lab.host("A"), name, words, None)
    try:
        yield underway
    finally:
        if underway.process.poll() is None:
            underway.kill()
        # It has been finished by the test already, unless that failed.
        with contextlib.suppress(ValueError):
            underway.finish()


def failed(underway: Underway) -> Told:
    """What a copy that could not be made has said."""
    done = underway.finish()
    assert done.report is not None, done.stderr
    return explained(replace(done, report=done.report["copying"]))


@contextlib.contextmanager
def addresses(host: Host, *networks: str) -> Iterator[None]:
    """That host has these as well."""
    link = host.run(["sh", "-c", "ip -o -4 address show scope global"]).stdout.split()[1]
    for network in networks:
        host.run(["ip", "address", "add", network, "dev", link, "nodad"])
    try:
        yield
    finally:
        for network in networks:
            host.run(["ip", "address", "del", network, "dev", link])
