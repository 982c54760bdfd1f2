"""docs/reliability.md, made from the outcomes of a whole campaign. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

from tests.faults.courses import PHASES
from tests.faults.outcome import Outcome
from tests.faults.points import SIDES, Victim

HEAD: Final = """\
# What happens when a plug is pulled

Made by `scripts/test --faults all`. Do not edit.

A container with a self-checking memory workload and a streaming client moves back and forth between
two hosts. Every migration is stopped at one moment: before or after an act of one of the two state
machines, or before or after the record of a state in its journal. Then one process is killed with
SIGKILL, or the link between the hosts falls silent for {silence_s:g} seconds (packets are dropped,
nobody is told), or all connections between the two agents' ports are reset. An agent that was
killed is started again at once; a coordinator is not. The points are made from the tables of the
state machines (`tests/faults`): every moment, times everybody who is alive then. Acts that only a
failure asks for are reached by a first fault (a *course*).

A point has passed when, {alone_s:g} seconds after the fault at the latest, or {helped_s:g} seconds
after somebody has called `migrate recover` on both hosts,

- the container executes on exactly one host, and its client is answered over the connection that it
  had opened before: no answer lost, doubled or out of order;
- every byte of its memory is what it must be;
- nothing of the migration is left on either host: no process, mount, namespace, cgroup, file or
  network device, no tracer or descriptor in the container's tasks;
- neither journal has an open question;
- the container's tasks never executed on both hosts at once (looked at every {period_ms:g} ms).

*Held* counts the points that needed `migrate recover`; `migrate status` must name the container
then. *Idle* is the longest time in which the container executed nowhere, from the fault on;
the stop at the moment itself, some tenths of a second, is not part of it, a silent link is.
"""


PROBLEM_LENGTH_MAX: Final = 200


@dataclass(frozen=True)
class Simulation:
    """What the exhaustive search of the two tables has visited."""

    faults: int
    worlds: int
    walks: int
    walk_faults: int


def render(
    outcomes: Sequence[Outcome],
    environment: Mapping[str, str],
    simulation: Simulation,
    generated: int,
    **numbers: float,
) -> str:
    """The whole document. `generated`: how many points there are. Of a point that was carried out
    several times the last one counts, and what failed before is named. `numbers` are those that
    HEAD names."""
    latest = {one.point: one for one in outcomes}
    earlier = [one for one in outcomes if not one.passed and one is not latest[one.point]]
    outcomes = list(latest.values())
    failed = [one for one in outcomes if not one.passed]
    parts = [
        HEAD.format(**numbers),
        "## Result\n",
        _verdict(outcomes, failed, generated),
        "| | |\n|---|---|",
        *(f"| {name} | {value} |" for name, value in environment.items()),
        "",
    ]
    if failed:
        parts += ["## Failures\n", *(_failure(one) for one in failed), ""]
    if earlier:
        head = (
            f"{len(earlier)} failures were seen before in this campaign. Their causes were removed,"
            " and the points carried out again:\n"
        )
        parts += [head, *(_failure(one) for one in earlier), ""]
    parts += ["## By victim\n", _table(outcomes, ["victim"], _by_victim), ""]
    parts += [
        "## By side, phase and victim\n",
        "`side` is the machine that was stopped, not the host on which the victim runs.\n",
        _table(outcomes, ["side", "phase", "victim"], _by_all),
        "",
        "## The same, simulated\n",
        _simulated(simulation),
    ]
    return "\n".join(parts)


def _verdict(outcomes: Sequence[Outcome], failed: Sequence[Outcome], generated: int) -> str:
    courses = len({one.course for one in outcomes})
    missing = generated - len(outcomes)
    verdict = f"**{len(outcomes)} points on {courses} courses, {len(failed)} failed.**"
    rest = f" {missing} of the {generated} points that there are were not carried out this time."
    return f"{verdict}{rest if missing else ''}\n"


def _failure(outcome: Outcome) -> str:
    problems = [problem.splitlines()[0][:PROBLEM_LENGTH_MAX] for problem in outcome.problems]
    return "\n".join([f"- `{outcome.point}`", *(f"  - {problem}" for problem in problems)])


Key = tuple[int, ...]


def _by_victim(outcome: Outcome) -> Key:
    return (list(Victim).index(Victim(outcome.victim)),)


def _by_all(outcome: Outcome) -> Key:
    side = [str(one) for one in SIDES].index(outcome.side)
    return (side, PHASES.index(outcome.phase), *_by_victim(outcome))


COLUMNS: Final = ("points", "source", "target", "held", "idle median", "idle max", "failed")


def _table(outcomes: Iterable[Outcome], names: Sequence[str], key: Callable[[Outcome], Key]) -> str:
    lines = [
        f"| {' | '.join([*names, *COLUMNS])} |",
        f"|{'---|' * len(names)}{'---:|' * len(COLUMNS)}",
    ]
    for _, grouped in groupby(sorted(outcomes, key=key), key):
        group = list(grouped)
        labels = [str(getattr(group[0], name)) for name in names]
        lines.append(f"| {' | '.join([*labels, *_numbers(group)])} |")
    return "\n".join(lines)


def _numbers(group: Sequence[Outcome]) -> list[str]:
    passed = [one for one in group if one.passed]
    by_itself = [one for one in passed if not one.operator]
    idle = [one.idle_s for one in passed]
    return [
        str(len(group)),
        str(sum(one.ended == "source" for one in by_itself)),
        str(sum(one.ended == "target" for one in by_itself)),
        str(len(passed) - len(by_itself)),
        f"{statistics.median(idle):.2f} s" if idle else "-",
        f"{max(idle):.2f} s" if idle else "-",
        str(len(group) - len(passed)),
    ]


def _simulated(simulation: Simulation) -> str:
    return (
        "`tests/migrate/core/test_handover.py` searches every world that the two tables can be led"
        f" into by at most {simulation.faults} faults: crashes of either side at every step, the"
        " link lost at every step, messages and acts in every order, acts that fail. It visits"
        f" {simulation.worlds:,} worlds; in none do two copies run or is none left, and from each"
        " there is a way on to one that runs, with nothing open on either side."
        f" {simulation.walks} random walks with {simulation.walk_faults} faults each, by seeds that"
        " a failure prints, end there too.\n"
    )
