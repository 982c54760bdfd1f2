"""What a session has on the target's disk and in its memory, made and wiped as one thing.

RUN/sessions/ID.target/        a tmpfs of its own: only this container's memory can fill it
    img/  mem/  work/          this process's alone
    pristine/                  of a copy: the images as they arrived, for `shared_workspace.py`
    lent/{img,mem,kept}/       the agent's front writes there what arrives, until `take_over`
STATE/containers/NAME/         config.json and rootfs/: stays when the migration succeeds
"""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

from criu_glue.core.image_names import is_image_name
from criu_glue.images import FILES_MAX
from criu_glue.page_store import TASKS_MAX, PageStore, is_pages_name
from migrate import config
from migrate.agent.front_link import front_user
from migrate.agent.lending import LendingError, LentDirectory
from migrate.core import messages
from migrate.errors import MigrateError, ProtocolError, remedy_of
from migrate.mounts import mount_tmpfs, unmount
from migrate.runtimes.command import DESCRIPTORS_NAME
from migrate.runtimes.oci import has_user_namespace
from transport import ledger

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.core.messages import OpenSession
    from transport.core.transcript import Carried

# Memory that a container may grow by while it is copied, as a share of what it has at the start.
GROWTH = 0.5

# The request of a session, for an agent that goes on with it.
REQUEST_NAME = "request.json"


class WorkspaceError(MigrateError):
    """The agent could not make or wipe what a session needs on its host."""


