"""What runtimes have in common that are programs with OCI's commands: runc and crun.

    PROGRAM --root ROOT state | delete | checkpoint | restore NAME
    ROOT/NAME/           the runtime's directory of a container; there is one as soon as a restore
                         has taken the name
    ROOT/NAME/STATE      a file, when the runtime knows the container; its name and content differ
    criu-root            while a restore is under way, the root file system is bind-mounted there;
                         a runtime that is killed leaves it, and whoever then deletes what is around
                         it deletes the root file system's files *through* it

Both give a restored container their own standard streams where it had a pipe, by the file
`descriptors.json` beside CRIU's images.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast, get_args

from migrate.cgroup import MOUNT
from migrate.mounts import unmount
from migrate.refusals import Refusal
from migrate.runtimes.base import (
    Container,
    ContainerNotFoundError,
    Descriptors,
    RuntimeDriverError,
    Status,
    validate_name,
    validate_path,
)
from migrate.runtimes.oci import mounts_of, network_namespace, part
from migrate.runtimes.tasks import kill_all, remove_cgroup

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTORS_NAME = "descriptors.json"
LOG_NAME = "runtime.log"
RESTORE_MOUNT = "criu-root"

# A runtime answers in tens of milliseconds, `delete --force` waits up to 10 s for the init to be
# gone.
COMMAND_DEADLINE_S = 20.0
# A config.json with thousands of mounts is below this; runc's state.json repeats all of it.
JSON_BYTES_MAX = 8 << 20
STDERR_CHARS_MAX = 2000


class OciCommand(ABC):
    """A runtime by its command line; `root` is its state directory (`--root`)."""

    name: ClassVar[str]
    state_name: ClassVar[str]
    """The file in a container's directory that is there once the runtime knows the container."""
    not_found: ClassVar[str]
    """What `state` says of a container that vanishes while it is asked for."""
    sets_limits_late: ClassVar[bool]
    renames_cgroups: ClassVar[bool]

    def __init__(self, root: Path, program: str) -> None:
        validate_path(root)
        self._root = root
        self._program = program

    # ---- what differs ----

    @abstractmethod
    def cgroup_for(self, spec: dict[str, Any], name: str) -> Path:
        """Where a container will be that this process has made from `spec`."""

    @abstractmethod
    def _cgroup_in(self, kept: dict[str, Any]) -> Path:
        """Where a container is, by the state file."""

    @abstractmethod
    def _descriptors_in(self, kept: dict[str, Any]) -> Descriptors:
        """What the container's streams were connected to, by the state file."""

    @abstractmethod
    def _restore_mount(self, name: str, bundle: Path | None) -> Path | None:
        """The directory that an unfinished restore has mounted the root file system on."""

    @abstractmethod
    def _checkpoint_options(self, *, lazy: bool) -> Sequence[str]:
        """What else `checkpoint` has to be told."""

    @abstractmethod
    def _restore_options(self, *, lazy: bool) -> Sequence[str]:
        """What else `restore` has to be told."""

    # ---- looking ----

    def version(self) -> str:
        """The word after "NAME version"; raises RuntimeDriverError when there is none."""
        words = self._run(["--version"]).split()
        if words[:2] != [self.name, "version"] or len(words) < 3:
            raise RuntimeDriverError(f"{self._program} --version says {' '.join(words[:6])!r}")
        return words[2]

    def refusals(self) -> list[Refusal]:
        """Why this runtime can neither checkpoint nor restore on this host."""
        if shutil.which(self._program) is None:
            text = f"the runtime {self.name} can't be found on this host"
            return [Refusal("runtime", text, f"install {self.name} here")]
        return []

    def inspect(self, name: str) -> Container:
        """The container by `state`, its bundle's config.json and the runtime's state file, which
        alone has cgroup and descriptors."""
        validate_name(name)
        state = self._state(name)
        if state is None:
            raise ContainerNotFoundError(
                f"{self.name} has no container {name} in {self._root}",
                remedy=f"{self.name} --root {self._root} list shows those that it has",
            )
        bundle = Path(self._text(state, "bundle"))
        spec = _read_json(bundle / "config.json")
        kept = self._kept(name)
        pid = int(state.get("pid") or 0)
        return Container(
            name=name,
            runtime=self.name,
            status=self._status(state),
            pid=pid,
            bundle=bundle,
            # crun says it as config.json does, mostly relative to the bundle.
            rootfs=bundle / self._text(state, "rootfs"),
            spec=spec,
            cgroup=self._cgroup_in(kept),
            netns=network_namespace(spec, pid),
            terminal=part(spec, "process").get("terminal") is True,
            mounts=mounts_of(spec),
            descriptors=self._descriptors_in(kept),
        )

    def names(self) -> list[str]:
        """The directories that have a state file."""
        return sorted(one.parent.name for one in self._root.glob(f"*/{self.state_name}"))

    def exists(self, name: str) -> bool:
        """Whether the runtime's directory of that name exists: no other container can take it."""
        return (self._root / validate_name(name)).exists()

    def state(self, name: str) -> Status | None:
        """The runtime's word for the container's status, None when it has none of that name."""
        found = self._state(validate_name(name))
        return None if found is None else self._status(found)

    def restored_cgroup(self, bundle: Path, name: str) -> Path | None:
        """`cgroup_for` a bundle on this host; None without one."""
        path = bundle / "config.json"
        return self.cgroup_for(_read_json(path), name) if path.exists() else None

    # ---- moving ----

    def checkpoint_command(
        self,
        container: Container,
        image_dir: Path,
        work_dir: Path,
        *,
        lazy: bool,
        parent: str | None = None,
    ) -> list[str]:
        """`checkpoint`. How cgroups and the network are handled, and that it is lazy, goes by
        CRIU's own configuration file; options are for what the runtime would say otherwise."""
        command = [*self._logged(work_dir), "checkpoint", "--tcp-established", "--file-locks"]
        command += [*self._checkpoint_options(lazy=lazy), *_parent(parent)]
        return [*command, *_directories(image_dir, work_dir), validate_name(container.name)]

    def pre_dump_command(
        self, container: Container, image_dir: Path, work_dir: Path, *, parent: str | None
    ) -> list[str]:
        """`checkpoint --pre-dump`."""
        command = [*self._logged(work_dir), "checkpoint", "--pre-dump"]
        command += [*self._checkpoint_options(lazy=False), *_parent(parent)]
        return [*command, *_directories(image_dir, work_dir), validate_name(container.name)]

    def restore_command(
        self, name: str, bundle: Path, image_dir: Path, work_dir: Path, *, lazy: bool
    ) -> list[str]:
        """`restore --detach`. It reads `descriptors.json` before it starts CRIU.

        What the runtime has to say goes to its log: its own streams may be recorded as the
        container's, so a file there would make it look as if it had a file of the host open.
        """
        command = [*self._logged(work_dir), "restore", "--detach"]
        command += ["--tcp-established", "--file-locks", *self._restore_options(lazy=lazy)]
        command += ["--bundle", validate_path(bundle), *_directories(image_dir, work_dir)]
        return [*command, validate_name(name)]

    # ---- ending ----

    def kill(self, name: str) -> None:
        """Kill all tasks by the cgroup, frozen ones too; a container that is gone is fine."""
        if self._state(validate_name(name)) is None:
            return
        kill_all(self._cgroup_in(self._kept(name)))

    def delete(self, name: str, *, bundle: Path | None = None) -> None:
        """`delete --force`, after the mount of an unfinished restore was detached.

        Runtimes leave the cgroup behind when a task is not quite dead yet, so the tasks go first.
        """
        directory = self._root / validate_name(name)
        cgroup = None
        if (directory / self.state_name).exists():
            cgroup = self._cgroup_in(self._kept(name))
        elif bundle is not None:
            cgroup = self.restored_cgroup(bundle, name)
        if cgroup is not None:
            kill_all(cgroup)
        mount = self._restore_mount(name, bundle)
        if mount is not None and mount.exists():
            _give_up(mount)
        if directory.exists():
            self._run(["delete", "--force", name])
        if cgroup is not None:
            remove_cgroup(cgroup)
        if directory.exists():
            raise RuntimeDriverError(f"{self.name} delete {name} has left {directory}")

    # ---- asking the program ----

    def _kept(self, name: str) -> dict[str, Any]:
        return _read_json(self._root / name / self.state_name)

    def _state(self, name: str) -> dict[str, Any] | None:
        if not (self._root / name / self.state_name).exists():
            return None
        try:
            return json_object(self._run(["state", name]), f"{self.name} state {name}")
        except ContainerNotFoundError:
            return None

    def _status(self, state: dict[str, Any]) -> Status:
        word = self._text(state, "status")
        if word not in get_args(Status):
            raise RuntimeDriverError(f"{self.name} calls the container's status {word!r}")
        return cast("Status", word)

    def _text(self, parent: dict[str, Any], key: str) -> str:
        value = parent.get(key)
        if not isinstance(value, str) or not value:
            raise RuntimeDriverError(f"{self.name}'s answer has no {key}")
        return value

    def _logged(self, work_dir: Path) -> list[str]:
        log = validate_path(work_dir / LOG_NAME)
        return [*self._base(), "--log", log, "--log-format", "json"]

    def _base(self) -> list[str]:
        return [self._program, "--root", str(self._root)]

    def _run(self, arguments: Sequence[str]) -> str:
        command = [*self._base(), *arguments]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMMAND_DEADLINE_S,
                check=False,
            )
        except FileNotFoundError as error:
            raise RuntimeDriverError(
                f"{self._program} is not installed on this host", remedy=f"install {self.name}"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeDriverError(
                f"{' '.join(command)} has not ended in {COMMAND_DEADLINE_S:g} s"
            ) from error
        if done.returncode != 0:
            said = done.stderr.strip()[-STDERR_CHARS_MAX:]
            kind = ContainerNotFoundError if self.not_found in said else RuntimeDriverError
            raise kind(f"{' '.join(command)} failed: {said or done.returncode}")
        return done.stdout


def descriptors_json(descriptors: Descriptors) -> bytes:
    """The bytes of `descriptors.json`: a JSON array of three strings, as Go marshals it."""
    return json.dumps(list(descriptors), separators=(",", ":"), ensure_ascii=False).encode()


def three_descriptors(found: object, where: str) -> Descriptors:
    """What a runtime has kept of them, if there are three; raises RuntimeDriverError."""
    if not isinstance(found, list) or len(found) != 3:
        raise RuntimeDriverError(f"{where} has no three descriptors: {found!r}")
    return (str(found[0]), str(found[1]), str(found[2]))


def json_object(data: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object; raises RuntimeDriverError, naming `what`."""
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise RuntimeDriverError(f"{what} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RuntimeDriverError(f"{what} is not a JSON object")
    return parsed


def below_mount(path: str) -> Path:
    """The directory of a cgroup by its path below the mount of cgroup v2."""
    return MOUNT / path.lstrip("/")


def _parent(path: str | None) -> list[str]:
    """Relative to the images: runc refuses any other (`checkpoint.go: prepareImagePaths`)."""
    return [] if path is None else ["--parent-path", path]


def _directories(image_dir: Path, work_dir: Path) -> list[str]:
    return ["--image-path", validate_path(image_dir), "--work-path", validate_path(work_dir)]


def _give_up(mount: Path) -> None:
    """Detach what a restore has left and remove the directory it was on, which is empty then."""
    try:
        unmount(mount)
        mount.rmdir()
    except OSError as error:
        raise RuntimeDriverError(f"{mount} can't be removed: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(JSON_BYTES_MAX + 1)
    except OSError as error:
        raise RuntimeDriverError(f"{path} can't be read: {error.strerror}") from error
    if len(data) > JSON_BYTES_MAX:
        raise RuntimeDriverError(f"{path} is larger than {JSON_BYTES_MAX} bytes")
    return json_object(data, str(path))
