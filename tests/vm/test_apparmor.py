"""AppArmor: its profile goes with a container, or the container stays where it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.brake import Brake
from tests.lab.inside import inside
from tests.lab.invariants import explained
from tests.lab.migrating import begin, migrate, running_on, wait_clean
from tests.lab.test_confinement import READ, guest

NAME: Final = "dolly-vm"
FILE: Final = f"/root/{NAME}"
PROFILE: Final = f"""\
profile {NAME} flags=(attach_disconnected, mediate_deleted) {{
    file,
    network,
    capability,
    signal,
    ptrace,
    deny /data/** w,
}}
"""
# It is not about the time that it stands still: one round is enough.
AT_ONCE: Final = ("--max-downtime", "60000")
SPEC: Final = ContainerSpec(
    "vm-held", "memory", args=("1",), memory_mib=8, address="10.77.0.63/24", address6=None
)


def load(host: Host, *options: str) -> None:
    host.write_text(FILE, PROFILE)
    host.run(["apparmor_parser", "--replace", "--skip-cache", *options, FILE])


def labels(host: Host) -> set[str]:
    """Of all threads of the container."""
    return {one["label"] for one in inside(host, READ, SPEC.name)["sheets"]}


def hold(config: dict[str, Any]) -> None:
    config["process"]["apparmorProfile"] = NAME


@pytest.fixture
def profiled(machines: Lab) -> Iterator[Lab]:
    """Machines, A with the profile."""
    load(machines.host("A"))
    yield machines
    for host in machines.hosts:
        host.run(["apparmor_parser", "--remove", FILE], check=False)


def test_a_profile_goes_with_its_container(profiled: Lab) -> None:
    source, target = profiled.hosts
    brake = Brake(source)
    with guest(profiled, SPEC, hold) as moved:
        assert labels(source) == {f"{NAME} (enforce)"}

        missing = explained(migrate(source, moved.name, "B"), 2).refusals
        assert "is not loaded on this host" in missing["apparmor"][0]
        assert "apparmor_parser -r" in missing["apparmor"][1]
        load(target, "--Complain")
        differs = explained(migrate(source, moved.name, "B"), 2).refusals
        assert "in mode enforce, here in mode complain" in differs["apparmor"][0]
        assert set(missing) == set(differs) == {"apparmor"}
        assert running_on(profiled, moved.name) == ["A"]

        # It says so too late: the copy must not run.
        load(target)
        with brake.on("dump"):
            underway = begin(source, moved.name, "B", *AT_ONCE, env=brake.env)
            brake.wait_reached(underway)
            load(target, "--Complain")
        told = explained(underway.finish(240.0))
        assert f"the security label {NAME} (complain) and not {NAME} (enforce)" in told.error
        assert told.container == "runs on A"
        wait_clean(target)
        assert running_on(profiled, moved.name) == ["A"]
        moved.verify()

        load(target)
        assert migrate(source, moved.name, "B", *AT_ONCE).done
        assert labels(target) == {f"{NAME} (enforce)"}
        moved.verify()
