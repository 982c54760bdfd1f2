"""The driver of runc. Facts are of runc 1.1.15 (Debian 13) and hold up to 1.3.

What runc does with CRIU, each line a `criu swrk FD` of its own (`libcontainer/criu_linux.go`; FD is
an argument and differs: 3 or more):

    checkpoint:  VERSION, FEATURE_CHECK (only with --lazy-pages), DUMP
    restore:     VERSION, RESTORE

- runc's `criu` for RESTORE is in the container's cgroup before it reads its request; for the others
  it is in runc's own.
- Until CRIU says `post-restore`, a container that is being restored has a directory and no
  state.json: `runc state` does not know it, and the name is taken all the same.
- During a restore the root file system is bind-mounted at ROOT/NAME/criu-root. A runc that is
  killed leaves that mount, and any `runc delete NAME` then deletes *through it* every file of the
  root file system (`delete.go`: RemoveAll). So `delete` here detaches it first.
- runc ignores SIGTERM while it restores. End a restore by ending its criu; runc then cleans up.
- A frozen (paused) container can be checkpointed. CRIU thaws its cgroup once it holds the tasks,
  and freezes it again when the dump is undone: whoever froze it has to thaw it then.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

from migrate.cgroup import own_name
from migrate.runtimes.base import (
    Container,
    ContainerNotFoundError,
    Descriptors,
    RuntimeDriverError,
    Status,
    validate_name,
    validate_path,
)
from migrate.runtimes.oci import mounts_of, namespace_path, part

if TYPE_CHECKING:
    from collections.abc import Sequence

DESCRIPTORS_NAME = "descriptors.json"
LOG_NAME = "runtime.log"
DEFAULT_ROOT = Path("/run/runc")
CGROUP_MOUNT = Path("/sys/fs/cgroup")

# runc answers in tens of milliseconds, `delete --force` waits up to 10 s for the init to be gone.
COMMAND_DEADLINE_S = 20.0
# A config.json with thousands of mounts is below this; state.json repeats all of it.
JSON_BYTES_MAX = 8 << 20
# SIGKILL takes a task out of its cgroup in milliseconds, unless it hangs in the kernel.
KILL_DEADLINE_S = 10.0
KILL_POLL_S = 0.005
# A systemd container has some hundreds.
CGROUPS_MAX = 4096
STDERR_CHARS_MAX = 2000
MOUNTS_STACKED_MAX = 8

_RESTORE_MOUNT = "criu-root"
_MNT_DETACH = 2
_NOT_FOUND = "does not exist"


class Runc:
    """runc by its command line; `root` is runc's own state directory (`runc --root`)."""

    name = "runc"

    def __init__(self, *, root: Path = DEFAULT_ROOT, program: str = "runc") -> None:
        validate_path(root)
        self._root = root
        self._program = program

    def version(self) -> str:
        """The word after "runc version"; raises RuntimeDriverError when there is no runc."""
        words = self._run(["--version"]).split()
        if words[:2] != ["runc", "version"] or len(words) < 3:
            raise RuntimeDriverError(f"{self._program} --version says {' '.join(words[:6])!r}")
        return words[2]

    def inspect(self, name: str) -> Container:
        """The container by `runc state`, its bundle's config.json and runc's state.json.

        The descriptors are only in state.json; the cgroup is there too.
        """
        validate_name(name)
        state = self._state(name)
        if state is None:
            raise ContainerNotFoundError(f"runc has no container {name} in {self._root}")
        bundle = Path(_text(state, "bundle"))
        spec = _read_json(bundle / "config.json")
        kept = _read_json(self._root / name / "state.json")
        process = part(spec, "process")
        return Container(
            name=name,
            runtime=self.name,
            status=_status(state),
            pid=int(state.get("pid") or 0),
            bundle=bundle,
            rootfs=Path(_text(state, "rootfs")),
            spec=spec,
            cgroup=_cgroup(kept),
            netns=namespace_path(spec, "network"),
            terminal=process.get("terminal") is True,
            mounts=mounts_of(spec),
            descriptors=_descriptors(kept),
        )

    def exists(self, name: str) -> bool:
        """Whether runc's directory of that name exists: no other container can take it."""
        return (self._root / validate_name(name)).exists()

    def state(self, name: str) -> Status | None:
        """runc's word for the container's status, None when it has none of that name."""
        found = self._state(validate_name(name))
        return None if found is None else _status(found)

    def checkpoint_command(
        self,
        container: Container,
        image_dir: Path,
        work_dir: Path,
        *,
        lazy: bool,
        page_server: str | None = None,
    ) -> list[str]:
        """`runc checkpoint`. How cgroups and the network are handled goes by CRIU's own
        configuration file: 1.1 has no word for `ignore` and none for the network lock.
        """
        command = [*self._logged(work_dir), "checkpoint", "--tcp-established", "--file-locks"]
        if lazy:
            command.append("--lazy-pages")
        if page_server is not None:
            command += ["--page-server", page_server]
        return [*command, *_directories(image_dir, work_dir), validate_name(container.name)]

    def restore_command(
        self, name: str, bundle: Path, image_dir: Path, work_dir: Path, *, lazy: bool
    ) -> list[str]:
        """`runc restore --detach`. It reads `descriptors.json` before it starts CRIU.

        What runc has to say goes to its log: its own streams are recorded as the container's, so
        a file there would make the container look as if it had a file of the host open.
        """
        command = [*self._logged(work_dir), "restore", "--detach"]
        command += ["--tcp-established", "--file-locks"]
        if lazy:
            command.append("--lazy-pages")
        command += ["--bundle", validate_path(bundle), *_directories(image_dir, work_dir)]
        return [*command, validate_name(name)]

    def descriptors(self, container: Container) -> Descriptors:
        """runc copies `external_descriptors` of its state.json (`Checkpoint`)."""
        return container.descriptors

    def kill(self, name: str) -> None:
        """Kill all tasks by the cgroup, frozen ones too; a container that is gone is fine."""
        if self._state(validate_name(name)) is None:
            return
        _kill_all(_cgroup(_read_json(self._root / name / "state.json")))

    def delete(self, name: str, *, cgroup: Path | None = None) -> None:
        """`runc delete --force`, after the mount of an unfinished restore was detached.

        runc leaves the cgroup behind when a task is not quite dead yet, so the tasks go first.
        """
        directory = self._root / validate_name(name)
        if (directory / "state.json").exists():
            cgroup = _cgroup(_read_json(directory / "state.json"))
        if cgroup is not None:
            _kill_all(cgroup)
        if directory.exists():
            _detach(directory / _RESTORE_MOUNT)
            self._run(["delete", "--force", name])
        if cgroup is not None:
            _remove_cgroup(cgroup)
        if directory.exists():
            raise RuntimeDriverError(f"runc delete {name} has left {directory}")

    def _state(self, name: str) -> dict[str, Any] | None:
        if not (self._root / name / "state.json").exists():
            return None
        try:
            return _object(self._run(["state", name]), f"runc state {name}")
        except ContainerNotFoundError:
            return None

    def _base(self) -> list[str]:
        return [self._program, "--root", str(self._root)]

    def _logged(self, work_dir: Path) -> list[str]:
        return [*self._base(), "--log", validate_path(work_dir / LOG_NAME)]

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
            raise RuntimeDriverError(f"{self._program} is not installed on this host") from error
        except subprocess.TimeoutExpired as error:
            raise RuntimeDriverError(
                f"{' '.join(command)} has not ended in {COMMAND_DEADLINE_S:g} s"
            ) from error
        if done.returncode != 0:
            said = done.stderr.strip()[-STDERR_CHARS_MAX:]
            kind = ContainerNotFoundError if _NOT_FOUND in said else RuntimeDriverError
            raise kind(f"{' '.join(command)} failed: {said or done.returncode}")
        return done.stdout


