"""Copies of a container on other hosts, or beside it: sessions, addresses, who is left out.

    preflight ─ sessions ─ rounds ─ prepare ─ freeze, keep, thaw ─ send ─ restore ─ run ─ fill
                `_open`                                                   └─── `_finish` ───┘

The order of it all, and what becomes of the container, is in `duplicating.py`. One pre-copy serves
all hosts, and the copies on one have what came there once (`host_copies.py`). A host that fails is
left out, and so is a copy; the others go on.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from criu_glue import images
from migrate import config, copy_identity, preflight, progress
from migrate.copies_wanted import in_ranges, others, readdressed
from migrate.copy_session import CopySession
from migrate.core.clock_relation import ClockRelation
from migrate.core.states import SourceState as S
from migrate.driver import quietly
from migrate.duplicating import Duplicating
from migrate.errors import MigrateError, PreflightRefused, SessionRefused, UsageError
from migrate.host_copies import HostCopies
from migrate.standstill import restore_request
from migrate.target_link import TargetLink
from migrate.undertaking import of_below
from transport.errors import TransportError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from migrate.copies_wanted import Alike, Wanted
    from migrate.copy_identity import CopyIdentity
    from migrate.copying import Rounds
    from migrate.core.confinement import Confinements
    from migrate.core.messages import SessionOpened
    from migrate.facts import ContainerFacts
    from migrate.network_identity import IP
    from migrate.options import Options
    from migrate.progress import Observer
    from migrate.rootfs_snapshot import RootfsSnapshot
    from migrate.runtimes.base import Runtime
    from migrate.undertaking import Entry

# Copies that others make at the same time from the same range get some of its addresses.
READDRESSED_MAX: Final = 8

_T = TypeVar("_T")


class Cloning(Duplicating):
    """See the module."""

    def __init__(
        self,
        options: Options,
        wanted: Sequence[Wanted],
        alike: Alike,
        runtime: Runtime,
        paths: config.HostPaths,
        observer: Observer,
        migration_id: str,
    ) -> None:
        super().__init__(options, wanted, runtime, paths, observer, migration_id)
        self._alike = alike
        # Addresses of ranges.
        self._taken: set[IP] = set()
        self._entries: list[Entry] = []
        self._hosts: list[HostCopies] = []
        self._made: list[CopySession] = []

    @property
    def _targets(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.host for one in self._wanted))

    # --- all hosts at once ---

    async def _on_each(self, step: Callable[[HostCopies], Coroutine[Any, Any, None]]) -> None:
        """One step on all hosts; one that fails in it is left out. Raises what the last one ended
        with."""

        async def on(host: HostCopies) -> None:
            try:
                await host.or_failure(step(host))
            except (MigrateError, TransportError, OSError, TimeoutError) as error:
                await self._leave_out(host, self._translated(error, host.host))

        await asyncio.gather(*(on(host) for host in self._hosts))

    async def _meanwhile(self, work: Coroutine[Any, Any, _T]) -> _T:
        """The result of `work`, which is for all hosts; those that fail meanwhile are left out."""
        running = asyncio.create_task(work)
        try:
            while not running.done():
                ways: set[asyncio.Future[Any]] = {running, *(host.failed for host in self._hosts)}
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                for host in [one for one in self._hosts if one.failed.done()]:
                    error = host.failed.exception()
                    assert error is not None
                    await self._leave_out(host, self._translated(error, host.host))
            return await running
        finally:
            running.cancel()

    async def _leave_out(self, host: HostCopies, error: MigrateError) -> None:
        """Go on without this host. Raises `error` when it is the last."""
        error.at(host=host.host, phase=self._phase)
        if self._hosts == [host]:
            raise error
        if host in self._hosts:
            self._hosts.remove(host)
            if self._rounds is not None:
                self._rounds.leave_out(host.first.link)
            await host.give_up(error)

    def _left_out(self, copy: CopySession, error: MigrateError) -> None:
        name = copy.identity.name
        self._errors[name] = error.at(host=copy.host, phase=self._phase)
        self._first.warn(f"there will be no copy {name} on {copy.host}: {error.message}")

    # --- sessions and addresses ---

    async def _open(self, facts: ContainerFacts) -> None:
        """A session for each copy."""
        await self._choose_addresses(facts)
        await self._enter_all()
        identities = {one.name: one for one in self._identities(facts)}
        own = [address for one in identities.values() for address in one.addresses]
        taken = preflight.judge_addresses(own, preflight.own_addresses())
        if taken:
            raise PreflightRefused(taken, host=self._host)
        for address in copy_identity.left_out(facts.network, list(identities.values())):
            self._first.warn(f"no copy has one for the address {address}; give one more --ip")
        await self._record_all(S.PRECOPY, "preflight_passed")
        of_host: dict[str, list[CopySession]] = {}
        for one, entry in zip(self._wanted, self._entries, strict=True):
            link = TargetLink(one.host, one.port, self._paths, self._options.way)
            patience_s = self._options.link_patience_s
            copy = CopySession(link, identities[one.name], entry, patience_s=patience_s)
            self._sessions.append(copy)
            of_host.setdefault(one.host, []).append(copy)
        self._hosts = [
            HostCopies(copies, facts, self._options, self._observer, self._left_out)
            for copies in of_host.values()
        ]
        await self._on_each(lambda host: self._open_on(host, facts))

    async def _choose_addresses(self, facts: ContainerFacts) -> None:
        """Of ranges, those that nobody has. Raises UsageError when they are too few."""
        pools = self._alike.pools
        if not (candidates := in_ranges(pools)):
            return
        # Without such a bridge here nothing is known; the targets look for themselves.
        with contextlib.suppress(FileNotFoundError):
            self._taken = await asyncio.to_thread(
                preflight.taken_addresses, facts.network, candidates
            )
            self._wanted = readdressed(self._wanted, pools, self._taken)

    async def _enter_all(self) -> None:
        """Each copy has an entry in the journal, the first one that of the freeze."""
        container = self._options.container
        self._entries = [self._begun.entry]
        for one in self._wanted[1:]:
            entry = await self._begun.enter(secrets.token_hex(6), container, one.host)
            self._entries.append(entry)

    def _identities(self, facts: ContainerFacts) -> Iterator[CopyIdentity]:
        """The first copy of each host receives; those that come after it have what it has."""
        alike = self._alike
        entries: dict[str, Entry] = {}
        hosts = [one.host for one in self._wanted]
        is_eager = self._options.restore == "eager"
        for place, (one, entry) in enumerate(zip(self._wanted, self._entries, strict=True)):
            first = entries.setdefault(one.host, entry)
            is_alone = hosts.count(one.host) == 1
            yield replace(
                copy_identity.identity_of(facts.network, one.name, one.addresses),
                hook=alike.hook,
                signal=alike.signal,
                beside="" if first is entry else first.migration_id,
                number=hosts[:place].count(one.host),
                fill=is_eager or (is_alone if alike.fill is None else alike.fill),
            )

    async def _open_on(self, host: HostCopies, facts: ContainerFacts) -> None:
        async def open_one(copy: CopySession) -> None:
            opened = await self._ask(copy, facts)
            await self._first.heard(copy.entry, opened, copy.link.port)

        await host.each(open_one)

    async def _ask(self, copy: CopySession, facts: ContainerFacts) -> SessionOpened:
        """With another address of its range when the target has found its own taken. Raises what
        the target refused at last."""
        for _ in range(READDRESSED_MAX):
            try:
                return await copy.open(self._first.request(facts, copy.entry, copy.identity))
            except SessionRefused as refused:
                if any(code != "address-taken" for code, _, _ in refused.refusals):
                    raise
                if not self._readdress(copy, facts):
                    raise
        return await copy.open(self._first.request(facts, copy.entry, copy.identity))

    def _readdress(self, copy: CopySession, facts: ContainerFacts) -> bool:
        """Give the copy other addresses; whether there are any."""
        name = copy.identity.name
        wanted = {one.name: one for one in self._wanted}
        self._taken.update(address for one in self._wanted for address in one.addresses)
        own = wanted[name].addresses
        try:
            addresses = others(self._alike.pools, own, self._taken)
        except UsageError:
            return False
        if addresses == own:
            return False
        wanted[name] = replace(wanted[name], addresses=addresses)
        self._wanted = tuple(wanted.values())
        fresh = copy_identity.identity_of(facts.network, name, addresses)
        copy.identity = replace(copy.identity, network=fresh.network, renamed=fresh.renamed)
        return True

    async def _record_all(self, state: S, event: str) -> None:
        for entry in self._entries[1:]:
            await entry.ledger.record(str(state), event)
        await self._record(state, event)

    # --- what comes to all hosts ---

    def _links(self) -> list[TargetLink]:
        for number, host in enumerate(self._hosts):
            host.begin(self._directory / f"host-{number}", self._host)
        return [host.first.link for host in self._hosts]

    def _lost(self, link: TargetLink, error: TransportError) -> None:
        for host in self._hosts:
            if host.first.link is link:
                host.fail(of_below(error, self._host, host.host, self._phase))

    async def _clocks(self) -> ClockRelation:
        """Of the slowest host, which decides when all of it is there everywhere."""
        clocks = []

        async def relate(host: HostCopies) -> None:
            clocks.append(await host.first.talk.relate_clocks())

        await self._on_each(relate)
        return max(clocks, key=lambda one: one.error_us)

    async def _copy_rootfs(self) -> None:
        await self._on_each(HostCopies.copy_rootfs)

    async def _prepare_targets(self, descriptors: tuple[str, str, str]) -> None:
        names = " and ".join(host.host for host in self._hosts)
        self._enter("prepare", f"restores are started on {names}")

        async def prepare(copy: CopySession) -> None:
            await copy.prepare(descriptors)
            await copy.prepared()

        await self._on_each(lambda host: host.each(prepare))

    async def _send_snapshot(self, snapshot: RootfsSnapshot) -> None:
        await self._on_each(lambda host: host.send_snapshot(snapshot))

    async def _finish(self, rounds: Rounds, image_dir: Path, confinement: Confinements) -> None:
        await self._restore(rounds, image_dir, confinement)
        await self._let_run()

    async def _restore(self, rounds: Rounds, image_dir: Path, confinement: Confinements) -> None:
        """The copies of a host one after the other, so that each gets its processors."""
        self._enter("restore", "on " + " and ".join(host.host for host in self._hosts))
        stored = await asyncio.to_thread(images.store_ranges, image_dir)
        carried = await rounds.carried()
        is_lazy = self._options.restore == "lazy"

        async def restore(copy: CopySession) -> None:
            signed = copy.sealed(self._host, carried)
            request = restore_request(signed, stored, confinement)
            await copy.restore(request, lazy=is_lazy)

        await self._on_each(lambda host: host.each(restore))

    async def _let_run(self) -> None:
        self._is_given = True
        await asyncio.gather(*(self._run(copy) for host in self._hosts for copy in host.copies))
        if not self._made:
            raise next(iter(self._errors.values()))
        filled = [copy for copy in self._made if copy.is_filled]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(config.FILL_DEADLINE_S):
                await asyncio.gather(*(self._filled(copy) for copy in filled))

    async def _run(self, copy: CopySession) -> None:
        try:
            await copy.run()
        except MigrateError as error:
            self._left_out(copy, _unknown(copy, error))
            return
        self._made.append(copy)
        await quietly(copy.entry.note(copied=copy.identity.name))
        where = ", ".join(copy.identity.addresses)
        self._enter("copied", f"{copy.identity.name} runs on {copy.host} {where}".rstrip())

    async def _filled(self, copy: CopySession) -> None:
        fill = await copy.talk.wait_filled()
        if fill is None:
            self._first.warn(f"the fill on {copy.host} was not heard of")
        else:
            self._builder.add_fill(fill)
            self._observer.tell(progress.Filled(fill.fill_ms, fill.faults))

    # --- ends ---

    def _ends(self) -> Iterator[tuple[Entry, str]]:
        made = {copy.entry.migration_id for copy in self._made}
        for entry in self._entries or [self._begun.entry]:
            yield entry, "cloned" if entry.migration_id in made else "rolled_back"


def _unknown(copy: CopySession, error: MigrateError) -> MigrateError:
    """A target that did not say that the copy runs lets it run, or wipes it."""
    return MigrateError(
        f"it is not known whether {copy.identity.name} runs on {copy.host}: {error.message}",
        host=error.host,
        phase=error.phase,
        remedy=f"see on {copy.host}: migrate status {copy.entry.migration_id}",
    )
