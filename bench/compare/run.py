"""One measurement: a container, its client, one move; what the client saw is what counts."""

from __future__ import annotations

import os
import platform
import re
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, Literal

import msgspec

from bench.compare.cost import Cost, CostMeter
from bench.compare.systems import ImpossibleError, MoveError, Scene
from bench.compare.throughput import Around, Curve, around, curve
from bench.containers import ContainerError
from bench.demo import Workload
from bench.lab.errors import LabError
from bench.lab.lab import Lab
from bench.load import Load
from bench.probe import RATE_PER_S
from bench.probe_process import ProbeError, ProbeProcess, run_module, start_probe
from bench.soak_samples import wait_settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bench.compare.cases import Case
    from bench.compare.systems import System
    from bench.lab.host import Host
    from bench.probe import Report

BEFORE_S: Final = 1.0
AFTER_S: Final = 1.0
"""A client that was silent through a long downtime sends again within its retransmission timer, and
is waited for by the probe's own end."""
LOADED_AFTER_S: Final = 3.0
"""Throughput comes back more slowly than answers."""
SAID_CHARS: Final = 400
RATES_PER_S: Final = {"web": 100.0, "postgres": 200.0}
"""Of the client, where a server that is loaded besides answers less than others."""
TOOLED: Final = ("nginx", "web", "postgres")
"""Put under load by tools that only the hosts of comparisons have."""
MIB: Final = 1 << 20


class Conditions(msgspec.Struct, frozen=True, tag="conditions"):
    """Of all rows that follow it."""

    at: str
    kernel: str
    cores: int
    memory_mib: int
    load_before: float
    versions: dict[str, str]


class Row(msgspec.Struct, frozen=True, tag="row"):
    """One run. client_gap_ms: the longest time between two answers on the client's one connection.
    gap_at_ms: its beginning, since the move's. wire_mib: what A sent on its link from the begin of
    the move to its end, the client's part included. throughput: of a load besides the client, if
    there was one. outcome "lost": the client or the memory missed something. Where the workload
    answers datagrams, a client that sends one each ms has udp_gap_ms, which no retransmission is
    in; udp_lost had no answer, udp_doubled one too many, udp_late one after that of a later one.
    still_ms: the longest that a thread of the container which should run each ms did not, by the
    wall clock. costs: what the move took of each host, by its name. took_s: with the container's
    start, its check and its end."""

    system: str
    workload: str
    memory_mib: int
    dirty_mib_s: int
    link: str
    number: int
    outcome: Literal["done", "lost", "failed", "impossible"]
    why: str = ""
    client_gap_ms: float | None = None
    total_ms: float | None = None
    wire_mib: float | None = None
    parts_ms: dict[str, float] = {}
    facts: dict[str, Any] = {}
    throughput: Around | None = None
    curve: Curve | None = None
    took_s: float | None = None
    gap_at_ms: float | None = None
    udp_gap_ms: float | None = None
    udp_lost: int | None = None
    udp_doubled: int | None = None
    udp_late: int | None = None
    still_ms: float | None = None
    costs: dict[str, Cost] = {}


def conditions(lab: Lab) -> Conditions:
    """Of this machine, and of what its lab's hosts have."""
    host = lab.host("A")
    versions = {}
    for name in ("criu", "runc", "podman"):
        said = host.run(["sh", "-c", f"{name} --version || true"]).stdout
        if said:
            versions[name] = said.splitlines()[0].split()[-1]
    return Conditions(
        at=time.strftime("%Y-%m-%d"),
        kernel=platform.release(),
        cores=os.cpu_count() or 0,
        memory_mib=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB,
        load_before=round(os.getloadavg()[0], 2),
        versions=versions,
    )


def run_case(
    case: Case, systems: Sequence[System], runs: int, begun: Callable[[Lab], None]
) -> Iterator[Row]:
    """Every system, `runs` times in turn, in one lab: what changes on the machine meanwhile meets
    all of them. `begun` hears of the lab. Raises LabError when there is none."""
    link = case.link
    compared = any(system.needs_podman for system in systems) or case.workload in TOOLED
    with Lab(["A", "B"], rate=link.rate, delay_ms=link.delay_ms, compared=compared) as lab:
        lab.start_agents()
        begun(lab)
        for number in range(1, runs + 1):
            for system in systems:
                begun_s = time.monotonic()
                row = measure(lab, case, system, number)
                took_s = round(time.monotonic() - begun_s, 1)
                yield msgspec.structs.replace(row, took_s=took_s)


def measure(lab: Lab, case: Case, system: System, number: int) -> Row:
    """One run; whatever fails is in the row."""
    workload = Workload(case.workload, case.memory_mib, case.dirty_mib_s)
    scene = Scene(lab, workload.spec)
    row = Row(
        system.name,
        case.workload,
        case.memory_mib,
        case.dirty_mib_s,
        case.link.name,
        number,
        "failed",
    )
    with ExitStack() as stack:
        stack.callback(system.remove, scene)
        try:
            system.start(scene)
            return _watched(scene, system, workload, row, stack)
        except ImpossibleError as error:
            return msgspec.structs.replace(row, outcome="impossible", why=str(error))
        except (MoveError, LabError, ContainerError, ProbeError) as error:
            return msgspec.structs.replace(row, why=str(error)[-SAID_CHARS:])


