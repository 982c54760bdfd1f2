"""What is refused of a container's configuration, on its own host and on another."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from migrate.container_checks import is_below, judge_binds, judge_container, judge_spec
from migrate.runtimes.base import Container, Mount
from migrate.runtimes.oci import mounts_of, namespace_path

SPEC: dict[str, Any] = {
    "process": {"terminal": False},
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"},
    ],
    "linux": {
        "namespaces": [
            *({"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")),
            {"type": "network", "path": "/run/netns/web"},
        ],
        "devices": [{"path": "/dev/null", "type": "c", "major": 1, "minor": 3}],
    },
}


def container(spec: dict[str, Any] = SPEC, status: Any = "running") -> Container:
    return Container(
        name="web",
        runtime="runc",
        status=status,
        pid=100,
        bundle=Path("/srv/web"),
        rootfs=Path("/srv/web/rootfs"),
        spec=spec,
        cgroup=Path("/sys/fs/cgroup/web"),
        netns=namespace_path(spec, "network"),
        terminal=False,
        mounts=mounts_of(spec),
        descriptors=("/dev/null",) * 3,
    )


def changed(*keys: str, to: Any) -> dict[str, Any]:
    spec = copy.deepcopy(SPEC)
    part = spec
    for key in keys[:-1]:
        part = part.setdefault(key, {})
    part[keys[-1]] = to
    return spec


def namespaces(*kinds: str, **paths: str) -> dict[str, Any]:
    made = [{"type": kind} for kind in kinds]
    given = [{"type": kind, "path": path} for kind, path in paths.items()]
    return changed("linux", "namespaces", to=[*made, *given])


def mount(**fields: Any) -> dict[str, Any]:
    return changed("mounts", to=[{"destination": "/data", **fields}])


OWN = ("pid", "mount", "ipc", "uts")


IDS: list[Any] = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def in_user_namespace(uids: Any = IDS, gids: Any = IDS, **paths: str) -> dict[str, Any]:
    spec = namespaces(*OWN, "user", *(() if paths else ("network",)), **paths)
    spec["linux"] |= {"uidMappings": uids, "gidMappings": gids}
    return spec


def test_a_container_in_a_user_namespace_may_move() -> None:
    given = container(in_user_namespace())
    assert judge_container(given, ()) == []
    (refusal,) = judge_container(dataclasses.replace(given, runtime="crun"), ())
    assert refusal.code == "user-namespace"


def test_a_plain_container_may_move() -> None:
    assert judge_container(container(), ()) == []
    assert judge_spec(SPEC, mounts_of(SPEC)) == []


@pytest.mark.parametrize(
    ("spec", "code"),
    [
        (changed("process", "terminal", to=True), "terminal"),
        (changed("linux", "cgroupsPath", to="/dolly/../../etc"), "cgroup-path"),
        (changed("hooks", "prestart", to=[{"path": "/bin/true"}]), "hooks"),
        (namespaces(*OWN), "network-host"),
        (namespaces(*OWN, "network"), "network-namespace"),
        *(
            (
                namespaces(*(kind for kind in OWN if kind != missing), network="/run/netns/web"),
                "host-namespace",
            )
            for missing in OWN
        ),
        (
            namespaces("mount", "ipc", "uts", network="/run/netns/web", pid="/proc/7/ns/pid"),
            "shared-namespace",
        ),
        (in_user_namespace(network="/run/netns/web"), "user-namespace"),
        (in_user_namespace(uids=[{**IDS[0], "containerID": 1}]), "user-namespace"),
        (in_user_namespace(uids=[{**IDS[0], "hostID": -1}]), "user-namespace"),
        (in_user_namespace(gids=[{**IDS[0], "size": 0}]), "user-namespace"),
        (in_user_namespace(gids=["0 100000 65536"]), "user-namespace"),
        (changed("linux", "uidMappings", to=IDS), "user-namespace"),
        (mount(type="tmpfs", options=["ridmap"]), "mount-idmap"),
        (mount(type="tmpfs", uidMappings=IDS), "mount-idmap"),
        (mount(type="nfs", source="server:/data"), "mount-kind"),
        (mount(), "mount-kind"),
        (changed("linux", "devices", to=[{"path": "/dev/fuse"}]), "device"),
        (changed("linux", "devices", to=["/dev/fuse"]), "device"),
        (changed("annotations", to={"org.criu.config": "/srv/criu.conf"}), "annotation"),
        (changed("annotations", to={"Run.OCI.handler": "krun"}), "annotation"),
        (changed("Hooks", to={"prestart": [{"path": "/bin/true"}]}), "config-key"),
        (changed("linux", "Devices", to=[]), "config-key"),
        (changed("linux", "nameſpaces", to=[]), "config-key"),
        (
            changed("mounts", to=[{"destination": "/proc", "type": "proc", "Type": ""}]),
            "config-key",
        ),
        (mount(type="bind", source="/srv/data"), "bind-mount"),
        (mount(source="/srv/data", options=["rbind", "ro"]), "bind-mount"),
    ],
)
def test_what_cannot_move(spec: dict[str, Any], code: str) -> None:
    refusals = judge_container(container(spec), ())
    assert [refusal.code for refusal in refusals] == [code]
    assert all(refusals[0])


def test_a_device_that_both_hosts_have() -> None:
    spec = changed("linux", "devices", to=[{"path": "/dev/fuse"}])
    assert judge_container(container(spec), (), ("/dev/fuse",)) == []


def test_names_that_somebody_chose_are_no_keys() -> None:
    spec = changed("annotations", to={"Path": "x", "größe": "y"})
    assert judge_container(container(spec), ()) == []


@pytest.mark.parametrize("status", ["created", "paused", "stopped"])
def test_only_a_running_container_moves(status: str) -> None:
    refusals = judge_container(container(status=status), ())
    assert [(one.code, status in one.message) for one in refusals] == [("not-running", True)]


def test_everything_is_told_at_once() -> None:
    spec = changed("process", "terminal", to=True)
    spec["hooks"] = {"poststop": [{"path": "/bin/true"}]}
    spec["linux"]["namespaces"] = []
    refusals = judge_container(container(spec, "paused"), ())
    assert len(refusals) == 1 + 2 + 1 + len(OWN)


def test_hooks_that_are_empty_are_none() -> None:
    assert judge_container(container(changed("hooks", "prestart", to=[])), ()) == []


@pytest.mark.parametrize("broken", [None, [], "x", 7])
def test_a_configuration_of_another_shape_is_no_crash(broken: Any) -> None:
    for key in ("process", "hooks", "linux"):
        judge_spec(changed(key, to=broken), ())


def test_shared_directories_may_be_shown() -> None:
    mounts = [Mount("/data", "bind", "/srv/shared/data", ())]
    assert judge_binds(mounts, ["/srv/shared"]) == []
    assert judge_binds(mounts, ["/srv/shared/data/"]) == []
    assert [one.code for one in judge_binds(mounts, ["/srv/share"])] == ["bind-mount"]


@pytest.mark.parametrize(
    ("path", "directories", "expected"),
    [
        ("/a/b", ["/a"], True),
        ("/a", ["/a"], True),
        ("/ab", ["/a"], False),
        ("/a/../etc", ["/a"], False),
        ("/a/./b/../c", ["/a/c"], True),
        ("a/b", ["/a", "a"], False),
        ("/a", ["", "a", "relative"], False),
        ("/a", ["/"], True),
        ("", ["/"], False),
    ],
)
def test_below(path: str, directories: list[str], expected: bool) -> None:
    assert is_below(path, directories) is expected
