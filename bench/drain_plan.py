"""How long the planner of drains takes, and whether it keeps every host's limits, by simulation.

    plan      all moves with their times, as `--dry-run` shows them, by the real planner
    simulate  the same moves carried out in simulated time; a share of them fails, and after each
              result what is next is asked anew. Every change is entered in books that know nothing
              of the planner's, and compared with the hosts' limits.

Some hosts are emptied at once, the others have room. Containers differ in size, processors, runtime
and wishes (groups, anti-affinity, labels).

Usage: python -m bench.drain_plan [--hosts 1000] [--containers 50000] [--emptied 100 …]
"""

from __future__ import annotations

import argparse
import heapq
import os
import platform
import random
import statistics
import time
from collections import Counter
from typing import TYPE_CHECKING, Final

from migrate.core.drain_facts import HostState, Resident, Wishes
from migrate.core.drain_plan import Limits, Outcome, Planner, forecast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from migrate.core.drain_facts import Move

GIB: Final = 1 << 30
HOST_GIB: Final = 256
HOST_CPUS: Final = 128.0
LIMITS: Final = Limits(per_source=4, per_target=4)
SIZES_MIB: Final = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
REPETITIONS: Final = 5


class OverLimitError(Exception):
    """A host had more than it has, at some moment."""


def world(
    hosts: int, containers: int, emptied: int, chance: random.Random
) -> tuple[list[HostState], list[Resident]]:
    """The hosts, of which the first `emptied` take nothing, and the containers of those."""
    names = [f"host{number}" for number in range(hosts)]
    used: Counter[str] = Counter()
    moved = []
    for number in range(containers):
        name = names[number % hosts]
        size = chance.choice(SIZES_MIB) << 20
        used[name] += size
        if number % hosts < emptied:
            moved.append(_resident(f"c{number}", name, size, chance))
    states = [
        HostState(
            name,
            free_bytes=HOST_GIB * GIB - used[name],
            free_cpus=HOST_CPUS,
            runtimes=frozenset({"runc"} if number % 3 else {"runc", "crun"}),
            labels=frozenset({"ssd"} if number % 2 else ()),
            closed="is drained" if number < emptied else "",
        )
        for number, name in enumerate(names)
    ]
    return states, moved


def _resident(name: str, host: str, size: int, chance: random.Random) -> Resident:
    rare = chance.random()
    wishes = Wishes(
        priority=chance.choice((0, 0, 0, 1)),
        group=f"{host}-{chance.randrange(5)}" if rare < 0.2 else "",
        spread=f"key{chance.randrange(50)}" if 0.2 <= rare < 0.3 else "",
        requires=frozenset({"ssd"} if 0.3 <= rare < 0.4 else ()),
    )
    runtime = "crun" if chance.random() < 0.1 else "runc"
    return Resident(name, host, size, size, cpus=0.5, wishes=wishes, runtime=runtime)


class Books:
    """What is where, by what was begun and ended. Raises OverLimitError."""

    def __init__(self, hosts: Sequence[HostState], containers: Sequence[Resident]) -> None:
        self._hosts = {one.name: one for one in hosts}
        self._containers = {one.name: one for one in containers}
        self._bytes: Counter[str] = Counter()
        self._cpus: Counter[str] = Counter()
        self._moves: Counter[tuple[str, str]] = Counter()

    def begin(self, move: Move) -> None:
        """It takes its room on the target, and a place on both."""
        self._enter(move, 1)
        for end, most in (("from", LIMITS.per_source), ("to", LIMITS.per_target)):
            place = (end, move.source if end == "from" else move.target)
            self._moves[place] += 1
            if self._moves[place] > most:
                raise OverLimitError(f"{self._moves[place]} moves at once {place}")
        host = self._hosts[move.target]
        if host.closed or self._bytes[host.name] > host.free_bytes:
            raise OverLimitError(f"{host.name} has {self._bytes[host.name]} of {host.free_bytes}")
        if self._cpus[host.name] > host.free_cpus:
            raise OverLimitError(f"{host.name} has not so many processors")

    def end(self, move: Move, *, arrived: bool) -> None:
        """It has ended; without having arrived it gives the room back."""
        self._moves["from", move.source] -= 1
        self._moves["to", move.target] -= 1
        if not arrived:
            self._enter(move, -1)

    def _enter(self, move: Move, sign: int) -> None:
        container = self._containers[move.container]
        self._bytes[move.target] += sign * container.needed_bytes
        self._cpus[move.target] += sign * container.cpus  # type: ignore[assignment]


def simulate(
    hosts: Sequence[HostState],
    containers: Sequence[Resident],
    failing: float,
    chance: random.Random,
) -> tuple[int, int, float]:
    """How many arrived, how many stayed, and the longest question for the next moves in seconds."""
    planner, books = Planner(hosts, containers, LIMITS), Books(hosts, containers)
    ends: list[tuple[float, str]] = []
    now_s, arrived, longest_s = 0.0, 0, 0.0
    while not planner.is_over:
        asked_s = time.perf_counter()
        moves = planner.next_moves(now_s)
        longest_s = max(longest_s, time.perf_counter() - asked_s)
        for move in moves:
            books.begin(move)
            heapq.heappush(ends, (now_s + move.seconds * chance.uniform(0.5, 2), move.container))
        if ends:
            now_s, name = heapq.heappop(ends)
            is_well = chance.random() >= failing
            books.end(planner.under_way[name], arrived=is_well)
            planner.ended(name, Outcome.ARRIVED if is_well else Outcome.UNDONE, why="failed")
            arrived += is_well
    return arrived, len(planner.stays), longest_s


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hosts", type=int, default=1000)
    parser.add_argument("--containers", type=int, default=50_000)
    parser.add_argument("--emptied", type=int, nargs="+", default=[1, 100, 500])
    parser.add_argument("--failing", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(
        f"{platform.node()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, load"
        f" {os.getloadavg()[0]:.1f}; {given.hosts} hosts, {given.containers} containers, seed"
        f" {given.seed}, n = {REPETITIONS} (median, longest), {given.failing:.0%} of moves fail"
    )
    print("| emptied | moves | plan | simulation | arrived, stay | longest question |")
    print("|---|---|---|---|---|---|")
    for emptied in given.emptied:
        chance = random.Random(given.seed)  # noqa: S311 - a seed is what is wanted
        hosts, containers = world(given.hosts, given.containers, emptied, chance)
        plans_s, simulations_s, questions_s = [], [], []
        for _ in range(REPETITIONS):
            begun_s = time.perf_counter()
            moves = len(forecast(Planner(hosts, containers, LIMITS)))
            planned_s = time.perf_counter()
            arrived, stay, question_s = simulate(hosts, containers, given.failing, chance)
            plans_s.append(planned_s - begun_s)
            simulations_s.append(time.perf_counter() - planned_s)
            questions_s.append(question_s)
        print(
            f"| {emptied} | {moves} | {_spread(plans_s)} | {_spread(simulations_s)}"
            f" | {arrived}, {stay} | {1000 * max(questions_s):.0f} ms |",
            flush=True,
        )


def _spread(took_s: Sequence[float]) -> str:
    return f"{statistics.median(took_s):.2f} s, {max(took_s):.2f} s"


if __name__ == "__main__":
    main()
