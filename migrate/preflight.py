"""Preflight: whether a migration can succeed, looked at before anything is touched, on both sides.

    check_source   the container and this host          -> facts, cautions, or PreflightRefused
    check_target   this host for a container to come    -> refusals (they travel back to the source)

All blockers are told at once, each with what to do about it. What decides is pure, and most of it
elsewhere: `container_checks.py` (configuration), `blockers.py` (what runs), `host_checks.py`.
Here it is put together with what it decides about.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil

from migrate import (
    address_probe,
    arriving,
    blockers,
    copy_identity,
    cordon,
    facts,
    network,
    policy,
    policy_checks,
)
from migrate.container_checks import is_below, judge_container, judge_spec
from migrate.errors import PreflightRefused, runs_on
from migrate.host_checks import (
    bridge_refusals,
    cpu_failure,
    descriptor_refusals,
    existing,
    host_cautions,
    host_refusals,
    space_refusals,
    version_of,
)
from migrate.netns import path_of
from migrate.network_identity import NetworkError
from migrate.refusals import Caution, Refusal
from migrate.runtimes.oci import has_user_namespace, mounts_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from migrate.config import HostPaths
    from migrate.core.messages import CopyOf, OpenSession, Versions
    from migrate.facts import ContainerFacts
    from migrate.network_identity import IP, NetworkIdentity
    from migrate.policy import Policy
    from migrate.runtimes.base import Container, Mount, Runtime

# What the target keeps free for itself, besides the container.
MEMORY_RESERVE_BYTES = 128 << 20
DISK_RESERVE_BYTES = 64 << 20
# What the source needs besides CRIU's images: hashes of the pages that were sent, buffers.
SOURCE_MEMORY_RESERVE_BYTES = 128 << 20
# Of the journal, its write-ahead log included: full it takes 2 MiB.
JOURNAL_BYTES_MAX = 4 << 20
# Of directories and locks in /run; what is large there lies on a tmpfs of each session.
RUN_BYTES_MAX = 256 << 10
FILES_MAX = 16
# Of the kernel's lists of controllers and profiles: snaps alone can be hundreds of these.
KERNEL_LIST_BYTES_MAX = 1 << 20
# cgroup v2 controllers by the names of the limits in linux.resources.
_CONTROLLERS = {"memory": "memory", "cpu": "cpu", "pids": "pids", "hugepageLimits": "hugetlb"}
_CONTROLLERS_HERE = Path("/sys/fs/cgroup/cgroup.controllers")
_USER_NAMESPACES_MAX = Path("/proc/sys/user/max_user_namespaces")
_APPARMOR_PROFILES = Path("/sys/kernel/security/apparmor/profiles")
# A task's label in /proc/PID/attr/current, and a line of the list of profiles: NAME (MODE).
_APPARMOR_LABEL = re.compile(r"(.+) \((\w+)\)")


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """A container that can move, as far as its host can tell. restore: as asked for, or how it can
    be."""

    facts: ContainerFacts
    cautions: tuple[Caution, ...]
    restore: Literal["lazy", "eager"]


def check_source(
    runtime: Runtime,
    name: str,
    shared: Sequence[str],
    *,
    restore: Literal["lazy", "eager"],
    streams: int,
    host: str,
    paths: HostPaths,
    targets: Sequence[str],
    is_copied: bool = False,
) -> SourceCheck:
    """Look at the container and at this host. Blocking. Raises PreflightRefused, MigrateError.

    is_copied: it is to stay, and copies of it to run on the targets.
    """
    rules = policy.load(paths.policy)
    # First, since without descriptors nothing else can be looked at.
    refusals = descriptor_refusals(tasks=1, streams=streams)
    if refusals:
        raise PreflightRefused(refusals, host=host)
    container = runtime.inspect(name)
    refusals = []
    for target in targets:
        refusals += policy_checks.judge_send(rules, name, target)
        if is_copied:
            refusals += policy_checks.judge_clone(rules, name, target=target)
    refusals += [*host_refusals(lazy=restore == "lazy"), *own_space(paths), *runtime.refusals()]
    refusals += judge_container(container, shared, rules.send.devices)
    cautions = host_cautions()
    if restore == "lazy" and has_user_namespace(container.spec):
        restore = "eager"
        cautions.append(
            Caution(
                "eager",
                "CRIU can't open the userfaultfd of a lazy restore in a user namespace, so all"
                " memory is restored before the container runs again",
                "expect a downtime that grows with its memory",
            )
        )
    if not container.rootfs.is_dir():
        refusals.append(
            Refusal(
                "rootfs",
                f"the root file system {container.rootfs} is no directory",
                "give the container a directory as its root",
            )
        )
    if container.status == "running":
        refusals += arriving.refusals(paths, name)
        inside = blockers.find(container.cgroup, container.pid)
        refusals += inside.refusals
        cautions += inside.cautions
    identity = None
    if container.netns is not None:
        identity, found = look_at_network(container, container.netns)
        refusals += found
    state = runs_on(host) if container.status == "running" else ""
    if refusals or identity is None:
        raise PreflightRefused(refusals, host=host, container_state=state)
    found_facts = facts.container_facts(container, identity, runtime)
    refusals = [
        *judge_source_memory(found_facts.shared_bytes, facts.free_memory_bytes()),
        *descriptor_refusals(len(found_facts.tasks), streams),
    ]
    if refusals:
        raise PreflightRefused(refusals, host=host, container_state=state)
    return SourceCheck(found_facts, tuple(cautions), restore)


def own_space(paths: HostPaths) -> list[Refusal]:
    """Whether the project's own directories take what a migration puts there, on either side."""
    return [
        *space_refusals(paths.state, JOURNAL_BYTES_MAX, FILES_MAX),
        *space_refusals(paths.run, RUN_BYTES_MAX, FILES_MAX),
    ]


