"""What a session has whose container is one copy of several that come by one transfer.

Nothing is sent for it. The copy that the transfer is for has a workspace as every session; this one
has of it

    mem/      the same page store: the same tmpfs, mounted here too
    img/      the images as they arrived, copied, since each copy's say other names
    rootfs/   the files as they arrived, copied before anybody runs on them

So the store takes memory once. The kernel keeps it as long as one of these mounts is there, and
frees it with the last: nobody counts who still needs it, whoever dies, agents included.
"""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING, Final

from criu_glue.page_store import PageStore
from migrate.agent.workspace import Workspace, WorkspaceError
from migrate.mounts import mount_again

if TYPE_CHECKING:
    from migrate.config import HostPaths
    from migrate.core.messages import OpenSession
    from transport.core.transcript import Carried

_STDERR_BYTES_MAX: Final = 2000


class SharedWorkspace(Workspace):
    """See the module. `first`: of the copy that the transfer is for."""

    def __init__(self, request: OpenSession, paths: HostPaths, first: Workspace) -> None:
        super().__init__(request, paths)
        self._first = first

    def check_in_time(self) -> None:
        """Raises WorkspaceError when the first copy may have used some of the store already."""
        if self._first.carried is not None:
            raise WorkspaceError("the copy whose transfer is shared has been restored already")

    def take_over(self) -> Carried:
        """What the first copy has received is here too. Raises WorkspaceError."""
        carried = self._first.carried
        if carried is None:
            raise WorkspaceError("the copy whose transfer is shared has not been received yet")
        try:
            for path in self._first.pristine_dir.iterdir():
                shutil.copyfile(path, self.image_dir / path.name)
        except OSError as error:
            raise WorkspaceError(f"the images can't be copied: {error}") from error
        # With all that files have: owners, modes, times, links, holes, extended attributes.
        done = subprocess.run(
            ["cp", "-a", "--reflink=auto", "--", f"{self._first.rootfs}/.", str(self.rootfs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            check=False,
        )
        if done.returncode != 0:
            words = done.stderr[-_STDERR_BYTES_MAX:].decode("utf-8", "replace").strip()
            raise WorkspaceError(f"the root file system can't be copied: {words}")
        self._store = PageStore(self.memory_dir, quota_bytes=self.quota_bytes)
        return carried

    def _make_receiving(self) -> None:
        """Nobody lends anything: nothing arrives here."""
        self.memory_dir.mkdir(mode=0o700)
        mount_again(self._first.memory_dir, self.memory_dir)
