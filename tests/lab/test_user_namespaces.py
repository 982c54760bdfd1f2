"""Containers in user namespaces: they move with their maps, their files and their connections."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec, bundle_path, create, host_device
from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.probe_process import start_probe
from tests.lab.invariants import failure_lab
from tests.lab.migrating import Resident, expel, migrate, running_on

SPEC: Final = ContainerSpec("un1", "memory", memory_mib=24, address="10.77.0.92/24", address6=None)
FIRST_ID: Final = 100000
IDS: Final = [{"containerID": 0, "hostID": FIRST_ID, "size": 65536}]
MAP: Final = "0 100000 65536"

READ: Final = """
from migrate.confinement import read
answer(read(Path("/sys/fs/cgroup/dolly") / given))
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
def guest(lab: Lab, spec: ContainerSpec = SPEC, *, probe: bool = True) -> Iterator[Resident]:
    """A container on A whose root is the host's FIRST_ID, with a streaming client."""
    host = lab.host("A")
    with contextlib.ExitStack() as stack:
        stack.callback(expel, lab, spec.name)
        create(host, spec)
        map_ids(host, spec.name)
        bundle, end = bundle_path(spec.name), host_device(spec.name)
        host.run(
            [
                "sh",
                "-c",
                START,
                "start",
                spec.name,
                bundle,
                end,
                spec.hardware_address,
                spec.address,
            ]
        )
        client = None
        if probe:
            client = stack.enter_context(start_probe("lines", spec.ip, spec.port, host=lab.client))
        yield Resident(lab, spec, client)


def map_ids(host: Host, name: str) -> None:
    path = f"{bundle_path(name)}/config.json"
    config: dict[str, Any] = json.loads(host.read_text(path))
    linux = config["linux"]
    for namespace in linux["namespaces"]:
        namespace.pop("path", None)
    linux["namespaces"].append({"type": "user"})
    linux |= {"uidMappings": IDS, "gidMappings": IDS}
    host.write_text(path, json.dumps(config))


def test_it_moves_there_and_back(stage: Lab) -> None:
    with guest(stage) as moved:
        for source, target in (("A", "B"), ("B", "A")):
            done = migrate(stage.host(source), moved.name, target).done
            print(done)
            assert running_on(stage, moved.name) == [target]
            moved.verify()
        assert moved.stop_probe().clean