def _watched(scene: Scene, system: System, workload: Workload, row: Row, stack: ExitStack) -> Row:
    client, spec = scene.lab.client, scene.spec
    workload.begin(client)
    if workload.writer is not None:
        stack.enter_context(workload.writer)
    rate = RATES_PER_S.get(workload.kind, RATE_PER_S)
    probe = start_probe(spec.client, spec.ip, spec.port, host=client, rate_per_s=rate)
    stack.enter_context(probe)
    ticks = (
        stack.enter_context(start_probe("ticks", spec.ip, spec.port, host=client))
        if spec.ticks
        else None
    )
    for host in scene.lab.hosts:
        wait_settled(host)
    load = _load(scene, workload, stack)
    time.sleep(BEFORE_S)
    if spec.ticks:
        _longest_still_ms(scene)  # and forgotten
    begun_s = time.monotonic()
    sent_bytes = _sent_bytes(scene.source)
    with CostMeter(*scene.lab.hosts) as meter:
        moved = system.move(scene)
        costs = meter.costs()
    sent_bytes = _sent_bytes(scene.source) - sent_bytes
    time.sleep(AFTER_S if load is None else LOADED_AFTER_S)
    throughput, answered = _throughput(load, begun_s) if load is not None else (None, None)
    seen = probe.stop()
    ticked = ticks.stop() if ticks is not None else None
    still_ms = _longest_still_ms(scene) if spec.ticks else None
    verified = workload.verify(client)
    is_whole = seen.clean and verified
    return msgspec.structs.replace(
        row,
        outcome="done" if is_whole else "lost",
        why=""
        if is_whole
        else f"client: {seen.error or seen.received - seen.sent}; {workload.checks}",
        client_gap_ms=seen.gap_max_ms,
        total_ms=round(moved.total_ms, 1),
        wire_mib=round(sent_bytes / MIB, 1),
        parts_ms=moved.parts_ms,
        facts=moved.facts,
        throughput=throughput,
        curve=answered,
        gap_at_ms=_gap_at_ms(seen, begun_s),
        udp_gap_ms=ticked.gap_max_ms if ticked else None,
        udp_lost=ticked.sent - (ticked.received - ticked.doubled) if ticked else None,
        udp_doubled=ticked.doubled if ticked else None,
        udp_late=ticked.out_of_order - ticked.doubled if ticked else None,
        still_ms=still_ms,
        costs=costs,
    )


def _longest_still_ms(scene: Scene) -> float:
    """Since it was asked last. Raises LabError or ProbeError."""
    spec = scene.spec
    said = run_module(scene.lab.client, "bench.workloads.ask", spec.ip, str(spec.port), "STATS")
    found = re.search(r"\bwall_pause_us=(\d+)", said)
    if found is None:
        raise ProbeError(f"the container says {said!r}")
    return int(found[1]) / 1000


def _load(scene: Scene, workload: Workload, stack: ExitStack) -> ProbeProcess | None:
    """Of a server; none of what writes by itself."""
    where = [scene.spec.ip, str(scene.spec.port)]
    commands = {
        "redis": ("bench.load", [*where, f"--mib={workload.memory_mib}"]),
        "nginx": ("bench.load_tools", ["wrk", *where]),
        "web": ("bench.load_tools", ["wrk", *where]),
        "postgres": ("bench.load_tools", ["pgbench", *where]),
    }
    if workload.kind not in commands:
        return None
    process = ProbeProcess(*commands[workload.kind], host=scene.lab.client)
    stack.enter_context(process).wait_connected()
    return process


def _gap_at_ms(seen: Report, begun_s: float) -> float | None:
    """Where the longest gap begins; None if none is worth being listed."""
    since_begin_ms = (seen.started_monotonic_s - begun_s) * 1000
    at_ms, _ = max(seen.gaps_over_100_ms, key=lambda gap: gap[1], default=(None, 0.0))
    return None if at_ms is None else round(at_ms + since_begin_ms, 1)


def _throughput(process: ProbeProcess, begun_s: float) -> tuple[Around, Curve]:
    """Raises ProbeError."""
    load = Load(**process.stop_raw())
    try:
        if load.error:
            raise ValueError(load.error)
        seen = load.answers, load.bin_ms, (begun_s - load.started_monotonic_s) * 1000
        return around(*seen), curve(*seen)
    except ValueError as error:
        raise ProbeError(f"the load: {error}") from error


def _sent_bytes(host: Host) -> int:
    return int(host.read_text("/sys/class/net/uplink/statistics/tx_bytes"))
