"""What a container runtime is to a migration: a driver that inspects, checkpoints and restores.

A driver returns command lines and facts. It does not run CRIU, decide, or know of sessions: who
starts a command, with which environment (CRIU's configuration file, the gate in PATH) and when its
gate opens, is the coordinator's or the agent's matter.

Every call blocks (a runtime's start takes 15-40 ms): call drivers from a worker thread.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from migrate.errors import EXIT_REFUSED, MigrateError

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.refusals import Refusal

Status = Literal["created", "running", "paused", "stopped"]
Descriptors = tuple[str, str, str]

# A name becomes an argument, a directory, a file name and part of an interface's name. The first
# character can't be a dash (an option) or a dot (a hidden or parent directory).
NAME_PATTERN = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}")

# Paths in a command line come from bundles and configuration; the kernel ends a path here.
PATH_CHARS_MAX = 4095


class RuntimeDriverError(MigrateError):
    """A container runtime failed, or said something that its driver does not understand."""


class ContainerNotFoundError(RuntimeDriverError):
    """The runtime has no container of that name."""

    exit_code = EXIT_REFUSED


class AmbiguousContainerError(RuntimeDriverError):
    """Several runtimes have a container of that name."""

    exit_code = EXIT_REFUSED


class InvalidNameError(RuntimeDriverError):
    """The name can't be a container's: it reaches no command line and no path."""

    exit_code = EXIT_REFUSED


@dataclass(frozen=True, slots=True)
class Mount:
    """One mount of the container's configuration (`mounts` of OCI's config.json)."""

    destination: str
    kind: str
    source: str
    options: tuple[str, ...]

    @property
    def is_bind(self) -> bool:
        """Whether it shows a path of the host (runc: `isBind`, by the type or an option)."""
        return self.kind == "bind" or "bind" in self.options or "rbind" in self.options


@dataclass(frozen=True, slots=True)
class Container:
    """A container as its runtime knows it now.

    `pid` is its init in the host's pid namespace, 0 when it is stopped. `cgroup` is the absolute
    cgroup v2 directory. `netns` is the network namespace by the path that config.json names, or by
    the init where a user namespace owns it; None when the runtime made one otherwise, or the
    container uses the host's. `descriptors` are what the runtime found behind stdin, stdout and
    stderr when it started the container, as it will write them to `descriptors.json` beside the
    images.
    """

    name: str
    runtime: str
    status: Status
    pid: int
    bundle: Path
    rootfs: Path
    spec: dict[str, Any]
    cgroup: Path
    netns: Path | None
    terminal: bool
    mounts: tuple[Mount, ...]
    descriptors: Descriptors


class Runtime(Protocol):
    """A driver. Errors: RuntimeDriverError and its subclasses."""

    @property
    def name(self) -> str:
        """The runtime's name, which source and target must agree on ("runc")."""

    @property
    def sets_limits_late(self) -> bool:
        """Whether a restored container has the limits of its cgroup only when CRIU has ended."""

    @property
    def renames_cgroups(self) -> bool:
        """Whether its images have what CRIU needs to restore into another cgroup by its option."""

    def version(self) -> str:
        """The runtime's version as it says it ("1.1.15+ds1")."""

    def refusals(self) -> list[Refusal]:
        """Why this runtime can neither checkpoint nor restore on this host."""

    def inspect(self, name: str) -> Container:
        """The container `name`. Raises ContainerNotFoundError."""

    def names(self) -> list[str]:
        """The containers that it knows, in whatever state, by name."""

    def exists(self, name: str) -> bool:
        """Whether the name is taken, be it by a restore that never ended."""

    def state(self, name: str) -> Status | None:
        """The container's status, None when the runtime has no such container."""

    def cgroup_for(self, spec: dict[str, Any], name: str) -> Path:
        """Where a container will be that this process has made from `spec` (config.json)."""

    def restored_cgroup(self, bundle: Path, name: str) -> Path | None:
        """`cgroup_for` a bundle on this host; None without one."""

    def checkpoint_command(
        self,
        container: Container,
        image_dir: Path,
        work_dir: Path,
        *,
        lazy: bool,
        parent: str | None = None,
    ) -> list[str]:
        """The command that dumps `container` and ends it.

        With `lazy` no memory is written, if CRIU's configuration file says so as well
        (`lazy-pages`), with a socket of a page server. With `parent`, a path relative to
        `image_dir`, only what was written since those images.
        """

    def pre_dump_command(
        self, container: Container, image_dir: Path, work_dir: Path, *, parent: str | None
    ) -> list[str]:
        """The command that writes the memory of `container`, which runs on, and has the kernel note
        what is written from then on. `parent` as for `checkpoint_command`; without one, all."""

    def restore_command(
        self, name: str, bundle: Path, image_dir: Path, work_dir: Path, *, lazy: bool
    ) -> list[str]:
        """The command that restores a container and returns while it runs.

        Its own stdin, stdout and stderr take the place of every descriptor that is a pipe. With
        `lazy` CRIU's configuration file has to say so as well.
        """

    def kill(self, name: str) -> None:
        """Kill every task of the container; one that is gone is fine."""

    def delete(self, name: str, *, bundle: Path | None = None) -> None:
        """Kill and forget the container and what an unfinished restore left of it. Idempotent.

        `bundle`: what it was restored from, for a restore that did not get as far as to say where
        its tasks are. Never touches the container's files. No restore of that name may be under
        way.
        """


def validate_name(name: str) -> str:
    """`name`, if it may be a container's name; raises InvalidNameError."""
    if NAME_PATTERN.fullmatch(name) is None:
        raise InvalidNameError(
            f"{name[:80]!r} is not a container name: it may have 64 letters, digits, '_', '.' and"
            " '-', and begins with a letter or digit"
        )
    return name


def validate_path(path: Path) -> str:
    """`path` as an argument, if it is absolute and clean; raises RuntimeDriverError."""
    text = str(path)
    is_clean = path.is_absolute() and ".." not in path.parts and "\0" not in text
    if not is_clean or len(text) > PATH_CHARS_MAX:
        raise RuntimeDriverError(f"{text[:80]!r} is not an absolute path without '..'")
    return text
