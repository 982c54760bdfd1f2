"""Whether a target can take a container, by facts alone. With real hosts: tests/lab."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from migrate.core import messages
from migrate.network_identity import NetworkIdentity
from migrate.preflight import (
    DISK_RESERVE_BYTES,
    MEMORY_RESERVE_BYTES,
    SOURCE_MEMORY_RESERVE_BYTES,
    judge_cpu,
    judge_mounts,
    judge_profiles,
    judge_promised,
    judge_resources,
    judge_room,
    judge_source_memory,
    judge_user_namespace,
    judge_versions,
)
from migrate.runtimes.base import Mount

MIB = 1 << 20
HERE = messages.Versions(kernel="6.12", criu="4.2.1", runtime="1.1.15", architecture="x86_64")


def request(**fields: Any) -> messages.OpenSession:
    ordinary = messages.OpenSession(
        migration_id="m1",
        container="web",
        runtime="runc",
        attempt=1,
        host="alpha",
        config_json="{}",
        tasks=(1,),
        memory_bytes=512 * MIB,
        shared_bytes=64 * MIB,
        rootfs_bytes=100 * MIB,
        streams=4,
        restore="lazy",
        network=NetworkIdentity("web", (), (), (), ()),
        versions=HERE,
        cpuinfo=b"",
    )
    return msgspec.structs.replace(ordinary, **fields)


def codes(refusals: list[Any]) -> list[str]:
    return [refusal.code for refusal in refusals]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"criu": "4.3"}, []),
        ({"kernel": "6.1", "runtime": "1.3.0"}, []),
        ({"criu": "4.2"}, ["criu-older"]),
        ({"criu": "unknown"}, ["criu-older"]),
        ({"architecture": "aarch64"}, ["architecture"]),
        ({"architecture": "aarch64", "criu": "4.1"}, ["architecture", "criu-older"]),
    ],
)
def test_versions(fields: dict[str, str], expected: list[str]) -> None:
    assert codes(judge_versions(HERE, msgspec.structs.replace(HERE, **fields))) == expected


def test_a_processor_that_lacks_something() -> None:
    assert judge_cpu("") == []
    (refusal,) = judge_cpu("CPU: FPU: avx512f is not supported")
    assert refusal.code == "cpu"
    assert "avx512f" in refusal.message


@pytest.mark.parametrize(
    ("restore", "needed"),
    # Lazily restored memory is there once, the rest twice.
    [("lazy", (512 + 64) * MIB), ("eager", (512 + 512) * MIB)],
)
def test_memory(restore: str, needed: int) -> None:
    wanted = request(restore=restore)
    enough = needed + MEMORY_RESERVE_BYTES
    assert judge_room(wanted, enough, 1 << 40) == []
    assert codes(judge_room(wanted, enough - 1, 1 << 40)) == ["memory"]


def test_disk() -> None:
    enough = 100 * MIB + DISK_RESERVE_BYTES
    assert judge_room(request(), 1 << 40, enough) == []
    assert codes(judge_room(request(), 1 << 40, enough - 1)) == ["disk"]
    assert codes(judge_room(request(), 0, 0)) == ["memory", "disk"]


def test_a_copy_that_shares_a_transfer_needs_room_for_what_it_takes() -> None:
    """Its files, and those of the copies before it, which have not written theirs yet."""
    copy_of = messages.CopyOf("ram", (), beside="m0", number=2, fill=False)
    memory = 2 * 64 * MIB + MEMORY_RESERVE_BYTES
    disk = 3 * 100 * MIB + DISK_RESERVE_BYTES
    assert judge_room(request(copy_of=copy_of), memory, disk) == []
    assert codes(judge_room(request(copy_of=copy_of), memory - 1, disk - 1)) == ["memory", "disk"]
    filled = messages.CopyOf("ram", (), beside="m0", number=2)
    assert codes(judge_room(request(copy_of=filled), memory, disk)) == ["memory"]


def test_a_target_shows_only_what_its_own_operator_shares() -> None:
    there = frozenset({"/srv/shared/a", "/etc"})
    mounts = [
        Mount("/data", "bind", "/srv/shared/a", ()),
        Mount("/more", "bind", "/srv/shared/b", ()),
        Mount("/secrets", "", "/etc", ("rbind",)),
        Mount("/up", "bind", "/srv/shared/../../etc", ()),
        Mount("/proc", "proc", "proc", ()),
    ]
    found = judge_mounts(mounts, ["/srv/shared", ""], there)
    assert codes(found) == ["mount-missing", "mount-not-shared", "mount-not-shared"]
    assert codes(judge_mounts(mounts, [], there)) == ["mount-not-shared"] * 4


def test_limits_need_their_controllers() -> None:
    spec = {"linux": {"resources": {"memory": {"limit": 1}, "cpu": {}, "devices": [{}]}}}
    assert judge_resources(spec, ["memory", "cpu"]) == []
    assert codes(judge_resources(spec, ["cpu"])) == ["cgroup-controller"]
    assert judge_resources({}, []) == []


def test_a_host_that_makes_no_user_namespaces() -> None:
    spec = {"linux": {"namespaces": [{"type": "user"}]}}
    assert codes(judge_user_namespace(spec, "0")) == ["user-namespace"]
    assert judge_user_namespace(spec, "15000") == []
    assert judge_user_namespace({}, "0") == []
    assert judge_resources({"linux": {"resources": None}}, []) == []


LOADED = "docker-default (enforce)\nweb (complain)\n:lxd-1:web2 (enforce)\n"


@pytest.mark.parametrize(
    ("profile", "labels", "said"),
    [
        ("", (), ""),
        ("unconfined", ("unconfined",), ""),
        ("docker-default", ("docker-default (enforce)",), ""),
        # By its whole name.
        ("default", (), "default is not loaded"),
        ("web", ("web (complain)",), ""),
        ("web", ("web (enforce)",), "web is in mode enforce, here in mode complain"),
        # What a program got by its path is in no configuration.
        ("", ("/usr/sbin/named (enforce)", "unconfined"), "/usr/sbin/named is not loaded"),
        # Compared when the copy has them.
        ("", ("web//&other (enforce)", ":lxd-1:web2 (enforce)"), ""),
        ("", ("system_u:system_r:container_t:s0:c1,c2",), ""),
    ],
)
def test_profiles(profile: str, labels: tuple[str, ...], said: str) -> None:
    told = judge_profiles(profile, labels, LOADED)
    assert [(one.code, said in one.message) for one in told] == [("apparmor", True)] * bool(said)


def test_the_source_needs_memory_for_what_tasks_share() -> None:
    """CRIU's images hold it; private memory is not in them."""
    assert judge_source_memory(MIB, MIB + SOURCE_MEMORY_RESERVE_BYTES) == []
    (refusal,) = judge_source_memory(MIB, SOURCE_MEMORY_RESERVE_BYTES)
    assert refusal.code == "memory"


def test_an_address_is_promised_once() -> None:
    def copy(*own: str) -> messages.CopyOf:
        return messages.CopyOf("ram", tuple(("10.0.0.1", address) for address in own))

    others = [request(), request(copy_of=copy("10.0.0.2")), request(copy_of=copy("10.0.0.4"))]
    assert judge_promised(copy("10.0.0.3"), others) == []
    (refusal,) = judge_promised(copy("10.0.0.3", "10.0.0.4"), others)
    assert refusal.code == "address-taken"
    assert refusal.message.startswith("10.0.0.4 ")
