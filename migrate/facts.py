"""Facts that a migration starts from: what the container is and has, and what this host runs.

Only looks, decides nothing: what follows from the facts is `preflight.py`'s matter.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import psutil

from criu_glue.errors import TaskGoneError
from criu_glue.mappings import cgroup_pids, vpid
from migrate import cgroup, confinement
from migrate.copy_identity import config_of
from migrate.core import messages
from migrate.core.prediction import Workload
from migrate.errors import MigrateError
from migrate.memory_facts import memory_facts
from migrate.network import NetworkHandle

if TYPE_CHECKING:
    from migrate.copy_identity import CopyIdentity
    from migrate.network_identity import NetworkIdentity
    from migrate.runtimes.base import Container, Runtime

# `criu --version` and `criu cpuinfo` take milliseconds.
CRIU_DEADLINE_S = 20.0
_INACTIVE_FILE = re.compile(r"^inactive_file (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ContainerFacts:
    """A container that is to move. `shared_bytes` is part of `memory_bytes`, counted once; private
    memory that several tasks have is counted for each. unwatched_bytes of it, mappings and
    threads: see `memory_facts.py`; of a checkpoint they are not known."""

    container: Container
    network: NetworkIdentity
    tasks: tuple[int, ...]
    memory_bytes: int
    shared_bytes: int
    rootfs_bytes: int
    versions: messages.Versions
    cpuinfo: bytes
    labels: tuple[str, ...]
    unwatched_bytes: int = 0
    mappings: int = 0
    threads: int = 0

    @property
    def network_handle(self) -> NetworkHandle:
        """What of the container's network is on this host."""
        return NetworkHandle(str(self.container.netns), self.network.ports)

    def workload(self, *, lazy: bool) -> Workload:
        """What a prediction takes from them."""
        return Workload(
            memory_bytes=self.memory_bytes,
            shared_bytes=self.shared_bytes,
            unwatched_bytes=self.unwatched_bytes,
            tasks=len(self.tasks),
            mappings=self.mappings,
            threads=self.threads,
            lazy=lazy,
        )

    def open_session(
        self,
        *,
        migration_id: str,
        attempt: int,
        host: str,
        streams: int,
        restore: Literal["lazy", "eager"],
        dry_run: bool,
        patience_s: float = 0.0,
        copy: CopyIdentity | None = None,
    ) -> messages.OpenSession:
        """The question to the target, of the container or of a copy."""
        container = self.container
        config_json = (container.bundle / "config.json").read_text()
        if copy is not None:
            config_json = config_of(config_json, copy.name)
        return messages.OpenSession(
            migration_id=migration_id,
            container=copy.name if copy else container.name,
            runtime=container.runtime,
            attempt=attempt,
            host=host,
            config_json=config_json,
            tasks=self.tasks,
            memory_bytes=self.memory_bytes,
            shared_bytes=self.shared_bytes,
            rootfs_bytes=self.rootfs_bytes,
            streams=streams,
            restore=restore,
            network=copy.network if copy else self.network,
            versions=self.versions,
            cpuinfo=self.cpuinfo,
            dry_run=dry_run,
            patience_s=patience_s,
            labels=self.labels,
            copy_of=copy.of(container.name) if copy else msgspec.UNSET,
        )


def container_facts(
    container: Container, identity: NetworkIdentity, runtime: Runtime
) -> ContainerFacts:
    """Look at a running container. Blocking, some 50 ms and 30 more for each GiB; raises
    MigrateError."""
    pids, tasks = cgroup_pids(container.cgroup), []
    for pid in pids:
        with contextlib.suppress(TaskGoneError):
            tasks.append(vpid(pid))
    if not tasks:
        raise MigrateError(f"{container.name} has no tasks")
    memory = memory_facts(pids)
    return ContainerFacts(
        container=container,
        network=identity,
        tasks=tuple(sorted(tasks)),
        memory_bytes=memory.private_bytes + memory.shared_bytes,
        shared_bytes=memory.shared_bytes,
        rootfs_bytes=tree_bytes(container.rootfs),
        versions=host_versions(runtime),
        cpuinfo=cpuinfo_dump(),
        labels=confinement.labels(pids)[: messages.MAX_LABELS],
        unwatched_bytes=memory.unwatched_bytes,
        mappings=memory.mappings,
        threads=memory.threads,
    )


def host_versions(runtime: Runtime) -> messages.Versions:
    """What this host runs. Blocking; raises MigrateError without CRIU."""
    words = _criu("--version").split()
    return messages.Versions(
        kernel=platform.release(),
        criu=words[1] if len(words) > 1 else "unknown",
        runtime=runtime.version(),
        architecture=platform.machine(),
    )


def free_memory_bytes() -> int:
    """Memory that a new container could take here: of the host, and within the limits of this
    process's cgroup, which the page store is counted in."""
    own = cgroup.own_name().lstrip("/")
    return int(min(psutil.virtual_memory().available, left_bytes(cgroup.MOUNT, own)))


def left_bytes(cgroups: Path, own: str) -> float:
    """What memory.max of the cgroup `own` and of those above it leave; infinite without one.

    `cgroups`: where cgroup2 is mounted.
    """
    group = cgroups / own
    return min(_left_bytes(one) for one in (group, *group.parents))


def _left_bytes(group: Path) -> float:
    """What a cgroup may still take; what it has of files' pages can be taken from it again."""
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit == "max":
            return math.inf
        current = int((group / "memory.current").read_text())
        cached = _INACTIVE_FILE.search((group / "memory.stat").read_text())
    except FileNotFoundError:  # the root, or no memory controller
        return math.inf
    return max(int(limit) - current + (int(cached[1]) if cached else 0), 0)


def tree_bytes(top: Path) -> int:
    """Disk space of a tree, as `du -x` counts it; what vanishes meanwhile is left out."""
    total, seen, todo = 0, set[tuple[int, int]](), [top]
    device = top.stat().st_dev
    while todo:
        try:
            entries = list(os.scandir(todo.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if status.st_dev != device:
                continue
            if entry.is_dir(follow_symlinks=False):
                todo.append(Path(entry.path))
            if status.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                key = (status.st_dev, status.st_ino)
                if key in seen:
                    continue
                seen.add(key)
            total += status.st_blocks * 512
    return total


def cpuinfo_dump() -> bytes:
    """The image that `criu cpuinfo dump` writes of this host's processor."""
    with tempfile.TemporaryDirectory(prefix="migrate-") as directory:
        _criu("cpuinfo", "dump", "-D", directory)
        return (Path(directory) / "cpuinfo.img").read_bytes()


def _criu(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["criu", *arguments],
            capture_output=True,
            text=True,
            timeout=CRIU_DEADLINE_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MigrateError(
            f"criu {arguments[0]} failed: {error}", remedy="install CRIU 4.2 or newer"
        ) from error
    return done.stdout