class Workspace:
    """The directories of one session. What arrives is written by the agent's front."""

    def __init__(self, request: OpenSession, paths: config.HostPaths) -> None:
        self.session = paths.session(request.migration_id, "target")
        self.bundle = paths.containers / request.container
        self._request = request
        # Of the page store. The tmpfs has room for all memory once more: CRIU may dump a task whole
        # into its images though the store has it (`migrate/standstill.py` warns then).
        self.quota_bytes = int(request.memory_bytes * (1 + GROWTH)) + config.SESSION_RESERVE_BYTES
        self._store: PageStore | None = None
        # What the streams have carried; None until it is taken over.
        self.carried: Carried | None = None
        self._lent: tuple[LentDirectory, ...] = ()
        self._made_session = False
        self._made_bundle = False

    @property
    def rootfs(self) -> Path:
        """The container's root on this host."""
        return self.bundle / "rootfs"

    @property
    def image_dir(self) -> Path:
        """CRIU's image files."""
        return self.session / "img"

    @property
    def memory_dir(self) -> Path:
        """The page store's."""
        return self.session / "mem"

    @property
    def pristine_dir(self) -> Path:
        """The images of a copy, as they arrived."""
        return self.session / "pristine"

    @property
    def _kept_dir(self) -> Path:
        return self.session / "kept"

    @property
    def _lending_dir(self) -> Path:
        return self.session / "lent"

    @property
    def store(self) -> PageStore:
        """The page store; there is one between `take_over` and `wipe_session`."""
        assert self._store is not None
        return self._store

    @property
    def work_dir(self) -> Path:
        """Logs, sockets and programs of the restore."""
        return self.session / "work"

    @classmethod
    def adopt(cls, request: OpenSession, paths: config.HostPaths) -> Workspace:
        """What an agent before this one has made; nothing is received into it any more."""
        self = cls(request, paths)
        self._made_session = self._made_bundle = True
        return self

    def make(self, netns: Path) -> None:
        """Make all of it; blocking. Raises WorkspaceError, having removed what it made."""
        text = container_config(self._request.config_json, netns)
        try:
            self.session.mkdir(mode=0o700, parents=True)
            self._made_session = True
            mount_tmpfs(self.session, self.quota_bytes + self._request.memory_bytes)
            self.work_dir.mkdir(mode=0o700)
            (self.session / REQUEST_NAME).write_bytes(messages.encode(self._request))
            self.image_dir.mkdir(mode=0o700)
            self._make_receiving()
            self.bundle.parent.mkdir(parents=True, exist_ok=True)
            self.bundle.mkdir(mode=0o700)
            self._made_bundle = True
            self.rootfs.mkdir()
            (self.bundle / "config.json").write_text(text)
        except (OSError, LendingError) as error:
            self.discard()
            cause = error if isinstance(error, OSError) else error.__cause__
            raise WorkspaceError(
                f"the session's directories can't be made: {error}",
                remedy=remedy_of(cause) if isinstance(cause, OSError) else "",
            ) from error

    def _make_receiving(self) -> None:
        """Where memory comes to, and where from."""
        for directory in (self.memory_dir, self._kept_dir, self._lending_dir):
            directory.mkdir(mode=0o700)
        for name in ("mem", "img", "kept"):
            lent = LentDirectory(self._lending_dir / name, front_user())
            self._lent = (*self._lent, lent)

    def check_in_time(self) -> None:
        """Whether the restore may be prepared still."""

    def lend(self) -> list[int]:
        """The directories that what arrives is written into, as descriptors for whoever writes:
        memory, images, ledger. The caller's to close. From any thread. Raises LendingError."""
        descriptors: list[int] = []
        try:
            for lent in self._lent:
                descriptors.append(lent.descriptor())  # noqa: PERF401  those so far are closed
        except LendingError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return descriptors

    def take_over(self) -> Carried:
        """Nobody else writes here any more, by whatever descriptor, and what has arrived is this
        process's; what the streams have carried. Blocking. Raises StillWrittenError, and may be
        called again then; LendingError and TransportError for what must not be there."""
        for lent in self._lent:
            lent.take_back()
        memory, images, kept = self._lent
        memory.inherit(self.memory_dir, is_pages_name, TASKS_MAX)
        images.inherit(self.image_dir, is_image_name, FILES_MAX)
        kept.inherit(self._kept_dir, ledger.FILES.__contains__, len(ledger.FILES))
        self._store = PageStore(self.memory_dir, quota_bytes=self.quota_bytes)
        if self._request.copy_of:
            self._keep_pristine()
        self.carried = ledger.carried_in(self._kept_dir)
        return self.carried

    def _keep_pristine(self) -> None:
        """By other names: whoever changes an image replaces it (`criu_glue/images.py`)."""
        self.pristine_dir.mkdir(mode=0o700)
        for path in self.image_dir.iterdir():
            if path.name != DESCRIPTORS_NAME:
                os.link(path, self.pristine_dir / path.name)

    def wipe_session(self) -> None:
        """Give back the memory: the images and the page store. Idempotent; blocking."""
        for lent in self._lent:
            lent.close()
        if self._store is not None:
            self._store.close()
            self._store = None
        if self._made_session:
            # Copies that share the page store keep this file system.
            for directory in (self.image_dir, self.pristine_dir):
                shutil.rmtree(directory, ignore_errors=True)
            unmount(self.session)
            shutil.rmtree(self.session, ignore_errors=True)

    def discard(self) -> None:
        """Wipe all that `make` has made, the container's files included. Idempotent; blocking.

        What was there before is not ours: it may be the bundle of a container that runs.
        """
        self.wipe_session()
        if self._made_bundle:
            shutil.rmtree(self.bundle, ignore_errors=True)


def read_request(session: Path) -> OpenSession | None:
    """The request that `make` has written down; None when there is none, or half of one."""
    try:
        message = messages.decode_from_source((session / REQUEST_NAME).read_bytes())
    except (OSError, ProtocolError):
        return None
    return message if isinstance(message, messages.OpenSession) else None


def container_config(text: str, netns: Path) -> str:
    """The source's config.json with the paths that are this host's own matter.

    The root is the bundle's rootfs and the network namespace the one that the agent makes; one that
    a user namespace owns has no path. Hooks would run programs of the peer's choice on this host,
    so a container that has some is refused.
    """
    try:
        spec: dict[str, Any] = json.loads(text)
        if any(spec.get("hooks", {}).values()):
            raise WorkspaceError(
                "the container's config.json names hooks, which are programs of the source's host",
                remedy="remove the hooks from config.json",
            )
        spec["root"]["path"] = "rootfs"
        for namespace in spec["linux"]["namespaces"]:
            if namespace["type"] == "network" and not has_user_namespace(spec):
                namespace["path"] = str(netns)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkspaceError(f"the container's config.json can't be used: {error!r}") from error
    return json.dumps(spec, indent=1)
