"""Runs a soak: a lab with agents, a container, its client, and one verified move after another."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from bench.containers import create, is_running, start
from bench.lab.errors import LabError
from bench.lab.lab import Lab
from bench.probe_process import PYTHON_INSIDE, ProbeError, ProbeProcess, run_module, start_probe
from bench.soak_result import HOSTS, Move, Outcome
from bench.soak_samples import agent_pid, sample, wait_settled

if TYPE_CHECKING:
    from bench.containers import ContainerSpec
    from bench.soak_samples import Sample

PROBE_PER_S: Final = 500.0
MIGRATION_DEADLINE_S: Final = 300.0
ANSWERED_S: Final = 20.0
"""A client that was silent through a downtime sends again within its retransmission timer."""
POLL_S: Final = 0.02
SAID_CHARS: Final = 4000

# The journal is filled on a tmpfs, where a sync costs nothing, and then put into its place.
SEED_JOURNAL: Final = """
import shutil, time
from collections import deque
from pathlib import Path
from migrate.config import HostPaths
from migrate.core import source_machine, target_machine
from migrate.core.states import SourceState, TargetState
from migrate.journal import MAX_FINISHED, Journal, Migration

def path_to_done(may_follow, first, done):
    ways = deque([(first, ())])
    while ways[0][0] != done:
        state, way = ways.popleft()
        ways.extend((one, (*way, one)) for one in sorted(may_follow[state]))
    return ways[0][1]

ways = {
    "source": path_to_done(source_machine.MAY_FOLLOW, SourceState.NEW, SourceState.DONE),
    "target": path_to_done(target_machine.MAY_FOLLOW, TargetState.OPEN, TargetState.DONE),
}
seed, place = Path("/run/seed/journal.sqlite"), HostPaths().journal
since_s = time.time() - 86400
with Journal.open(seed) as journal:
    for number in range(MAX_FINISHED):
        role, name, at_s = ("source", "target")[number % 2], f"seed{number}", since_s + number
        # No less than what a migration notes: its rows must fit where these have been.
        facts = {"session": "/run/migrate/sessions/" + name, "padding": "x" * 2000}
        journal.begin(Migration(name, role, 1, "seed", "runc", "nobody", at_s, facts))
        for state in ways[role]:
            journal.append(name, role, state, "seeded", at_wall_s=at_s)
place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
shutil.move(seed, place)
shutil.rmtree(seed.parent)
"""


class Observer(Protocol):
    """Who follows a run."""

    def begun(self, before: dict[str, Sample]) -> None:
        """The lab is up and the container runs."""

    def moved(self, move: Move) -> None:
        """One migration is done and verified."""


class SoakError(Exception):
    """A move failed, or what was found after it is not what it must be."""


@dataclass(slots=True)
class Soak:
    """The run: a lab with agents, the container on A, its client."""

    lab: Lab
    spec: ContainerSpec
    probe: ProbeProcess
    agents: dict[str, int]

    def move(self, number: int) -> Move:
        """The next migration, verified and measured. Raises SoakError, LabError."""
        source, target = HOSTS if number % 2 else reversed(HOSTS)
        begun_s = time.monotonic()
        command = ["migrate", self.spec.name, "--to", target, "--json"]
        done = self.lab.host(source).run(command, check=False, timeout_s=MIGRATION_DEADLINE_S)
        if done.returncode != 0:
            raise SoakError(
                f"move {number}, {source} to {target}: migrate ended with {done.returncode}:"
                f" {(done.stderr or done.stdout)[-SAID_CHARS:]}"
            )
        report = json.loads(done.stdout.splitlines()[-1])
        self._verify(number, target)
        return Move(number, source, target, begun_s, time.monotonic(), report, measure(self.lab))

    def _verify(self, number: int, target: str) -> None:
        running = [host.name for host in self.lab.hosts if is_running(host, self.spec.name)]
        if running != [target]:
            raise SoakError(f"after move {number} the container runs on {running}, not {target}")
        (verdict,) = self._ask("VERIFY")
        if not verdict.startswith("VERIFY ok ") or " bad=0 " not in verdict:
            raise SoakError(f"after move {number} the memory is not what it was: {verdict}")
        self._wait_answered(number)
        agents = {host.name: agent_pid(host) for host in self.lab.hosts}
        if agents != self.agents:
            raise SoakError(f"after move {number} an agent is another process: {agents}")

    def _wait_answered(self, number: int) -> None:
        """The streaming client is answered again: more than by what is asked here."""
        until_s, asked, before = time.monotonic() + ANSWERED_S, 0, self._answers()
        while self.probe.alive() and time.monotonic() < until_s:
            asked += 1
            if self._answers() > before + asked:
                return
            time.sleep(POLL_S)
        raise SoakError(f"after move {number} the client is not answered any more")

    def _answers(self) -> int:
        return int(self._ask("1")[0].split()[1])

    def _ask(self, line: str) -> list[str]:
        where = (self.spec.ip, str(self.spec.port))
        return run_module(self.lab.client, "bench.workloads.ask", *where, line).splitlines()


def measure(lab: Lab) -> dict[str, Sample]:
    """Both hosts, when they have come to rest."""
    for host in lab.hosts:
        wait_settled(host)
    return {host.name: sample(host) for host in lab.hosts}


def run_soak(spec: ContainerSpec, migrations: int, observer: Observer) -> Outcome:
    """Move a container `migrations` times; a failure ends the run and is in the outcome."""
    outcome = Outcome()
    with ExitStack() as stack:
        lab = stack.enter_context(Lab(HOSTS))
        for host in lab.hosts:
            host.run(["python3", "-c", SEED_JOURNAL], env=PYTHON_INSIDE)
        lab.start_agents()
        create(lab.host("A"), spec)
        start(lab.host("A"), spec.name)
        probe = stack.enter_context(
            start_probe("lines", spec.ip, spec.port, host=lab.client, rate_per_s=PROBE_PER_S)
        )
        soak = Soak(lab, spec, probe, {host.name: agent_pid(host) for host in lab.hosts})
        outcome.before = measure(lab)
        observer.begun(outcome.before)
        try:
            for number in range(1, migrations + 1):
                outcome.moves.append(soak.move(number))
                observer.moved(outcome.moves[-1])
        except (SoakError, LabError) as error:
            outcome.failure = str(error)
        except KeyboardInterrupt:
            outcome.failure = "interrupted"
        with suppress(ProbeError):
            outcome.client = probe.stop()
    return outcome