def descriptors_json(descriptors: Descriptors) -> bytes:
    """The bytes of `descriptors.json`: a JSON array of three strings, as Go marshals it."""
    return json.dumps(list(descriptors), separators=(",", ":"), ensure_ascii=False).encode()


def cgroup_for(spec: dict[str, Any], name: str, *, own_cgroup: str) -> Path:
    """Where runc will put a container that it makes from `spec`.

    `own_cgroup` is the path in `/proc/self/cgroup` of the process that starts runc: a relative
    `cgroupsPath` is beside it (`libcontainer/cgroups/fs2/defaultpath.go`).
    """
    given = str(part(spec, "linux").get("cgroupsPath") or "")
    if given.startswith("/"):
        inner = os.path.normpath(given).lstrip("/")
    else:
        relative = os.path.normpath("/" + (given or name)).lstrip("/")
        inner = str(Path(own_cgroup).parent / relative).lstrip("/")
    return CGROUP_MOUNT / inner


def bundle_cgroup(bundle: Path, name: str) -> Path | None:
    """`cgroup_for` of a bundle on this host, when this process starts runc; None without one."""
    path = bundle / "config.json"
    if not path.exists():
        return None
    return cgroup_for(_read_json(path), name, own_cgroup=own_name())


def _directories(image_dir: Path, work_dir: Path) -> list[str]:
    return ["--image-path", validate_path(image_dir), "--work-path", validate_path(work_dir)]