def judge_source_memory(shared_bytes: int, free_bytes: int) -> list[Refusal]:
    """Whether the source has memory for CRIU's images, which hold what tasks share. Pure."""
    needed = shared_bytes + SOURCE_MEMORY_RESERVE_BYTES
    if free_bytes >= needed:
        return []
    return [
        Refusal(
            "memory",
            f"{free_bytes >> 20} MiB of memory are free, a dump needs {needed >> 20} MiB",
            "free memory here before the container moves",
        )
    ]


def look_at_network(
    container: Container, netns: Path
) -> tuple[NetworkIdentity | None, list[Refusal]]:
    """The container's network, and what of it can't move. Blocking."""
    linux = container.spec.get("linux", {})
    try:
        captured = network.capture(
            netns,
            hostname=container.spec.get("hostname", ""),
            sysctls=linux.get("sysctl") or (),
        )
    except NetworkError as error:
        remedy = error.remedy or "make the namespace that config.json names"
        return None, [Refusal("network", error.message, remedy)]
    bridges = {port.bridge for port in captured.identity.ports if port.bridge is not None}
    found = [refusal for bridge in sorted(bridges) for refusal in bridge_refusals(bridge)]
    return captured.identity, [*captured.refusals, *found]


def check_target(
    request: OpenSession, runtime: Runtime, paths: HostPaths, rules: Policy
) -> list[Refusal]:
    """Look whether this host can take the container, and may. Blocking."""
    # First, since without descriptors nothing else can be looked at.
    refusals = descriptor_refusals(len(request.tasks), request.streams)
    if refusals:
        return refusals
    try:
        return _look_at_target(request, runtime, paths, rules)
    except (OSError, subprocess.SubprocessError) as error:
        text = f"this host can't be looked at: {error}"
        return [Refusal("host", text, "free memory, disk and processes here")]


def _look_at_target(
    request: OpenSession, runtime: Runtime, paths: HostPaths, rules: Policy
) -> list[Refusal]:
    refusals = [
        *host_refusals(lazy=request.restore == "lazy"),
        *own_space(paths),
        *runtime.refusals(),
    ]
    if refusals:
        return refusals
    if request.host == socket.gethostname() and not request.copy_of:
        return [Refusal("same-host", "source and target are the same host", "name another host")]
    refusals += judge_versions(request.versions, facts.host_versions(runtime))
    refusals += judge_cpu(cpu_failure(request.cpuinfo))
    disk_bytes = shutil.disk_usage(existing(paths.containers)).free
    refusals += judge_room(request, facts.free_memory_bytes(), disk_bytes)
    refusals += cordon.refusals(paths, request.migration_id)
    if request.copy_of:
        refusals += judge_addresses([own for _, own in request.copy_of.renamed], own_addresses())
    refusals += _taken(request.container, runtime, paths)
    refusals += _of_configuration(request, runtime, rules)
    bridges = {port.bridge for port in request.network.ports if port.bridge is not None}
    refusals += [refusal for bridge in sorted(bridges) for refusal in bridge_refusals(bridge)]
    if request.copy_of and not refusals:
        refusals += ask_network(request.network)
    return refusals


def ask_network(copy: NetworkIdentity) -> list[Refusal]:
    """Whether somebody has an address of a copy already, where it is to be plugged in. Blocking:
    0.6 s. Raises OSError, NetworkError."""
    return [
        Refusal(
            "address-taken",
            f"{address} is in use in the network that the copy comes to, by {mac}",
            "give a free one",
        )
        for address, mac in address_probe.taken(copy).items()
    ]


