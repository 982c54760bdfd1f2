"""Preflight: whether a migration can succeed, looked at before anything is touched, on both sides.

    check_source   the container and this host          -> facts, cautions, or PreflightRefused
    check_target   this host for a container to come    -> refusals (they travel back to the source)

All blockers are told at once, each with what to do about it. The deciders (`judge_*`) are pure;
what they judge is read by the functions that call them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from migrate import blockers, facts, network
from migrate.errors import PreflightRefused, runs_on
from migrate.netns import path_of
from migrate.refusals import Caution, Refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migrate.config import HostPaths
    from migrate.core.messages import OpenSession, Versions
    from migrate.facts import ContainerFacts
    from migrate.runtimes.base import Container, Runtime

# 4.2 is the first CRIU that dumps TCP sockets on kernels since 6.16 and resumes lazy dumps rightly.
CRIU_VERSION_MIN = (4, 2)
CRIU_DEADLINE_S = 20.0
# What the target keeps free for itself, besides the container.
MEMORY_RESERVE_BYTES = 128 << 20
DISK_RESERVE_BYTES = 64 << 20
# Kernel file systems that every container mounts; nothing of them has to move.
_KERNEL_MOUNTS = frozenset(
    {"proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "securityfs"}
)
_THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@dataclass(frozen=True, slots=True)
class SourceCheck:
    """A container that can move, as far as its host can tell."""

    facts: ContainerFacts
    cautions: tuple[Caution, ...]


def check_source(
    runtime: Runtime, name: str, shared: Sequence[str], *, lazy: bool, host: str
) -> SourceCheck:
    """Look at the container and at this host. Blocking. Raises PreflightRefused, MigrateError."""
    container = runtime.inspect(name)
    refusals = [
        *host_refusals(lazy=lazy),
        *judge_container(container),
        *judge_mounts(container, shared),
    ]
    cautions = host_cautions()
    if container.status == "running":
        inside = blockers.find(container.cgroup, container.pid)
        refusals += inside.refusals
        cautions += inside.cautions
    if container.netns is not None:
        spec = container.spec
        captured = network.capture(
            container.netns,
            hostname=spec.get("hostname", ""),
            sysctls=spec.get("linux", {}).get("sysctl", {}),
        )
        refusals += captured.refusals
    if refusals or container.netns is None:
        state = runs_on(host) if container.status == "running" else ""
        raise PreflightRefused(refusals, host=host, container_state=state)
    found = facts.container_facts(container, captured.identity, runtime)
    return SourceCheck(found, tuple(cautions))


def judge_container(container: Container) -> list[Refusal]:
    """What of the container's configuration and state can't move. Pure."""
    found = []
    if container.status != "running":
        found.append(
            Refusal(
                "not-running",
                f"{container.name} is {container.status}",
                "only a running container can move with its memory",
            )
        )
    if container.terminal:
        found.append(
            Refusal(
                "terminal",
                f"{container.name} has a terminal",
                "start it detached, with `terminal: false` in config.json",
            )
        )
    if container.netns is None:
        found.append(
            Refusal(
                "network-namespace",
                f"{container.name} has no network namespace that is given by its path",
                "make one (ip netns add) and name its path in config.json",
            )
        )
    for number, descriptor in enumerate(container.descriptors):
        if descriptor.startswith("/") and descriptor != "/dev/null":
            found.append(
                Refusal(
                    "stdio",
                    f"stream {number} of {container.name} is {descriptor}, a file of this host",
                    "start it with its streams in pipes or /dev/null",
                )
            )
    if any(container.spec.get("hooks", {}).values()):
        found.append(
            Refusal(
                "hooks",
                f"{container.name} has hooks, which are programs of this host",
                "remove them from config.json",
            )
        )
    return found


def judge_mounts(container: Container, shared: Sequence[str]) -> list[Refusal]:
    """Mounts that show files of this host: they don't travel. Pure."""
    return [
        Refusal(
            "bind-mount",
            f"{mount.destination} is {mount.source} of this host, and does not travel",
            f"--shared {mount.source} if it is the same storage on both hosts",
        )
        for mount in container.mounts
        if mount.is_bind and mount.kind not in _KERNEL_MOUNTS and mount.source not in shared
    ]


def check_target(request: OpenSession, runtime: Runtime, paths: HostPaths) -> list[Refusal]:
    """Look whether this host can take the container. Blocking."""
    refusals = host_refusals(lazy=request.restore == "lazy")
    if refusals:
        return refusals
    here = facts.host_versions(runtime)
    refusals += judge_versions(request.versions, here)
    refusals += _cpu_refusals(request.cpuinfo)
    disk = shutil.disk_usage(_existing(paths.containers)).free
    refusals += judge_room(request, facts.free_memory_bytes(), disk)
    refusals += _taken(request, runtime, paths)
    refusals += judge_bridges(request, _interfaces())
    return refusals


