"""`migrate clone --from DIR --to HOST`: copies of a checkpoint that was kept (`checkpoint.py`).

To a target they are copies like any: the memory, the images and the files come from the directory
and not from a container, and there is nothing to freeze. What is sent is signed anew by this host,
for this target and this moment, when all of the checkpoint has been compared with what the host
that made it has signed.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from criu_glue.page_sources import FinalDelta
from migrate import policy, policy_checks
from migrate.checkpoint import Kept, KeptPages
from migrate.cloning import Cloning
from migrate.copying import Rounds
from migrate.errors import PreflightRefused
from migrate.facts import ContainerFacts
from migrate.precopy import MemorySource
from migrate.runtimes.base import Container
from migrate.runtimes.oci import mounts_of
from migrate.standstill import send_images

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy as np
    import numpy.typing as npt

    from criu_glue.core.pagemap import PageRuns
    from migrate.errors import MigrateError
    from migrate.runtimes.base import Runtime


class Starting(Cloning):
    """See the module. `options.container` is the one that is kept."""

    def __init__(self, kept: Kept, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._kept = kept

    async def _steps(self) -> None:
        self._enter("preflight")
        about, place = self._kept.about, self._kept.place
        await asyncio.to_thread(self._check, self._targets)
        if about.request.restore == "eager":
            self._first.options = replace(self._options, restore="eager")
        facts = await asyncio.to_thread(self._facts)
        self._builder.memory_bytes = facts.memory_bytes
        await self._open(facts)
        # As they have proven it, whatever they were called.
        hosts = [copy.link.opened.host for copy in self._sessions if copy.link.opened]
        await asyncio.to_thread(self._check, hosts)
        rounds = await self._begin_rounds(facts)
        await self._copy_rootfs()
        memory = rounds.memory
        self._builder.add_round(await self._meanwhile(asyncio.to_thread(memory.round)))
        await self._prepare_targets(about.descriptors)
        images = asyncio.to_thread(send_images, memory, place.images)
        self._builder.add_images(await self._meanwhile(images))
        await self._finish(rounds, place.images, about.confinement)

    def _check(self, hosts: Sequence[str]) -> None:
        """Raises CheckpointRefused, PreflightRefused, PolicyError."""
        rules, name = policy.load(self._paths.policy), self._options.container
        refusals = []
        for host in dict.fromkeys(hosts):
            self._kept.check_for(host, time.time())
            refusals += policy_checks.judge_send(rules, name, host)
            refusals += policy_checks.judge_clone(rules, name, target=host)
        if refusals:
            raise PreflightRefused(refusals, host=self._host)

    def _facts(self) -> ContainerFacts:
        about, place = self._kept.about, self._kept.place
        request = about.request
        spec: dict[str, Any] = json.loads(request.config_json)
        container = Container(
            name=request.container,
            runtime=request.runtime,
            status="stopped",
            pid=0,
            bundle=place.memory,
            rootfs=place.rootfs,
            spec=spec,
            cgroup=self._runtime.cgroup_for(spec, request.container),
            netns=None,
            terminal=False,
            mounts=mounts_of(spec),
            descriptors=about.descriptors,
        )
        return ContainerFacts(
            container=container,
            network=request.network,
            tasks=request.tasks,
            memory_bytes=request.memory_bytes,
            shared_bytes=request.shared_bytes,
            rootfs_bytes=request.rootfs_bytes,
            versions=request.versions,
            cpuinfo=request.cpuinfo,
            labels=request.labels,
        )

    def _new_rounds(self, *given: Any) -> Rounds:
        return _KeptRounds(self._kept, *given)

    async def _explained(self, error: MigrateError) -> MigrateError:
        return error.at(container_state=f"is kept in {self._kept.place.directory}")


class _KeptRounds(Rounds):
    """The memory of a checkpoint, in one round."""

    def __init__(self, kept: Kept, *given: Any) -> None:
        super().__init__(*given)
        self._kept = kept

    async def start(self, runtime: Runtime, migration_id: str) -> None:
        """Open the streams."""
        pages = await asyncio.to_thread(KeptPages, self._kept.place)
        self._memory = MemorySource(_KeptSource(pages), self._make_sender)
        await asyncio.to_thread(self._memory.sender.connect)
        self._tell_started(_KeptSource.name, migration_id)


class _KeptSource:
    """See `PageSource`: nothing was written since, and nothing stands still."""

    name: Final = "checkpoint"
    parent: None = None

    def __init__(self, pages: KeptPages) -> None:
        self._pages = pages

    def collect(self) -> list[tuple[int, PageRuns]]:
        """All that was kept."""
        return self._pages.runs

    def final(self) -> FinalDelta:
        """Nothing."""
        return FinalDelta([], [])

    def dumped(self, image_dir: Path) -> list[tuple[int, PageRuns]]:
        """Nothing."""
        return []

    def watched(self, task: int, runs: PageRuns) -> tuple[PageRuns, PageRuns]:
        """All: nothing was written."""
        return runs, runs[:0]

    def read(self, task: int, runs: PageRuns, out: memoryview) -> npt.NDArray[np.bool_]:
        """From the checkpoint's files."""
        return self._pages.read(task, runs, out)

    def delivered(self) -> None:
        """It is kept all the same."""

    def close(self) -> None:
        """Close the files."""
        self._pages.close()
