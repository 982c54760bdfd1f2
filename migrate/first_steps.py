"""What every coordinator begins with when its journal is open: the container, the targets' answers.

check     preflight on this host         -> facts, what is told and reported of them
request   the question to a target
heard     its answer, for the report
make_directory
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from migrate import config, preflight, progress
from migrate.mounts import mount_tmpfs
from transport.sender import default_streams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from migrate.copy_identity import CopyIdentity
    from migrate.core import messages
    from migrate.facts import ContainerFacts
    from migrate.options import Options
    from migrate.progress import Observer
    from migrate.report import ReportBuilder
    from migrate.runtimes.base import Runtime
    from migrate.undertaking import Entry


class FirstSteps:
    """See the module. `options` are as asked for, and from `check` on as they can be."""

    def __init__(
        self,
        options: Options,
        runtime: Runtime,
        paths: config.HostPaths,
        host: str,
        report: ReportBuilder,
        observer: Observer,
    ) -> None:
        self.options = options
        self._runtime = runtime
        self._paths = paths
        self._host = host
        self._report = report
        self._observer = observer
        report.restore = options.restore
        report.runtime = runtime.name

    async def check(self, targets: Sequence[str], *, is_copied: bool = False) -> ContainerFacts:
        """Preflight. Raises PreflightRefused, MigrateError."""
        options, report = self.options, self._report
        checked = await asyncio.to_thread(
            preflight.check_source,
            self._runtime,
            options.container,
            options.shared,
            restore=options.restore,
            streams=self._streams,
            host=self._host,
            paths=self._paths,
            targets=targets,
            is_copied=is_copied,
        )
        self.options = replace(options, restore=checked.restore)
        report.restore = checked.restore
        report.memory_bytes = checked.facts.memory_bytes
        report.add_versions(self._host, checked.facts.versions)
        for caution in checked.cautions:
            self.warn(f"{caution.message}; {caution.remedy}")
        return checked.facts

    def request(
        self, facts: ContainerFacts, entry: Entry, copy: CopyIdentity | None = None
    ) -> messages.OpenSession:
        """The question to a target, of the container or of a copy."""
        return facts.open_session(
            migration_id=entry.migration_id,
            attempt=entry.attempt,
            host=self._host,
            streams=self._streams,
            restore=self.options.restore,
            dry_run=False,
            patience_s=self.options.link_patience_s,
            copy=copy,
        )

    async def heard(self, entry: Entry, opened: messages.SessionOpened, port: int) -> None:
        """A target, whose agent is at `port`, has opened a session. Raises JournalError."""
        await entry.note(peer_host=opened.host, port=port)
        self._report.add_versions(entry.host, opened.versions)
        for caution in opened.cautions:
            self.warn(f"{entry.host}: {caution.message}; {caution.remedy}")

    def warn(self, message: str) -> None:
        """Tell and report something that the user should know."""
        self._report.warn(message)
        self._observer.tell(progress.Warned(message))

    @property
    def _streams(self) -> int:
        return self.options.streams or default_streams()


def make_directory(directory: Path, facts: ContainerFacts, *, more_bytes: int = 0) -> None:
    """The directory of a migration on its source, a tmpfs. Blocking. Raises OSError."""
    directory.mkdir(mode=0o700, parents=True)
    mount_tmpfs(directory, facts.memory_bytes + config.SESSION_RESERVE_BYTES + more_bytes)
