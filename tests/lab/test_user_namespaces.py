"""Containers in user namespaces: they move with their maps, their files and their connections."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec, bundle_path, create, host_device, pid
from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.probe_process import start_probe
from tests.lab.brake import Brake
from tests.lab.cloning import COPY, IP, cloning, failed
from tests.lab.compiling import compiled
from tests.lab.inside import inside
from tests.lab.invariants import (
    Threatened,
    Told,
    assert_undone,
    explained,
    failure_lab,
    picture,
)
from tests.lab.migrating import Resident, begin, expel, migrate, running_on, wait_clean
from tests.lab.test_confinement import READ, rewrite
from tests.lab.test_killed_dump import injected, killer
from tests.lab.waiting import wait_until

SPEC: Final = ContainerSpec("un1", "memory", memory_mib=24, address="10.77.0.92/24", address6=None)
# See MEMORY in test_killed_dump.
UNFILTERED: Final = ContainerSpec(
    "un2", "memory", memory_mib=8, address="10.77.0.93/24", address6=None, seccomp=False
)
FIRST_ID: Final = 100000
IDS: Final = [{"containerID": 0, "hostID": FIRST_ID, "size": 65536}]
MAP: Final = "0 100000 65536"

# One id more than the source's container has.
OTHER_MAP: Final = """
import pycriu
(path,) = Path("/run/migrate/sessions").glob("*.target/img/userns-*.img")
with path.open("rb") as file:
    image = pycriu.images.load(file)
image["entries"][0]["uid_map"][0]["count"] += 1
with path.open("wb") as file:
    pycriu.images.dump(image, file)
"""
# A proc of one's own may be mounted in a user namespace where another one shows all of it (mount_
# too_revealing in fs/namespace.c), which a lab host's does not.
WHOLE_PROC: Final = "mountpoint -q /mnt || mount -t proc proc /mnt"
# $1 container, $2 bundle, $3 host end, $4 MAC, $5 address. The network that create has made is
# replaced by one of the user namespace, which the runtime makes.
START: Final = """
set -e
ip netns delete "$1"
chown -R 100000:100000 "$2/rootfs"
runc --log "$2/runc.log" create --bundle "$2" "$1" </dev/null >/dev/null 2>&1
netns=/proc/$(runc state "$1" | sed -n 's/.*"pid": \\([0-9]*\\).*/\\1/p')/ns/net
ip link add "$3" type veth peer name eth0 address "$4" netns "$netns"
nsenter --net="$netns" sh -ec \
    'ip link set lo up; ip addr add "$0" dev eth0; ip link set eth0 up' "$5"
ip link set "$3" master br0 up
runc start "$1"
"""


@pytest.fixture(scope="module")
def stage() -> Iterator[Lab]:
    with failure_lab() as lab:
        for host in lab.hosts:
            host.run(["sh", "-c", WHOLE_PROC])
        yield lab


@contextlib.contextmanager
def guest(lab: Lab, spec: ContainerSpec) -> Iterator[Resident]:
    """A container on A whose root is the host's FIRST_ID, with a streaming client."""
    host = lab.host("A")
    with contextlib.ExitStack() as stack:
        stack.callback(expel, lab, spec.name)
        create(host, spec)
        rewrite(host, spec.name, map_ids)
        of_link = (host_device(spec.name), spec.hardware_address, spec.address)
        host.run(["sh", "-c", START, "start", spec.name, bundle_path(spec.name), *of_link])
        wait_until("its server listens", lambda: listens(host, spec))
        client = stack.enter_context(start_probe("lines", spec.ip, spec.port, host=lab.client))
        yield Resident(lab, spec, client)


def listens(host: Host, spec: ContainerSpec) -> bool:
    """Asked of the kernel: its one client is yet to come."""
    entered = ["nsenter", "--net", "--target", str(pid(host, spec.name))]
    return bool(host.run([*entered, "ss", "-Hltn", "sport", "=", f":{spec.port}"]).stdout)


def map_ids(config: dict[str, Any]) -> None:
    linux = config["linux"]
    for namespace in linux["namespaces"]:
        namespace.pop("path", None)
    linux["namespaces"].append({"type": "user"})
    linux |= {"uidMappings": IDS, "gidMappings": IDS}


def owners(host: Host, bundle: str) -> str:
    """Of some files of a container, as its host sees them."""
    files = [f"{bundle}/rootfs/{one}" for one in ("bin/memory", "data/mine")]
    return host.run(["stat", "-c", "%u %g %a", *files]).stdout


