"""crun moves containers as runc does, beside it; what is not there or not allowed is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.containers import ContainerSpec, pid, state
from bench.lab.lab import Lab
from tests.lab.cloning import COPY, cloning
from tests.lab.compiling import compiled
from tests.lab.inside import inside
from tests.lab.invariants import (
    assert_survives_a_failed_restore,
    explained,
    failure_lab,
    threatened,
)
from tests.lab.migrating import expel, migrate, resident, running_on, wait_clean
from tests.lab.trees import check_tree, tree_counters

POLICY = "/etc/migrate/policy.toml"
HOOK = "/etc/migrate/clone.d/tell"
MEMORY = ContainerSpec("cr1", "memory", address="10.77.0.31/24", runtime="crun")
TREE = ContainerSpec("cr2", "tree", address="10.77.0.32/24", runtime="crun")
# Of every task in the pid namespace of a container, by its init.
CGROUPS = """
import contextlib
namespace, cgroups = Path(f"/proc/{given}/ns/pid").readlink(), []
for task in Path("/proc").glob("[1-9]*"):
    with contextlib.suppress(OSError):
        if (task / "ns/pid").readlink() == namespace:
            cgroups.append((task / "cgroup").read_text().splitlines()[-1])
answer(cgroups)
"""
NEIGHBOUR = ContainerSpec("cr3", "memory", address="10.77.0.33/24")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Hosts that receive containers of crun's, too."""
    with failure_lab() as lab:
        for host in lab.hosts:
            host.write_text(POLICY, '[receive]\nruntimes = ["runc", "crun"]\n')
        yield lab


def test_there_and_back_beside_a_container_of_runc(lab: Lab) -> None:
    a, b = lab.hosts
    with resident(lab, MEMORY) as guest, resident(lab, NEIGHBOUR) as neighbour:
        for source, target in ((a, b), (b, a)):
            report = migrate(source, guest.name, target.name).done
            assert (report["runtime"], report["restore"]) == ("crun", "lazy")
            assert running_on(lab, guest.name) == [target.name]
            guest.wait_answers()
            guest.verify()
        assert migrate(a, neighbour.name, "B").done["runtime"] == "runc"
        neighbour.verify()
        for one in (guest, neighbour):
            client = one.stop_probe()
            assert client.clean, client
        wait_clean(a, guest.name)
        wait_clean(b, neighbour.name)


def test_every_task_of_a_tree_is_in_its_cgroup(lab: Lab) -> None:
    """crun itself moves the first one there, and that when it runs already."""
    a, b = lab.hosts
    with resident(lab, TREE) as guest:
        forks = tree_counters(guest)["forks"]
        assert migrate(a, guest.name, "B", "--restore", "eager", "--runtime", "crun").done
        cgroups = inside(b, CGROUPS, pid(b, guest.name))
        assert len(cgroups) > 1
        assert set(cgroups) == {"0::/dolly/cr2"}
        check_tree(guest)
        assert tree_counters(guest)["forks"] > forks
        assert guest.stop_probe().clean
        wait_clean(a)
        wait_clean(b, guest.name)


def test_every_task_of_a_copy_is_in_a_cgroup_of_its_own(
    lab: Lab, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By the images: crun has CRIU rename nothing. It meets a program before."""
    a, b = lab.hosts
    tell = compiled("copied", tmp_path_factory.mktemp("programs"))
    b.write_text(HOOK, "", 0o755)
    b.path(HOOK).write_bytes(tell.read_bytes())
    with resident(lab, TREE) as guest:
        try:
            with cloning(lab, guest.name, "--hook", Path(HOOK).name) as underway:
                done = underway.finish()
                assert done.code == 0, done.stderr or done.stdout
            cgroups = inside(b, CGROUPS, pid(b, COPY))
            assert len(cgroups) > 1
            assert set(cgroups) == {f"0::/dolly/{COPY}"}
            assert set(inside(a, CGROUPS, pid(a, guest.name))) == {"0::/dolly/cr2"}
            assert f"copy={COPY}" in b.read_text(
                f"/var/lib/migrate/containers/{COPY}/rootfs/data/told"
            )
            check_tree(guest)
            assert guest.stop_probe().clean
        finally:
            expel(lab, COPY)
        wait_clean(a, guest.name)
        wait_clean(b)


def test_the_restore_fails(lab: Lab) -> None:
    with threatened(lab, "cr-fails", runtime="crun") as under:
        assert_survives_a_failed_restore(under)


def test_what_is_refused(lab: Lab) -> None:
    a, b = lab.hosts
    with resident(lab, MEMORY, probe=False) as guest:
        a.run(["mkdir", "/run/runc/cr1"])
        both = migrate(a, guest.name, "B")
        assert (both.code, both.report) == (2, None)
        assert "runc and crun both have a container cr1" in both.stderr
        a.run(["rmdir", "/run/runc/cr1"])

        b.run(["mv", "/usr/bin/crun", "/usr/bin/crun.away"])
        refusals = explained(migrate(a, guest.name, "B"), 2).refusals
        assert refusals["runtime"] == (
            *("the runtime crun can't be found on this host", "install crun here"),
        )
        b.run(["mv", "/usr/bin/crun.away", "/usr/bin/crun"])

        # Without the operator's word a host receives containers of runc alone.
        allowed = b.read_text(POLICY)
        b.write_text(POLICY, "")
        refusals = explained(migrate(a, guest.name, "B"), 2).refusals
        assert set(refusals) == {"policy-runtime"}
        assert refusals["policy-runtime"][1].startswith('add "crun" to [receive] runtimes')
        b.write_text(POLICY, allowed)
        assert state(a, guest.name) == "running"
        wait_clean(b)
