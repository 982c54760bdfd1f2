"""What a policy lets come and go, by a container's configuration alone."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest

from bench.oci_spec import oci_spec
from migrate.core.confinement import Confinements, Sheet
from migrate.core.messages import CopyOf, OpenSession, Versions
from migrate.network_identity import NetworkIdentity
from migrate.policy import Policy, parse
from migrate.policy_checks import (
    Load,
    judge_clone,
    judge_quotas,
    judge_receive,
    judge_send,
    judge_tasks,
)
from migrate.runtimes.oci import mounts_of

MIB = 1 << 20
REQUEST = OpenSession(
    migration_id="m1",
    container="web",
    runtime="runc",
    attempt=1,
    host="alpha.example",
    config_json="{}",
    tasks=(1,),
    memory_bytes=100 * MIB,
    shared_bytes=0,
    rootfs_bytes=10 * MIB,
    streams=4,
    restore="lazy",
    network=NetworkIdentity("web", (), (), (), ()),
    versions=Versions("6.12", "4.2.1", "1.1.15", "x86_64"),
    cpuinfo=b"",
)
USUAL = oci_spec(
    ["/bin/web"], hostname="web", network_namespace="/run/netns/web", cgroup="/web", annotations={}
)
FUSE = {"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}
ALL_DEVICES = {"allow": True, "access": "rwm"}


def test_copies_are_made_where_both_hosts_let_them() -> None:
    policy = parse('[clone]\nfrom = ["alpha.*"]\nto = ["beta"]\ncontainers = ["web"]')
    assert judge_clone(policy, "web", target="beta") == []
    assert judge_clone(policy, "web", source="alpha.example") == []
    assert judge_clone(Policy(), "any", source="any", target="any") == []
    assert len(judge_clone(policy, "db", target="gamma")) == 2
    copied = msgspec.structs.replace(REQUEST, container="web-1", copy_of=CopyOf("web", ()))
    mounts = mounts_of(USUAL)
    assert judge_receive(policy, copied, USUAL, mounts) == []
    refused = parse('[clone]\nhooks = ["fresh"]')
    for hook, found in (("fresh", 0), ("other", 1)):
        asked = msgspec.structs.replace(copied, copy_of=CopyOf("web", (), hook=hook))
        assert len(judge_receive(refused, asked, USUAL, mounts)) == found
    of_another = msgspec.structs.replace(copied, host="beta.example")
    assert [one.code for one in judge_receive(policy, of_another, USUAL, mounts)] == [
        "policy-clone"
    ]
    assert judge_receive(policy, msgspec.structs.replace(REQUEST, host="beta"), USUAL, mounts) == []


def changed(*keys: str | int, to: Any) -> dict[str, Any]:
    spec = copy.deepcopy(USUAL)
    where: Any = spec
    for key in keys[:-1]:
        where = where[key]
    where[keys[-1]] = to
    return spec


def with_capability(kind: str) -> dict[str, Any]:
    sets = USUAL["process"]["capabilities"]
    return changed("process", "capabilities", to={**sets, kind: ["CAP_SYS_ADMIN"]})


def with_rule(**rule: Any) -> dict[str, Any]:
    deny = {"allow": False, "access": "rwm"}
    return changed("linux", "resources", to={"devices": [deny, {"allow": True, **rule}]})


def with_mount(destination: str, kind: str, *options: str) -> dict[str, Any]:
    mount = {"destination": destination, "type": kind, "source": kind, "options": list(options)}
    return changed("mounts", to=[*USUAL["mounts"], mount])


def without(name: str, path: str) -> dict[str, Any]:
    return changed("linux", name, to=[one for one in USUAL["linux"][name] if one != path])


def codes(spec: dict[str, Any], policy: str = "", **fields: Any) -> list[str]:
    request = msgspec.structs.replace(REQUEST, **fields)
    found = judge_receive(parse(policy), request, spec, mounts_of(spec))
    assert all(all(one) for one in found)
    return [one.code for one in found]


def test_a_usual_container_may_come_from_any_host() -> None:
    assert codes(USUAL) == []
    assert (
        codes(
            changed(
                "linux", "devices", to=[{**FUSE, "path": "/dev/null", "minor": 3} | {"major": 1}]
            )
        )
        == []
    )
    # What Docker gives: nodes of any device may be made, and not used.
    assert codes(with_rule(type="b", access="m")) == []
    assert codes(with_rule(type="c", major=136, access="rwm")) == []


PRIVILEGED = [
    *(
        (with_capability(kind), "policy-capability", 'capabilities = ["CAP_SYS_ADMIN"]')
        for kind in ("bounding", "effective", "inheritable", "permitted", "ambient")
    ),
    (changed("linux", "devices", to=[FUSE]), "policy-device", 'devices = ["/dev/fuse"]'),
    (changed("linux", "seccomp", to=None), "policy-seccomp", "seccomp_off = true"),
    (
        changed("linux", "seccomp", to={"defaultAction": "SCMP_ACT_ALLOW"}),
        "policy-seccomp",
        "seccomp_off = true",
    ),
    (
        changed("linux", "seccomp", "syscalls", to=[{"names": ["x"], "action": "SCMP_ACT_LOG"}]),
        "policy-seccomp",
        "seccomp_off = true",
    ),
    *(
        (spec, "policy-kernel-files", "kernel_files = true")
        for spec in (
            changed("linux", "maskedPaths", to=None),
            changed("linux", "readonlyPaths", to=[]),
            without("maskedPaths", "/proc/kcore"),
            without("readonlyPaths", "/proc/sys"),
            with_mount("/sys", "sysfs", "rw"),
            with_mount("/sys", "sysfs", "ro", "rw"),
            with_mount("/sys2", "sysfs", "ro"),
            with_mount("/proc2", "proc", "ro"),
            with_mount("/proc/../p", "proc"),
            with_mount("/dev", "devtmpfs"),
        )
    ),
]


@pytest.mark.parametrize(("spec", "code", "line"), PRIVILEGED)
def test_nothing_privileged_comes_unless_it_may(spec: dict[str, Any], code: str, line: str) -> None:
    assert codes(spec) == [code]
    assert codes(spec, f"[receive]\n{line}") == []
    assert codes(spec, "[receive]\nprivileged = true") == []


@pytest.mark.parametrize(
    "spec",
    [
        with_rule(),
        with_rule(type="b", major=8, minor=0, access="r"),
        with_rule(type="c", major=1, minor=1),  # /dev/mem
        with_rule(type="b", major=1, minor=3),
        with_rule(type="c", major=10),
        # One of these devices by its name, the disk by its number.
        changed(
            "linux", "devices", to=[{"path": "/dev/null", "type": "b", "major": 8, "minor": 0}]
        ),
    ],
)
def test_devices_are_judged_by_their_numbers(spec: dict[str, Any]) -> None:
    assert codes(spec) == ["policy-device"]
    assert codes(spec, "[receive]\ndevices = ['/dev/fuse']") == ["policy-device"]


def test_an_allowed_device_may_be_used() -> None:
    spec = with_rule(type="c", major=10, minor=229, access="rw")
    spec["linux"]["devices"] = [FUSE]
    assert codes(spec) == ["policy-device"] * 2
    assert codes(spec, "[receive]\ndevices = ['/dev/fuse']") == []


DENY_ALL = {"allow": False, "access": "rwm"}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([DENY_ALL], []),
        ([{**DENY_ALL, "type": "a"}, {"allow": True, "type": "c", "major": 1, "minor": 3}], []),
        ([], ["policy-device"]),
        ([{**DENY_ALL, "access": "rw"}], ["policy-device"]),
        ([{**DENY_ALL, "type": "b"}], ["policy-device"]),
        ([{**DENY_ALL, "major": 8}], ["policy-device"]),
    ],
)
def test_crun_denies_no_device_by_itself(rules: list[dict[str, Any]], expected: list[str]) -> None:
    spec = changed("linux", "resources", to={"devices": rules})
    assert codes(spec) == []
    assert codes(spec, "[receive]\nruntimes = ['crun']", runtime="crun") == expected
    privileged = "[receive]\nruntimes = ['crun']\nprivileged = true"
    assert codes(spec, privileged, runtime="crun") == []


def test_a_filter_that_asks_the_host_is_none_of_its_policy() -> None:
    spec = changed("linux", "seccomp", "listenerPath", to="/run/agent.sock")
    assert codes(spec, "[receive]\nseccomp_off = true") == ["policy-seccomp"]


def test_without_a_cgroup_namespace_its_files_are_the_hosts() -> None:
    spec = with_mount("/cgroup", "cgroup2", "rw")
    assert codes(spec) == []
    kinds = [one for one in USUAL["linux"]["namespaces"] if one["type"] != "cgroup"]
    spec["linux"]["namespaces"] = kinds
    assert codes(spec) == ["policy-kernel-files"]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("from = ['alpha.example']", []),
        ("from = ['*.EXAMPLE']", []),
        ("from = ['beta*', '*.example.org']", ["policy-source"]),
        ("from = []", ["policy-source"]),
        ("containers = ['we?']", []),
        ("containers = ['db-*']", ["policy-container"]),
        ("runtimes = ['crun']", ["policy-runtime"]),
        ("from = []\nruntimes = []", ["policy-source", "policy-runtime"]),
    ],
)
def test_who_may_bring_what(policy: str, expected: list[str]) -> None:
    assert codes(USUAL, f"[receive]\n{policy}") == expected


def test_what_may_leave() -> None:
    assert judge_send(Policy(), "web", "beta") == []
    policy = parse("[send]\nto = ['b*']\ncontainers = ['web']")
    assert judge_send(policy, "web", "Beta") == []
    assert [one.code for one in judge_send(policy, "db", "gamma")] == [
        *("policy-target", "policy-container")
    ]


@pytest.mark.parametrize(
    ("quotas", "said"),
    [
        ("", []),
        ("sessions = 3", []),
        ("sessions = 2", ["2 sessions "]),
        ("sessions_per_host = 1", ["1 sessions of alpha.example"]),
        ("memory_mib = 300", []),
        ("memory_mib = 299", ["299 MiB of memory"]),
        ("rootfs_mib = 29\nsessions = 0", ["0 sessions ", "29 MiB of files"]),
    ],
)
def test_quotas(quotas: str, said: list[str]) -> None:
    others = [Load("alpha.example", 100 * MIB, 10 * MIB, 1), Load("beta", 100 * MIB, 10 * MIB, 1)]
    policy = parse(f"[receive.quotas]\n{quotas}")
    found = judge_quotas(policy, REQUEST, others)
    assert [one.code for one in found] == ["quota"] * len(said)
    assert all(text in one.message for text, one in zip(said, found, strict=True))


def test_a_copy_that_shares_a_transfer_counts_as_what_it_takes() -> None:
    first = msgspec.structs.replace(REQUEST, copy_of=CopyOf("ram", (), fill=False))
    shares = CopyOf("ram", (), beside="m0", number=1, fill=False)
    beside = msgspec.structs.replace(REQUEST, copy_of=shares)
    filled = msgspec.structs.replace(REQUEST, copy_of=msgspec.structs.replace(shares, fill=True))
    whole = (REQUEST.memory_bytes, REQUEST.rootfs_bytes)
    assert Load.of("alpha", REQUEST) == ("alpha", *whole, 1)
    assert Load.of("alpha", first) == ("alpha", *whole, 1)
    assert Load.of("alpha", filled) == ("alpha", *whole, 0)
    assert Load.of("alpha", beside) == ("alpha", REQUEST.shared_bytes, REQUEST.rootfs_bytes, 0)
    policy = parse("[receive.quotas]\nsessions_per_host = 1")
    others = [Load.of(REQUEST.host, first)] + 9 * [Load.of(REQUEST.host, beside)]
    assert judge_quotas(policy, beside, others) == []
    assert len(judge_quotas(policy, REQUEST, others)) == 1


@pytest.mark.parametrize("broken", [None, 7, "x", [7], [{}], {"devices": 7}, {"devices": [7]}])
def test_another_shape_is_refused_by_one_of_few_errors(broken: Any) -> None:
    for key in ("process", "linux", "mounts"):
        for inner in ("", "capabilities", "devices", "resources", "seccomp", "namespaces"):
            spec = changed(key, to={inner: broken} if inner else broken)
            try:
                judge_receive(Policy(), REQUEST, spec, mounts_of(spec))
            except (ValueError, TypeError, AttributeError, LookupError):
                continue


def tasks(**fields: Any) -> Confinements:
    usual = Sheet(
        users=(0, 0, 0, 0),
        groups=(0, 0, 0, 0),
        more_groups=(),
        inheritable=0,
        permitted=0,
        effective=0,
        bounding=1 << 0 | 1 << 27,
        ambient=0,
        no_new_privileges=False,
        seccomp=2,
        filters=1,
        label="",
        user_map="0 0 4294967295",
        group_map="0 0 4294967295",
        setgroups="allow",
        oom_score_adj=0,
        limits={},
    )
    return Confinements((usual, msgspec.structs.replace(usual, **fields)), {1: 0, 7: 1})


def mapped(first: int, *, named: bool = True) -> dict[str, Any]:
    extents = [{"containerID": 0, "hostID": first, "size": 65536}]
    spec = changed("linux", "uidMappings", to=extents)
    spec["linux"]["gidMappings"] = extents
    if named:
        spec["linux"]["namespaces"].append({"type": "user"})
    return spec


def test_a_host_that_wants_nobody_to_be_its_root() -> None:
    policy = "[receive]\nrequire_user_namespace = true\nprivileged = true"
    for spec in (USUAL, mapped(0), mapped(100000, named=False)):
        assert codes(spec, policy) == ["policy-user-namespace"]
        assert codes(spec) == []
    assert codes(mapped(100000), policy) == []
    away = {"user_map": "0 100000 65536", "group_map": "0 100000 65536"}
    usual = tasks(**away).sheets[1]
    assert judge_tasks(parse(policy), Confinements((usual,), {1: 0})) == []
    for maps in ({"user_map": "0 1 9\n9 0 1"}, {"group_map": "0 0 1"}):
        sheets = (usual, msgspec.structs.replace(usual, **maps))
        (refusal,) = judge_tasks(parse(policy), Confinements(sheets, {1: 0, 7: 1}))
        assert refusal.code == "policy-user-namespace"


@pytest.mark.parametrize(
    ("fields", "code", "line"),
    [
        ({"bounding": 1 << 21}, "policy-capability", "capabilities = ['CAP_SYS_ADMIN']"),
        ({"ambient": 1 << 21}, "policy-capability", "capabilities = ['CAP_SYS_ADMIN']"),
        ({"seccomp": 0, "filters": 0}, "policy-seccomp", "seccomp_off = true"),
    ],
)
def test_tasks_are_judged_whatever_their_configuration_says(
    fields: dict[str, Any], code: str, line: str
) -> None:
    assert judge_tasks(Policy(), tasks()) == []
    (refusal,) = judge_tasks(Policy(), tasks(**fields))
    assert refusal.code == code
    assert judge_tasks(parse(f"[receive]\n{line}"), tasks(**fields)) == []
    assert judge_tasks(parse("[receive]\nprivileged = true"), tasks(**fields)) == []