def judge_versions(source: Versions, target: Versions) -> list[Refusal]:
    """Whether images of the source's CRIU can be restored here. Pure."""
    found = []
    if source.architecture != target.architecture:
        found.append(
            Refusal(
                "architecture",
                f"the source is {source.architecture}, this host {target.architecture}",
                "choose a host of the same architecture",
            )
        )
    if version_of(target.criu) < version_of(source.criu):
        found.append(
            Refusal(
                "criu-older",
                f"CRIU {target.criu} here is older than {source.criu} on the source",
                "install the same CRIU on both hosts",
            )
        )
    return found


def judge_room(request: OpenSession, free_bytes: int, disk_bytes: int) -> list[Refusal]:
    """Whether memory and disk suffice. Pure."""
    found = []
    needed = request.memory_bytes + request.shared_bytes + MEMORY_RESERVE_BYTES
    if free_bytes < needed:
        found.append(
            Refusal(
                "memory",
                f"{free_bytes >> 20} MiB of memory are free, {needed >> 20} MiB are needed",
                "free memory here, or choose another host",
            )
        )
    if disk_bytes < request.rootfs_bytes + DISK_RESERVE_BYTES:
        found.append(
            Refusal(
                "disk",
                f"{disk_bytes >> 20} MiB of disk are free, the root file system takes"
                f" {request.rootfs_bytes >> 20} MiB",
                "free disk space here, or choose another host",
            )
        )
    return found


def judge_bridges(request: OpenSession, interfaces: frozenset[str]) -> list[Refusal]:
    """Whether the bridges that the container's ports were in exist here too. Pure."""
    return [
        Refusal(
            "bridge",
            f"there is no bridge {port.bridge} here for the container's {port.interface}",
            f"make it: ip link add {port.bridge} type bridge",
        )
        for port in request.network.ports
        if port.bridge not in interfaces
    ]


def version_of(text: str) -> tuple[int, ...]:
    """The numbers that a version begins with: "4.2.1-rc" is (4, 2, 1)."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def host_refusals(*, lazy: bool) -> list[Refusal]:
    """Whether this host can dump and restore at all: programs, CRIU's version and its own check."""
    found = [
        Refusal("program", f"{program} is not installed", f"install {program}")
        for program in ("criu", "rsync", "ip")
        if shutil.which(
            program, path="/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin"
        )
        is None
    ]
    if found:
        return found
    if why := _criu_check():
        return [Refusal("criu-check", why, "`criu check` says what this kernel lacks")]
    if lazy and _criu_fails("check", "--feature", "uffd-noncoop"):
        found.append(
            Refusal(
                "userfaultfd",
                "this kernel has no userfaultfd with events, which a lazy restore needs",
                "--restore eager",
            )
        )
    return found


def host_cautions() -> list[Caution]:
    """What makes migrations from this host slower than they need be."""
    try:
        is_always = "[always]" in _THP.read_text()
    except OSError:
        return []
    if not is_always:
        return []
    return [
        Caution(
            "huge-pages",
            "transparent huge pages are always on, so pages are tracked by 2 MiB at first",
            f"echo madvise > {_THP}",
        )
    ]


@cache
def _criu_check() -> str:
    """Why CRIU does not work here, empty if it does; looked at once in the life of a process."""
    try:
        done = subprocess.run(
            ["criu", "--version"],
            capture_output=True,
            text=True,
            timeout=CRIU_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"criu can't be run: {error}"
    words = done.stdout.split()
    version = words[1] if len(words) > 1 else "unknown"
    if version_of(version) < CRIU_VERSION_MIN:
        wanted = ".".join(str(part) for part in CRIU_VERSION_MIN)
        return f"CRIU is {version}, at least {wanted} is needed"
    return _criu_fails("check")


def _criu_fails(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["criu", *arguments],
            capture_output=True,
            text=True,
            timeout=CRIU_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"criu {' '.join(arguments)}: {error}"
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "Error" in line and "rlimit" not in line]
    return lines[0] if lines else f"criu {' '.join(arguments)} failed"


def _cpu_refusals(cpuinfo: bytes) -> list[Refusal]:
    """Whether this processor has what the source's has: CRIU compares its own images."""
    with tempfile.TemporaryDirectory(prefix="migrate-") as directory:
        (Path(directory) / "cpuinfo.img").write_bytes(cpuinfo)
        why = _criu_fails("cpuinfo", "check", "-D", directory)
    if not why:
        return []
    return [
        Refusal(
            "cpu",
            f"this processor lacks what the source's has: {why}",
            "choose a host with the same or a newer processor",
        )
    ]


def _taken(request: OpenSession, runtime: Runtime, paths: HostPaths) -> list[Refusal]:
    """Whether something of that name is here already."""
    name = request.container
    found = []
    if runtime.exists(name):
        found.append(
            Refusal(
                "name-taken",
                f"{runtime.name} has a container {name} here already",
                f"remove it ({runtime.name} delete {name}) or rename it",
            )
        )
    paths_wanted = (path_of(name), paths.containers / name)
    found += [
        Refusal("path-taken", f"{path} exists here already", f"remove {path} if it is unused")
        for path in paths_wanted
        if path.exists()
    ]
    return found


def _interfaces() -> frozenset[str]:
    return frozenset(path.name for path in Path("/sys/class/net").iterdir())


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
