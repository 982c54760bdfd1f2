"""The driver of runc. Facts are of runc 1.1.15 (Debian 13) and hold up to 1.3.

What runc does with CRIU, each line a `criu swrk FD` of its own (`libcontainer/criu_linux.go`; FD is
an argument and differs: 3 or more):

    checkpoint:  VERSION, FEATURE_CHECK (only with --lazy-pages), DUMP
    pre-dump:    VERSION, FEATURE_CHECK, PRE_DUMP
    restore:     VERSION, RESTORE

- runc's `criu` for RESTORE is in the container's cgroup before it reads its request; for the others
  it is in runc's own.
- Until CRIU says `post-restore`, a container that is being restored has a directory and no
  state.json: `runc state` does not know it, and the name is taken all the same.
- During a restore the root file system is bind-mounted at ROOT/NAME/criu-root. A runc that is
  killed leaves that mount, and any `runc delete NAME` then deletes *through it* every file of the
  root file system (`delete.go`: RemoveAll). So `delete` detaches it first.
- runc ignores SIGTERM while it restores. End a restore by ending its criu; runc then cleans up.
- A frozen (paused) container can be checkpointed. CRIU thaws its cgroup once it holds the tasks,
  and freezes it again when the dump is undone: whoever froze it has to thaw it then.
- 1.1 has no words for `ignore` (cgroups) and the network lock. It says itself whether a dump is
  lazy, over CRIU's configuration file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from migrate.cgroup import own_name
from migrate.runtimes.base import Descriptors, RuntimeDriverError
from migrate.runtimes.command import RESTORE_MOUNT, OciCommand, below_mount, three_descriptors
from migrate.runtimes.oci import part

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_ROOT = Path("/run/runc")

# Nobody listens there: runc wants a page server for a lazy dump, CRIU is given a socket instead.
_NO_PAGE_SERVER = "127.0.0.1:1"


class Runc(OciCommand):
    """See the module."""

    name = "runc"
    state_name = "state.json"
    not_found = "does not exist"
    sets_limits_late = False
    renames_cgroups = True

    def __init__(self, *, root: Path = DEFAULT_ROOT, program: str = "runc") -> None:
        super().__init__(root, program)

    def cgroup_for(self, spec: dict[str, Any], name: str) -> Path:
        """As `cgroup_for` says, where this process starts runc."""
        return cgroup_for(spec, name, own_cgroup=own_name())

    def _cgroup_in(self, kept: dict[str, Any]) -> Path:
        paths = kept.get("cgroup_paths") or {}
        if list(paths) != [""]:
            raise RuntimeDriverError("the container is not in one cgroup of cgroup v2")
        return Path(paths[""])

    def _descriptors_in(self, kept: dict[str, Any]) -> Descriptors:
        return three_descriptors(kept.get("external_descriptors"), "runc's state.json")

    def _restore_mount(self, name: str, _: Path | None) -> Path:
        return self._root / name / RESTORE_MOUNT

    def _checkpoint_options(self, *, lazy: bool) -> Sequence[str]:
        return ("--lazy-pages", "--page-server", _NO_PAGE_SERVER) if lazy else ()

    def _restore_options(self, *, lazy: bool) -> Sequence[str]:
        return ("--lazy-pages",) if lazy else ()


def cgroup_for(spec: dict[str, Any], name: str, *, own_cgroup: str) -> Path:
    """Where runc will put a container that it makes from `spec`.

    `own_cgroup` is the path in `/proc/self/cgroup` of the process that starts runc: a relative
    `cgroupsPath` is beside it (`libcontainer/cgroups/fs2/defaultpath.go`).
    """
    given = str(part(spec, "linux").get("cgroupsPath") or "")
    if given.startswith("/"):
        return below_mount(os.path.normpath(given))
    relative = os.path.normpath("/" + (given or name)).lstrip("/")
    return below_mount(str(Path(own_cgroup).parent / relative))
