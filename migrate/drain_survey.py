"""What a drain is planned from, as it is: this host's containers, and what hosts could take.

Looks only; `core/drain_facts.py` has the shapes, `core/drain_plan.py` decides.
"""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from migrate import cordon, drain_history, facts, policy_checks, preflight
from migrate.core import messages
from migrate.core.drain_facts import HostState, Resident, Wishes, wishes_of
from migrate.errors import MigrateError, PreflightRefused
from migrate.host_checks import version_of
from migrate.runtimes.oci import part
from transport.sender import default_streams

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from migrate.config import HostPaths
    from migrate.drain_history import Past
    from migrate.policy import Policy
    from migrate.preflight import SourceCheck
    from migrate.runtimes.base import Container, Runtime

_NETWORK_DEVICES = Path("/sys/class/net")
_BRIDGES_MAX = 1024


def describe(
    paths: HostPaths, runtimes: Mapping[str, Runtime], rules: Policy
) -> messages.Description:
    """This host, for one that wants to send containers. Blocking, some 50 ms a container. Raises
    MigrateError."""
    usable = [
        name
        for name, one in runtimes.items()
        if name in rules.receive.runtimes and not one.refusals()
    ]
    found = list(_containers(runtimes))
    spread = {_wishes(one).spread for one, _ in found} - {""}
    closed = cordon.refusals(paths, "")
    cpus = (os.cpu_count() or 1) - sum(_cpus(one) for one, _ in found)
    versions = facts.host_versions(next(iter(runtimes.values())))
    return messages.Description(
        host=socket.gethostname(),
        free_memory_bytes=max(facts.free_memory_bytes() - preflight.MEMORY_RESERVE_BYTES, 0),
        free_cpus=cpus,
        versions=versions,
        runtimes=tuple(usable),
        bridges=tuple(sorted(_bridges()))[:_BRIDGES_MAX],
        labels=rules.receive.labels,
        spread=tuple(sorted(spread))[: messages.MAX_RESIDENTS],
        closed=closed[0].message if closed else "",
    )


def host_state(told: messages.Description) -> HostState:
    """What a host has said of itself, for the planner."""
    return HostState(
        name=told.host,
        free_bytes=told.free_memory_bytes,
        free_cpus=told.free_cpus,
        architecture=told.versions.architecture,
        criu=version_of(told.versions.criu),
        runtimes=frozenset(told.runtimes),
        bridges=frozenset(told.bridges),
        labels=frozenset(told.labels),
        spread=frozenset(told.spread),
        closed=told.closed,
    )


def residents(
    paths: HostPaths, runtimes: Mapping[str, Runtime], targets: Sequence[str], shared: Sequence[str]
) -> tuple[list[Resident], dict[str, SourceCheck]]:
    """The containers that run here, and what preflight has found of those that could move to one
    of `targets`. Blocking, some 200 ms a container. Raises MigrateError."""
    host, found, checks = socket.gethostname(), [], {}
    past = drain_history.read(paths)
    for container, runtime in _containers(runtimes):
        name, why = container.name, ""
        wishes = Wishes()
        try:
            wishes = wishes_of(part(container.spec, "annotations"))
            if wishes.policy in ("live", "stop-and-copy"):
                checks[name] = preflight.check_source(
                    runtime,
                    name,
                    shared,
                    restore="lazy",
                    streams=default_streams(),
                    host=host,
                    paths=paths,
                    targets=(targets[0],),
                )
        except PreflightRefused as error:
            why = "; ".join(message for _, message, _ in error.refusals)
        except MigrateError as error:
            why = error.message
        found.append(_resident(container, host, wishes, checks.get(name), why, past.get(name)))
        if len(found) == messages.MAX_RESIDENTS:
            break
    return found, checks


def may_send(rules: Policy, targets: Sequence[str]) -> list[str]:
    """Those of the targets that this host's policy gives containers to."""
    return [
        target
        for target in targets
        if not any(
            one.code == "policy-target" for one in policy_checks.judge_send(rules, "x", target)
        )
    ]


def _resident(
    container: Container,
    host: str,
    wishes: Wishes,
    check: SourceCheck | None,
    why: str,
    past: Past | None,
) -> Resident:
    if check is None:
        runtime = container.runtime
        return Resident(container.name, host, 0, 0, wishes=wishes, runtime=runtime, blocked=why)
    if past is not None and not wishes.dirty_bytes_s:
        wishes = replace(wishes, dirty_bytes_s=past.dirty_bytes_s)
    seen, is_lazy = check.facts, check.restore == "lazy"
    twice_bytes = seen.shared_bytes if is_lazy else seen.memory_bytes
    return Resident(
        name=container.name,
        host=host,
        memory_bytes=seen.memory_bytes,
        needed_bytes=seen.memory_bytes + twice_bytes,
        workload=seen.workload(lazy=is_lazy),
        cpus=_cpus(container),
        wishes=wishes,
        runtime=container.runtime,
        architecture=seen.versions.architecture,
        criu=version_of(seen.versions.criu),
        bridges=frozenset(port.bridge for port in seen.network.ports if port.bridge is not None),
        past_downtime_ms=None if past is None else past.downtime_ms,
    )


def _containers(runtimes: Mapping[str, Runtime]) -> Iterator[tuple[Container, Runtime]]:
    """Those that run, of every runtime. One that ends meanwhile is left out."""
    for runtime in runtimes.values():
        for name in runtime.names():
            try:
                container = runtime.inspect(name)
            except MigrateError:
                continue
            if container.status in ("running", "paused"):
                yield container, runtime


def _wishes(container: Container) -> Wishes:
    """Of one that is not to move: what can't be understood is nothing."""
    try:
        return wishes_of(part(container.spec, "annotations"))
    except MigrateError:
        return Wishes()


def _cpus(container: Container) -> float:
    """The limit of its processor time, in processors; 0 without one."""
    limits = part(part(part(container.spec, "linux"), "resources"), "cpu")
    quota, period = limits.get("quota"), limits.get("period")
    if isinstance(quota, int) and isinstance(period, int) and quota > 0 and period > 0:
        return quota / period
    return 0.0


def _bridges() -> set[str]:
    return {one.name for one in _NETWORK_DEVICES.iterdir() if (one / "bridge").is_dir()}
