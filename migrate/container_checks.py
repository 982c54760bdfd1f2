"""What of a container's configuration stands in the way of a migration. Pure.

The source judges its own container by it; the target judges what it is sent, because a peer's
config.json says what runs here as root. Paths: as in OCI's config.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrate.refusals import Refusal
from migrate.runtimes.oci import has_user_namespace, host_root, part

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from migrate.runtimes.base import Container, Mount

# File systems of the kernel's, or of memory: nothing of this host's disks shows in them.
KERNEL_MOUNTS = frozenset(
    {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs"}
)
# What every container has without asking (`runc: specconv.AllowedDevices`).
DEFAULT_DEVICES = frozenset(
    f"/dev/{name}"
    for name in ("null", "zero", "full", "random", "urandom", "tty", "console", "ptmx", "pts")
)
# Without one of its own of these, a container shares the host's, and CRIU can't tell them apart.
OWN_NAMESPACES = ("pid", "mount", "ipc", "uts")
# Runtimes that name the devices to CRIU which they mount where they can't make them.
WITH_USER_NAMESPACES = frozenset({"runc"})
# What runtimes take for orders to themselves: CRIU's options, with programs among them that it runs
# as root (runc: handleCriuConfigurationFile); handlers (crun(1)); properties of systemd's units.
RUNTIME_ANNOTATIONS = ("org.criu.", "run.oci.", "org.systemd.property.")
# Every key of a config.json that this project reads. runc finds a key whatever its case is (Go's
# encoding/json), so what is written otherwise would be in force and not be looked at.
# fmt: off
JUDGED_KEYS = frozenset(
    (
        "access", "action", "allow", "ambient", "annotations", "apparmorProfile", "bounding",
        "capabilities", "cgroupsPath", "containerID", "cpu", "defaultAction", "destination",
        "devices", "effective", "gidMappings", "hooks", "hostID", "hostname", "hugepageLimits",
        "inheritable", "linux", "listenerPath", "major", "maskedPaths", "memory", "minor",
        "mounts", "namespaces", "noNewPrivileges", "options", "path", "permitted", "pids",
        "process", "readonly", "readonlyPaths", "resources", "root", "seccomp", "size", "source",
        "syscalls", "sysctl", "terminal", "type", "uidMappings"
    )
)
# fmt: on
_FOLDED_KEYS = {key.lower(): key for key in JUDGED_KEYS}
# Their keys are names that somebody chose.
_MAPS = ("annotations", "sysctl")


def judge_container(
    container: Container, shared: Sequence[str], devices: Sequence[str] = ()
) -> list[Refusal]:
    """What of the container's state and configuration can't move, for its own host. shared,
    devices: directories and device files that are the same on both."""
    refusals = []
    if container.status != "running":
        remedy = "resume it first" if container.status == "paused" else "start it first"
        refusals.append(
            Refusal("not-running", f"{container.name} is {container.status}, not running", remedy)
        )
    refusals += judge_spec(container.spec, container.mounts)
    if has_user_namespace(container.spec) and container.runtime not in WITH_USER_NAMESPACES:
        refusals.append(
            Refusal(
                "user-namespace",
                f"{container.runtime} does not tell CRIU of the devices that it mounts in a user"
                " namespace, which CRIU can't dump then",
                "run the container by runc",
            )
        )
    refusals += judge_devices(container.spec, devices)
    refusals += judge_binds(container.mounts, shared)
    namespaces = _namespaces(container.spec)
    if container.netns is None and "network" in namespaces and "user" not in namespaces:
        refusals.append(
            Refusal(
                "network-namespace",
                f"the runtime has made the network namespace of {container.name} itself",
                "make one (ip netns add NAME) and give its path in config.json",
            )
        )
    return refusals


def judge_spec(spec: dict[str, Any], mounts: Iterable[Mount]) -> list[Refusal]:
    """What of a configuration can't move, whichever host it is on."""
    refusals = [*_of_keys(spec), *_of_annotations(spec)]
    refusals += [*_of_namespaces(spec), *_of_user_namespace(spec)]
    refusals += [*_of_mounts(mounts), *_of_mapped_mounts(spec)]
    if part(spec, "process").get("terminal") is True:
        refusals.append(
            Refusal(
                "terminal",
                "the container has a terminal",
                "start it detached, with `terminal: false` in config.json",
            )
        )
    if ".." in Path(str(part(spec, "linux").get("cgroupsPath") or "")).parts:
        refusals.append(
            Refusal(
                "cgroup-path",
                "the container's cgroupsPath leads upwards, out of the cgroups perhaps",
                "write linux.cgroupsPath in config.json without '..'",
            )
        )
    if any(part(spec, "hooks").values()):
        refusals.append(
            Refusal(
                "hooks",
                "the container's config.json names hooks, which are programs of the host",
                "remove them from config.json",
            )
        )
    return refusals


def judge_binds(mounts: Iterable[Mount], shared: Sequence[str]) -> list[Refusal]:
    """Mounts that show files of this host. `shared`: directories that are the same on both."""
    return [
        Refusal(
            "bind-mount",
            f"{mount.destination} shows {mount.source} of the host, which does not travel",
            f"--shared {mount.source}, if that is the same storage on both hosts",
        )
        for mount in mounts
        if mount.is_bind and not is_below(mount.source, shared)
    ]