def taken_addresses(original: NetworkIdentity, candidates: Sequence[IP]) -> set[IP]:
    """Which of these no copy of a container of this host can have. Blocking: 0.6 s. Raises OSError,
    NetworkError."""
    own = own_addresses()
    return {
        *copy_identity.unusable(original, candidates),
        *(one for one in candidates if str(one) in own),
        *address_probe.taken_beside(original, candidates),
    }


def target_cautions(request: OpenSession) -> list[Caution]:
    """What works, but may not be as the source's operator expects. Blocking."""
    return host_cautions()


def judge_addresses(wanted: Iterable[str], own: Collection[str]) -> list[Refusal]:
    """Whether a copy may have these addresses beside a host that has `own`. Pure."""
    return [
        Refusal("address-taken", f"{address} is an address of this host", "give a free one")
        for address in wanted
        if address in own
    ]


def judge_promised(wanted: CopyOf, others: Iterable[OpenSession]) -> list[Refusal]:
    """Whether a copy may have its addresses beside those that come here now. Pure."""
    promised = {own for one in others if one.copy_of for _, own in one.copy_of.renamed}
    return [
        Refusal("address-taken", f"{address} is to be that of another copy", "give a free one")
        for _, address in wanted.renamed
        if address in promised
    ]


def own_addresses() -> frozenset[str]:
    """Of this host's interfaces."""
    found = psutil.net_if_addrs().values()
    return frozenset(one.address.partition("%")[0] for of_one in found for one in of_one)


def judge_versions(source: Versions, target: Versions) -> list[Refusal]:
    """Whether images of the source's CRIU can be restored here. Pure."""
    refusals = []
    if source.architecture != target.architecture:
        refusals.append(
            Refusal(
                "architecture",
                f"the source is {source.architecture}, this host {target.architecture}",
                "choose a host of the same architecture",
            )
        )
    if version_of(target.criu) < version_of(source.criu):
        refusals.append(
            Refusal(
                "criu-older",
                f"CRIU {target.criu} here is older than {source.criu} on the source",
                "install the same CRIU on both hosts",
            )
        )
    return refusals


def judge_cpu(failure: str) -> list[Refusal]:
    """By what `criu cpuinfo check` says of the source's processor, "" if it is well. Pure."""
    if not failure:
        return []
    return [
        Refusal(
            "cpu",
            f"this processor lacks what the source's has: {failure}",
            "choose a host with the same or a newer processor",
        )
    ]


def judge_room(request: OpenSession, free_bytes: int, disk_bytes: int) -> list[Refusal]:
    """Whether memory and disk suffice. Pure.

    Memory that CRIU itself restores is there twice for a while, in the images and in the tasks;
    what the pager fills is given back as it goes. Copies that come before this one by the same
    transfer have not written their files yet.
    """
    refusals = []
    copy_of = request.copy_of
    before = copy_of.number if copy_of else 0
    memory_bytes = request.memory_bytes
    if copy_of and copy_of.beside and not copy_of.fill:
        # It shares what the first copy brings, and takes for itself what it will write.
        memory_bytes = request.shared_bytes
    twice = memory_bytes if request.restore == "eager" else request.shared_bytes
    needed = memory_bytes + twice + MEMORY_RESERVE_BYTES
    if free_bytes < needed:
        refusals.append(
            Refusal(
                "memory",
                f"{free_bytes >> 20} MiB of memory are free, {needed >> 20} MiB are needed",
                "free memory here, or choose another host",
            )
        )
    rootfs_bytes = (before + 1) * request.rootfs_bytes
    if disk_bytes < rootfs_bytes + DISK_RESERVE_BYTES:
        refusals.append(
            Refusal(
                "disk",
                f"{disk_bytes >> 20} MiB of disk are free, the root file system takes"
                f" {rootfs_bytes >> 20} MiB",
                "free disk space here, or choose another host",
            )
        )
    return refusals


def judge_mounts(
    mounts: Iterable[Mount], allowed: Sequence[str], existing: frozenset[str]
) -> list[Refusal]:
    """Whether this host shows a container from elsewhere what it wants to see. Pure.

    `allowed`: directories that this host's operator shares; `existing`: sources that are there.
    """
    refusals = []
    for mount in mounts:
        if not mount.is_bind:
            continue
        if not is_below(mount.source, allowed):
            refusals.append(
                Refusal(
                    "mount-not-shared",
                    f"this host does not share {mount.source} with containers of other hosts",
                    "if it is the same storage, name it in [receive] bind_mounts in"
                    f" {policy_checks.FILE} there",
                )
            )
        elif mount.source not in existing:
            refusals.append(
                Refusal(
                    "mount-missing",
                    f"{mount.source}, which {mount.destination} shows, is not on this host",
                    "mount the shared storage here too",
                )
            )
    return refusals


