"""The driver of crun. Facts are of crun 1.21 (Debian 13) with libcriu 4.2.1 (`src/libcrun/criu.c`).

What crun does with CRIU, each line a `criu swrk FD` of its own that libcriu starts from PATH:

    checkpoint:  VERSION, DUMP
    restore:     VERSION, RESTORE

- It has no option for a lazy dump or restore and says nothing of it to CRIU, so that the line
  `lazy-pages` of CRIU's configuration file is in force. Of cgroups it always says something: only
  its own option makes that `ignore`.
- It makes the container's cgroup before it restores. CRIU is not in it (hence `HoldPlan.join`):
  crun moves the restored init there afterwards, and that alone.
- It sets the cgroup's limits (memory, processes, devices …) and writes its state file when CRIU
  has ended, so when the tasks would run already (hence `HoldPlan.outside`). Until then `crun state`
  does not know the container.
- The bind mount of a restore is at BUNDLE/criu-root; a crun that is killed leaves it. One whose
  CRIU fails removes it, and leaves ROOT/NAME and the cgroup to whoever deletes the container.
- Without rules for devices in config.json a container may use every device, where runc's may use
  the harmless ones only (`policy_checks.py` asks for a rule).
- It knows a container's rootfs by config.json's word, and its cgroup by the path below the mount.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrate.refusals import Refusal
from migrate.runtimes.base import Descriptors, RuntimeDriverError
from migrate.runtimes.command import RESTORE_MOUNT, OciCommand, below_mount, three_descriptors
from migrate.runtimes.oci import part

if TYPE_CHECKING:
    from collections.abc import Sequence

# crun's own choice for root, unless XDG_RUNTIME_DIR is set; a migration always names it.
DEFAULT_ROOT = Path("/run/crun")
_LIBRARY = "libcriu.so.2"
_CGROUPS = ("--manage-cgroups-mode", "ignore")


class Crun(OciCommand):
    """See the module."""

    name = "crun"
    state_name = "status"
    not_found = "No such file or directory"
    sets_limits_late = True
    # They have no controllers.
    renames_cgroups = False

    def __init__(self, *, root: Path = DEFAULT_ROOT, program: str = "crun") -> None:
        super().__init__(root, program)

    def refusals(self) -> list[Refusal]:
        """A crun can be built without CRIU, and finds its library only when it needs it."""
        found = super().refusals()
        if not found and "+CRIU" not in self._run(["--version"]).split():
            text = "crun was built without CRIU (`crun --version` does not say +CRIU)"
            found.append(Refusal("runtime", text, "install one with it: Debian 13's has it"))
        if not found and not _has_library():
            text = f"crun's library for CRIU, {_LIBRARY}, can't be found on this host"
            found.append(Refusal("runtime", text, "install it (Debian: libcriu2)"))
        return found

    def cgroup_for(self, spec: dict[str, Any], name: str) -> Path:
        """By cgroupsPath from the mount on, or by the name (`src/libcrun/cgroup-cgroupfs.c`)."""
        return below_mount(str(part(spec, "linux").get("cgroupsPath") or name))

    def _cgroup_in(self, kept: dict[str, Any]) -> Path:
        return below_mount(self._text(kept, "cgroup-path"))

    def _descriptors_in(self, kept: dict[str, Any]) -> Descriptors:
        text = self._text(kept, "external_descriptors")
        try:
            found = json.loads(text)
        except ValueError as error:
            raise RuntimeDriverError(f"crun's descriptors are not JSON: {error}") from error
        return three_descriptors(found, "crun's status file")

    def _restore_mount(self, _: str, bundle: Path | None) -> Path | None:
        return None if bundle is None else bundle / RESTORE_MOUNT

    def _checkpoint_options(self, *, lazy: bool) -> Sequence[str]:
        return _CGROUPS

    def _restore_options(self, *, lazy: bool) -> Sequence[str]:
        return _CGROUPS


def _has_library() -> bool:
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True