def test_it_moves_there_and_back(stage: Lab) -> None:
    with guest(stage, SPEC) as moved:
        home = stage.host("A")
        mine = home.path(f"{bundle_path(moved.name)}/rootfs/data/mine")
        mine.touch(mode=0o600)
        os.chown(mine, FIRST_ID + 1000, FIRST_ID + 50)
        files = owners(home, bundle_path(moved.name))
        before = inside(home, READ, moved.name)
        assert {sheet["user_map"] for sheet in before["sheets"]} == {MAP}
        assert {sheet["group_map"] for sheet in before["sheets"]} == {MAP}
        for source, target in (("A", "B"), ("B", "A")):
            report = migrate(stage.host(source), moved.name, target).done
            assert report["restore"] == "eager"
            assert any("userfaultfd" in one for one in report["warnings"])
            assert running_on(stage, moved.name) == [target]
            assert inside(stage.host(target), READ, moved.name) == before
            assert owners(stage.host(target), f"/var/lib/migrate/containers/{moved.name}") == files
            # The name of its network's namespace is gone as well.
            for host in stage.hosts:
                wait_clean(host, *([moved.name] if host.name == target else []))
                assert moved.name not in host.run(["ip", "netns", "list"]).stdout
            moved.verify()
            moved.wait_answers()
        assert moved.stop_probe().clean


def test_a_copy_meets_its_hook_as_its_own_root(
    stage: Lab, tmp_path_factory: pytest.TempPathFactory
) -> None:
    target, hook = stage.host("B"), "/etc/migrate/clone.d/tell"
    target.write_text(hook, "", 0o755)
    target.path(hook).write_bytes(
        compiled("copied", tmp_path_factory.mktemp("programs")).read_bytes()
    )
    with guest(stage, SPEC) as one:
        brake = Brake(target)
        with cloning(stage, one.name, "--hook", "tell") as underway:
            with brake.on("restore"):
                brake.wait_reached(underway)
                inside(target, OTHER_MAP)
            told = failed(underway)
        assert "so no hook was run in it" in told.error
        wait_clean(target)
        with cloning(stage, one.name, "--hook", "tell") as underway:
            done = underway.finish()
            assert done.code == 0, done.stderr or done.stdout
        written = f"/var/lib/migrate/containers/{COPY}/rootfs/data/told"
        assert f"copy={COPY} of={one.name} addresses={IP} user=0 " in target.read_text(written)
        assert target.run(["stat", "-c", "%u %g", written]).stdout == f"{FIRST_ID} {FIRST_ID}\n"
        (answer,) = one.ask("VERIFY", address=IP)
        assert " bad=0 " in answer
        expel(stage, COPY)
        one.wait_answers()
        assert one.stop_probe().clean
    target.run(["rm", hook])
    wait_clean(target)


def test_what_fails_is_undone(stage: Lab) -> None:
    source, target = stage.hosts
    with guest(stage, SPEC) as one:
        under = Threatened(one, picture(source, one.name))

        def fails(disturb: Callable[[], object]) -> Told:
            brake = Brake(target)
            with brake.on("restore"):
                underway = begin(source, one.name, "B")
                brake.wait_reached(underway)
                disturb()
            told = explained(underway.finish())
            assert told.container == "runs on A"
            return told

        told = fails(lambda: target.run(["ip", "link", "delete", host_device(one.name)]))
        assert "can't be handed over" in told.error
        assert_undone(under)
        told = fails(lambda: inside(target, OTHER_MAP))
        assert f"user map 0 {FIRST_ID} 65537 and not {MAP}" in told.error
        assert running_on(stage, one.name) == ["A"]
        wait_clean(target)
        one.verify()
        assert one.stop_probe().clean


def test_a_dump_whose_criu_is_killed(stage: Lab) -> None:
    host = stage.host("A")
    with guest(stage, UNFILTERED) as one, killer(host, one.name) as kill:
        for step in ("2 ptrace POKEDATA", "1 ptrace CONT", "6 sendto"):
            answer = kill(step)
            assert (answer["killed"], answer["undo"]) == (True, ""), f"{step}: {answer}"
            assert running_on(stage, one.name) == ["A"], step
            one.verify()
            one.wait_answers()
            assert injected(host, one.name) == "", step
        assert kill("0")["error"] == "", "no later dump succeeds"
        one.verify()
        assert one.stop_probe().clean