def is_below(path: str, directories: Iterable[str]) -> bool:
    """Whether `path` is one of `directories` or below one, by name, `..` resolved."""
    clean = Path(os.path.normpath(path))
    return clean.is_absolute() and any(
        clean.is_relative_to(os.path.normpath(directory))
        for directory in directories
        if directory.startswith("/")
    )


def _of_namespaces(spec: dict[str, Any]) -> Iterator[Refusal]:
    namespaces = _namespaces(spec)
    if "network" not in namespaces:
        yield Refusal(
            "network-host",
            "the container uses the host's own network, whose connections can't leave it",
            "give it a network namespace by path in config.json, plugged into a bridge",
        )
    for kind in OWN_NAMESPACES:
        if kind not in namespaces:
            yield Refusal(
                "host-namespace",
                f"the container has no {kind} namespace of its own",
                f"add one to linux.namespaces in config.json: {{'type': '{kind}'}}",
            )
    for kind, path in namespaces.items():
        if path and kind != "network":
            yield Refusal(
                "shared-namespace",
                f"the container shares its {kind} namespace by the path {path}",
                "containers of one group can't move one by one: give it its own",
            )


def _of_user_namespace(spec: dict[str, Any]) -> Iterator[Refusal]:
    """CRIU dumps a user namespace if all others belong to it and it has a root (criu/namespaces.c:
    check_user_ns)."""
    linux = part(spec, "linux")
    mappings = ("uidMappings", "gidMappings")
    if not has_user_namespace(spec):
        if any(linux.get(one) for one in mappings):
            yield Refusal(
                "user-namespace",
                "the container's ids are mapped, and it has no user namespace",
                "add one to linux.namespaces in config.json: {'type': 'user'}",
            )
        return
    if _namespaces(spec).get("network"):
        yield Refusal(
            "user-namespace",
            "the container's user namespace does not own its network namespace, which CRIU can't"
            " dump then",
            "leave out the network namespace's path in config.json, so that the runtime makes it;"
            " plug it in between create and start",
        )
    for one in mappings:
        if host_root(spec, one) is None:
            yield Refusal(
                "user-namespace",
                f"the container's user namespace has no root, which CRIU can't do without ({one})",
                f"map containerID 0 in linux.{one} of config.json",
            )


def _of_mounts(mounts: Iterable[Mount]) -> Iterator[Refusal]:
    for mount in mounts:
        if not mount.is_bind and mount.kind not in KERNEL_MOUNTS:
            yield Refusal(
                "mount-kind",
                f"{mount.destination} is a mount of the kind {mount.kind or 'unknown'}",
                "mount it on both hosts and show it to the container by a bind mount (--shared)",
            )


def _of_mapped_mounts(spec: dict[str, Any]) -> Iterator[Refusal]:
    for mount in spec.get("mounts") or ():
        options = {*(mount.get("options") or ()), *(mount.keys())}
        if options & {"uidMappings", "gidMappings", "idmap", "ridmap"}:
            yield Refusal(
                "mount-idmap",
                f"{mount.get('destination')} is mounted with ids of its own, which CRIU loses",
                "mount it without uidMappings, gidMappings and idmap",
            )


def judge_devices(spec: dict[str, Any], same: Iterable[str]) -> Iterator[Refusal]:
    """Devices that the other host need not have. `same`: those that it has."""
    for device in part(spec, "linux").get("devices") or ():
        path = str(device.get("path", "")) if isinstance(device, dict) else ""
        if path not in DEFAULT_DEVICES and path not in same:
            yield Refusal(
                "device",
                f"the container is given the device {path or 'without a path'}",
                "remove it from linux.devices in config.json; or, if it has no state and the target"
                " has it too, name it in [send] devices in /etc/migrate/policy.toml",
            )


def _of_keys(spec: dict[str, Any]) -> Iterator[Refusal]:
    for key in sorted(set(_odd_keys(spec))):
        yield Refusal(
            "config-key",
            f"config.json has a key {key[:80]!r}, which a runtime may take for another one",
            "write it as the OCI runtime specification does",
        )


def _odd_keys(value: Any) -> Iterator[str]:
    """Not of ASCII, or one that is judged, in letters of another case."""
    if isinstance(value, list):
        for one in value:
            yield from _odd_keys(one)
    elif isinstance(value, dict):
        for key, one in value.items():
            if not key.isascii() or _FOLDED_KEYS.get(key.lower(), key) != key:
                yield key
            if key not in _MAPS:
                yield from _odd_keys(one)


def _of_annotations(spec: dict[str, Any]) -> Iterator[Refusal]:
    for name in part(spec, "annotations"):
        if name.lower().startswith(RUNTIME_ANNOTATIONS):
            yield Refusal(
                "annotation",
                f"the container's annotation {name[:80]} is an order to the runtime",
                "remove it from config.json",
            )


def _namespaces(spec: dict[str, Any]) -> dict[str, str]:
    """Kind to path, "" for one that the runtime makes."""
    return {
        str(one.get("type", "")): str(one.get("path") or "")
        for one in part(spec, "linux").get("namespaces") or ()
        if isinstance(one, dict)
    }
