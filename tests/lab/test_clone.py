"""A container is copied while clients stream to it: it runs on, and the copy goes on from the same
moment under a name and addresses of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.containers import ContainerSpec, pid
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.migrating import (
    Resident,
    Underway,
    expel,
    resident,
    running_on,
    wait_clean,
)

COPY = "lamb"
IP, IP6 = "10.77.0.152", "fd77::152"
BESIDE = "10.77.0.154"


def clone(source: Host, name: str, *options: str, to: str = "B") -> Underway:
    """Starts `migrate clone NAME`."""
    arguments = ["clone", name, "--to", to, "--name", COPY, "--json", *options]
    return Underway(source, name, arguments, None)


@contextlib.contextmanager
def original(lab: Lab, spec: ContainerSpec) -> Iterator[Resident]:
    """A container on A with a client, and no copy of it at the end."""
    with resident(lab, spec) as guest:
        try:
            yield guest
        finally:
            expel(lab, COPY)


def sockets(host: Host, name: str) -> list[tuple[str, str]]:
    """State and own address of each TCP socket in the container's network."""
    listed = host.run(["ip", "netns", "exec", name, "ss", "-Htan"]).stdout.splitlines()
    return sorted((line.split()[0], line.split()[3]) for line in listed)


def test_a_copy_goes_on_beside_its_original(agents: Lab) -> None:
    spec = ContainerSpec("ewe", "memory", args=("16",), memory_mib=64, address="10.77.0.151/24")
    source, target = agents.host("A"), agents.host("B")
    with original(agents, spec) as guest:
        done = clone(source, guest.name, "--ip", IP, "--ip", IP6).finish()
        assert done.code == 0, done.stderr or done.stdout
        report = done.report
        assert report is not None
        assert report["copies"] == [
            {"name": COPY, "host": "B", "addresses": [IP, IP6], "error": None}
        ]
        assert report["pause_ms"] > 0
        assert report["copying"]["outcome"] == "done"
        # By chance a stack pointer lies at the begin of a page.
        assert all("stack pointer" in text for text in report["copying"]["warnings"])
        # Everything at first, then only what was written.
        first, *later = (one["pages"] for one in report["copying"]["rounds"])
        assert later
        assert max(later) < first
        assert running_on(agents, guest.name) == ["A"]
        assert running_on(agents, COPY) == ["B"]
        # Both families, and as the original's clients are none of its own, no connection.
        assert sockets(target, COPY) == [("LISTEN", "0.0.0.0:7000"), ("LISTEN", "[::]:7000")]
        assert (
            target.run(["nsenter", "-t", str(pid(target, COPY)), "-u", "hostname"]).stdout
            == f"{COPY}\n"
        )
        for address in (IP, IP6, spec.ip):
            (answer,) = guest.ask("VERIFY", address=address)
            assert answer.startswith("VERIFY ok "), answer
            assert " bad=0 " in answer
        # Beside its original, a copy of the same name as elsewhere.
        done = clone(source, guest.name, "--ip", BESIDE, to="A").finish()
        assert done.code == 0, done.stderr or done.stdout
        assert running_on(agents, COPY) == ["A", "B"]
        for address in (BESIDE, spec.ip):
            (answer,) = guest.ask("VERIFY", address=address)
            assert " bad=0 " in answer
        guest.wait_answers()
        client = guest.stop_probe()
        assert client.clean, client
    wait_clean(source)
    wait_clean(target)


def test_a_coordinator_that_dies_leaves_the_original_alone(agents: Lab) -> None:
    """With a server that listens at its own address, and writes while its copies are made."""
    spec = ContainerSpec(
        "ram",
        "redis",
        args=("bind 10.77.0.153 -::1",),
        address="10.77.0.153/24",
        address6=None,
    )
    source, target = agents.host("A"), agents.host("B")
    with original(agents, spec) as guest:
        guest.redis("fill")
        refused = clone(source, guest.name).finish()
        assert refused.code == 2, refused
        assert "--ip" in refused.stderr
        for host in (source, target):
            refused = clone(source, guest.name, "--ip", host.address).finish()
            assert refused.code == 2, refused
            assert f"{host.address} is an address of this host" in refused.stderr
        for phase, to in (("freeze", "B"), ("send", "B"), ("restore", "B"), ("restore", "A")):
            killed = clone(source, guest.name, "--ip", IP, to=to)
            killed.wait_phase(phase)
            killed.kill()
            killed.finish()
            wait_clean(source, guest.name)
            wait_clean(target)
            guest.redis("verify")
        assert running_on(agents, guest.name) == ["A"]
        done = clone(source, guest.name, "--ip", IP).finish()
        assert done.code == 0, done.stderr or done.stdout
        assert ("LISTEN", f"{IP}:6379") in sockets(target, COPY)
        guest.redis("verify", address=IP)
        assert f"copied to B as {COPY}" in source.run(["migrate", "status"]).stdout
        guest.redis("verify")
        client = guest.stop_probe()
        assert client.clean, client
