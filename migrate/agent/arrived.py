"""What has arrived for a session, before CRIU sees it: taken from the front, then judged.

    take_over            nobody but this process can write to it any more
    check_signed         it is what the source has signed for this session, and for no other
    check_confinement    this host's policy takes tasks that are confined as these are

Blocking.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from migrate import policy, policy_checks, signing
from migrate.agent.lending import StillWrittenError
from migrate.core.manifest import Binding, SignedManifest
from migrate.errors import CheckpointRefused, MigrateError, RestoreFailed
from migrate.runtimes.command import DESCRIPTORS_NAME
from transport.errors import TransportError

if TYPE_CHECKING:
    from migrate import config
    from migrate.agent.front_keeper import Front
    from migrate.agent.workspace import Workspace
    from migrate.core.confinement import Confinements
    from migrate.core.messages import OpenSession, Restore
    from transport.core.transcript import Carried

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Arrived:
    """What `peer` has sent for `request` to this host. Errors say that the restore failed."""

    request: OpenSession
    workspace: Workspace
    peer: str
    host: str
    paths: config.HostPaths

    def take_over(self, front: Front) -> Carried:
        """Make it this process's. A front that keeps something open for writing is ended: it is not
        the one that was started. Raises RestoreFailed."""
        try:
            try:
                return self.workspace.take_over()
            except StillWrittenError as error:
                log.warning("the front is ended", why=str(error))
                front.kill()
                return self.workspace.take_over()
        except (MigrateError, TransportError, OSError) as error:
            raise RestoreFailed(
                f"what has arrived can't be used: {error}", host=self.host, phase="restore"
            ) from error

    def check_signed(self, restore: Restore, carried: Carried) -> None:
        """Raises CheckpointRefused, and RestoreFailed when the manifest can't be kept: it stays
        with the container and says who brought it here."""
        request = self.request
        signed = SignedManifest(restore.manifest, restore.signature, restore.certificate)
        binding = Binding(
            migration_id=request.migration_id,
            container=request.container,
            epoch=request.attempt,
            source=self.peer,
            target=self.host,
            versions=request.versions,
            protocol=request.protocol,
        )
        try:
            signing.check_arrived(
                signed,
                binding,
                carried,
                self.workspace.image_dir,
                beside=(DESCRIPTORS_NAME,),
                trust=self.paths.tls,
                now_s=time.time(),
            )
            signing.store(self.workspace.bundle / signing.MANIFEST_NAME, signed)
        except CheckpointRefused as error:
            remedy = f"try again; if it stays so, {self.peer} sends something else than it signs"
            raise error.at(phase="restore", remedy=remedy) from error
        except OSError as error:
            raise RestoreFailed(f"the manifest can't be kept: {error}", phase="restore") from error

    def check_confinement(self, confinement: Confinements) -> None:
        """What the images make of the tasks may be other than what config.json says of them. The
        copy will be held to what is judged here (`Restoring.commit`). Raises RestoreFailed."""
        refusals = policy_checks.judge_tasks(policy.load(self.paths.policy), confinement)
        if refusals:
            raise RestoreFailed(
                "; ".join(one.message for one in refusals),
                host=self.host,
                phase="restore",
                remedy=refusals[0].remedy,
            )