def judge_user_namespace(spec: dict[str, Any], most: str) -> list[Refusal]:
    """Whether this host makes user namespaces, of which it may have `most`. Pure."""
    if not has_user_namespace(spec) or most != "0":
        return []
    return [
        Refusal(
            "user-namespace",
            "this host makes no user namespaces (user.max_user_namespaces is 0)",
            "sysctl user.max_user_namespaces=1000 there",
        )
    ]


def judge_resources(spec: dict[str, Any], controllers: Iterable[str]) -> list[Refusal]:
    """Whether the limits of the container's cgroup can be set here. Pure."""
    resources = spec.get("linux", {}).get("resources") or {}
    here = set(controllers)
    return [
        Refusal(
            "cgroup-controller",
            f"the container has limits of {name}, and this host has no {controller} controller",
            f"enable it (cgroup.subtree_control), or remove linux.resources.{name}",
        )
        for name, controller in _CONTROLLERS.items()
        if resources.get(name) and controller not in here
    ]


def judge_profiles(profile: str, labels: Iterable[str], loaded: str) -> list[Refusal]:
    """Whether what holds the container is here: the AppArmor profile of its configuration ("" for
    none), and those that its tasks run in, in the same modes. `loaded`: the kernel's list. Pure.

    Labels of other modules are compared when the copy has them (core/confinement.py), and so are
    stacks of profiles, and those of a namespace of AppArmor's own.
    """
    modes = dict(_profiles(loaded.splitlines()))
    wanted = dict.fromkeys([profile] if profile not in ("", "unconfined") else [], "")
    wanted |= _profiles(labels)
    refusals = []
    for name, mode in wanted.items():
        here = modes.get(name)
        if here is None:
            what = f"the container's AppArmor profile {name} is not loaded on this host"
            remedy = "load the same profile here (apparmor_parser -r)"
        elif mode not in ("", here):
            what = f"the container's AppArmor profile {name} is in mode {mode}, here in mode {here}"
            remedy = "load it here in the same mode (apparmor_parser -r; -C for complain)"
        else:
            continue
        refusals.append(Refusal("apparmor", what, remedy))
    return refusals


def _profiles(lines: Iterable[str]) -> dict[str, str]:
    """Name -> mode, of single profiles."""
    found = (match for line in lines if (match := _APPARMOR_LABEL.fullmatch(line)) is not None)
    return {one[1]: one[2] for one in found if not one[1].startswith(":") and "//&" not in one[1]}


def _of_configuration(request: OpenSession, runtime: Runtime, rules: Policy) -> list[Refusal]:
    try:
        spec = json.loads(request.config_json)
        mounts = mounts_of(spec)
        refusals = judge_spec(spec, mounts)
        refusals += policy_checks.judge_receive(rules, request, spec, mounts)
        refusals += judge_resources(spec, _read(_CONTROLLERS_HERE).split())
        refusals += judge_user_namespace(spec, _read(_USER_NAMESPACES_MAX).strip())
        refusals += _of_cgroup(spec, request.container, runtime)
        profile = str(spec.get("process", {}).get("apparmorProfile") or "")
        refusals += judge_profiles(profile, request.labels, _read(_APPARMOR_PROFILES))
        shared = rules.receive.bind_mounts
        binds = (one.source for one in mounts if one.is_bind)
        here = frozenset(source for source in binds if _is_here(source, shared))
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError, OSError) as error:
        text = f"the container's config.json can't be read: {error}"
        return [Refusal("config", text, "check it on the source")]
    return [*refusals, *judge_mounts(mounts, shared, here)]


def _is_here(source: str, shared: Iterable[str]) -> bool:
    """Whether it is there and stays below what is shared: a container that may write there can
    have made a link that leads elsewhere."""
    real = Path(source).resolve()
    return real.exists() and is_below(str(real), [str(Path(one).resolve()) for one in shared])


def _of_cgroup(spec: dict[str, Any], name: str, runtime: Runtime) -> list[Refusal]:
    path = runtime.cgroup_for(spec, name)
    if not path.exists():
        return []
    # Also of what a peer may want: its container would share the fate of whoever is in there.
    return [
        Refusal(
            "cgroup-taken", f"the cgroup {path} exists here already", "remove it if it is empty"
        )
    ]


def _taken(name: str, runtime: Runtime, paths: HostPaths) -> list[Refusal]:
    """Whether something of that name is here already."""
    refusals = []
    if runtime.exists(name):
        refusals.append(
            Refusal(
                "name-taken",
                f"{runtime.name} has a container {name} here already",
                f"remove it ({runtime.name} delete {name}) or rename it",
            )
        )
    refusals += [
        Refusal("path-taken", f"{path} exists here already", f"remove {path} if it is unused")
        for path in (path_of(name), paths.containers / name)
        if path.exists()
    ]
    return refusals


def _read(path: Path) -> str:
    try:
        with path.open(errors="replace") as file:
            return file.read(KERNEL_LIST_BYTES_MAX)
    except OSError:
        return ""