def _status(state: dict[str, Any]) -> Status:
    word = _text(state, "status")
    if word not in get_args(Status):
        raise RuntimeDriverError(f"runc calls the container's status {word!r}")
    return cast("Status", word)


def _cgroup(kept: dict[str, Any]) -> Path:
    paths = kept.get("cgroup_paths") or {}
    if list(paths) != [""]:
        raise RuntimeDriverError("the container is not in one cgroup of cgroup v2")
    return Path(paths[""])


def _descriptors(kept: dict[str, Any]) -> Descriptors:
    found = kept.get("external_descriptors")
    if not isinstance(found, list) or len(found) != 3:
        raise RuntimeDriverError(f"runc's state.json has no three descriptors: {found!r}")
    return (str(found[0]), str(found[1]), str(found[2]))


def _kill_all(cgroup: Path) -> None:
    """Kill every task in a cgroup and wait until it has none; one that is gone is fine."""
    limit_s = time.monotonic() + KILL_DEADLINE_S
    try:
        (cgroup / "cgroup.kill").write_text("1")
        while "populated 0" not in (cgroup / "cgroup.events").read_text():
            if time.monotonic() > limit_s:
                raise RuntimeDriverError(
                    f"the tasks in {cgroup} were killed and are not gone in {KILL_DEADLINE_S:g} s",
                    remedy="look for tasks in uninterruptible sleep (ps, state D)",
                )
            time.sleep(KILL_POLL_S)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RuntimeDriverError(f"the tasks in {cgroup} can't be killed: {error}") from error


def _remove_cgroup(cgroup: Path) -> None:
    """Remove an empty cgroup and those below it, at most CGROUPS_MAX; one that is gone is fine."""
    below = itertools.islice(os.walk(cgroup, topdown=False), CGROUPS_MAX)
    try:
        for directory, _, _ in below:
            Path(directory).rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise RuntimeDriverError(f"{cgroup} can't be removed: {error}") from error


def _detach(mount: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    # runc makes the directory anew for each restore: one mount; more are somebody else's.
    for _ in range(MOUNTS_STACKED_MAX):
        if libc.umount2(os.fsencode(mount), _MNT_DETACH) != 0:
            break
    code = ctypes.get_errno()
    # EINVAL: not a mount point (umount(2)); the usual case.
    if code not in (errno.EINVAL, errno.ENOENT):
        raise RuntimeDriverError(f"{mount} can't be unmounted: {os.strerror(code)}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(JSON_BYTES_MAX + 1)
    except OSError as error:
        raise RuntimeDriverError(f"{path} can't be read: {error.strerror}") from error
    if len(data) > JSON_BYTES_MAX:
        raise RuntimeDriverError(f"{path} is larger than {JSON_BYTES_MAX} bytes")
    return _object(data, str(path))


def _object(data: str | bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise RuntimeDriverError(f"{what} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise RuntimeDriverError(f"{what} is not a JSON object")
    return parsed


def _text(parent: dict[str, Any], key: str) -> str:
    value = parent.get(key)
    if not isinstance(value, str) or not value:
        raise RuntimeDriverError(f"runc's answer has no {key}")
    return value
