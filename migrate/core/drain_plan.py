"""Which container of a host that is being emptied moves next, and where to. Pure: no clock.

    planner = Planner(hosts, containers, Limits(…))
    while not planner.is_over:
        for move in planner.next_moves(now_s):    begin it
        …                                         wait for the end of one
        planner.ended(name, Outcome.ARRIVED)      or what became of it; then again

It is asked again after every result, so nothing is decided before it has to be. Each move takes
its room on the target from its beginning on, so no host is ever promised more than it has. The
order: priority, then the shortest interruption. With a deadline that this order would miss, those
that take long begin first if more of them are through then. A target is the one with most room of
those that suit. A container that fails is tried elsewhere, `TRIES_MAX` times in all, and then stays
where it runs; a target that is lost gets nothing more.

What waits for room that no target has is not all looked at after every result: with tens of
thousands waiting that would be most of the work. A question looks `LOOKS_MAX` times, the next one
goes on behind it, and all of them are looked at before anything is said to stay.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Final

from migrate.core.drain_facts import (
    RATE_BYTES_S,
    HostState,
    Move,
    Resident,
    move_downtime_ms,
    move_seconds,
    why_not,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TRIES_MAX: Final = 3
# In one question: containers that wait, and targets that do not suit. One host's drain has fewer.
LOOKS_MAX: Final = 100
# So much counts as copied at the rate that is presumed: a copy of less is mostly what every round
# takes, and says little of how long a large one will.
PRESUMED_BYTES: Final = 64 << 20
# Targets that a reason for staying names.
NAMED_MAX: Final = 8
NO_ROOM: Final = "has no room for its group"
LEFT: Final = "its policy is to leave it"


class Outcome(StrEnum):
    """How a move ended. UNDONE: failed or refused, it runs where it ran. TARGET_LOST: the same, by
    no fault of its own. HELD: nobody knows yet where it will run; it is not touched again."""

    ARRIVED = "arrived"
    UNDONE = "undone"
    TARGET_LOST = "target_lost"
    HELD = "held"


@dataclass(frozen=True, slots=True)
class Limits:
    """Moves at once, from one host and to one host. deadline_s: by the clock of `now_s`, when all
    moves have to be over; none begins that would take longer. rate_bytes_s: of each move, until
    moves have been measured."""

    per_source: int = 1
    per_target: int = 1
    deadline_s: float = float("inf")
    rate_bytes_s: float = RATE_BYTES_S


@dataclass(slots=True)
class _Room:
    """What a host has left. stamp: of its entry in the heap that counts."""

    facts: HostState
    free_bytes: int
    free_cpus: float
    slots: int
    spread: set[str]
    closed: str
    stamp: int = 0


@dataclass(slots=True)
class _Group:
    """waiting: members that have not begun. needed_bytes: of those of them that move, all of which
    have room on `target`, if there is one. open: the waiting ones and those under way, with their
    orders, of which `turn` is the lowest."""

    members: list[Resident] = field(default_factory=list)
    waiting: set[str] = field(default_factory=set)
    needed_bytes: int = 0
    open: dict[str, int] = field(default_factory=dict)
    turn: int = 0
    target: _Room | None = None

    def wait(self, one: Resident) -> None:
        self.waiting.add(one.name)
        self.needed_bytes += _moved_bytes(one)
        order = one.wishes.order
        self.turn = min(self.turn, order) if self.open else order
        self.open[one.name] = order

    def begin(self, one: Resident) -> None:
        if one.name in self.waiting:
            self.waiting.remove(one.name)
            self.needed_bytes -= _moved_bytes(one)

    def close(self, one: Resident) -> None:
        """It is through, or stays."""
        self.begin(one)
        self.open.pop(one.name, None)
        self.turn = min(self.open.values(), default=0)


def _moved_bytes(container: Resident) -> int:
    """The room that it needs on a target."""
    return 0 if container.wishes.policy == "stop" else container.needed_bytes


@dataclass(slots=True)
class _Source:
    """A host that is emptied. index: of its queue, where the next look begins."""

    slots: int
    queue: list[Resident] = field(default_factory=list)
    index: int = 0


class Planner:
    """See the module."""

    def __init__(
        self,
        hosts: Iterable[HostState],
        containers: Sequence[Resident],
        limits: Limits,
        *,
        now_s: float = 0.0,
        refused: Iterable[tuple[str, str]] = (),
    ) -> None:
        """`containers`: of the hosts that are to be emptied, their names unique. `refused`: pairs
        of a container and a target that are known not to suit."""
        self._limits = limits
        self._rooms = {one.name: self._room(one) for one in hosts}
        self._heap: list[tuple[int, str, int, _Room]] = []
        for room in self._rooms.values():
            self._touch(room)
        self._containers = {one.name: one for one in containers}
        self._refused = set(refused)
        self._tries: dict[str, int] = {}
        self._last_why: dict[str, str] = {}
        self._groups: dict[str, _Group] = {}
        self._sources: dict[str, _Source] = {}
        # Those of them that could begin a move, the one whose turn it is first.
        self._turns: dict[str, _Source] = {}
        self._looks_left = float("inf")
        # Those that wait and need no target.
        self._to_stop: set[str] = set()
        # Of moves that were measured: what copying took, and everything else.
        self._copied_bytes, self._copied_s = 0, 0.0
        self._beside_s, self._measured = 0.0, 0
        self.under_way: dict[str, Move] = {}
        self.stays: dict[str, str] = {}
        """Containers that will not move any more, and why."""
        for one in containers:
            self._take_in(one)
        self._costs = {one.name: move_downtime_ms(one) for one in self._waiting()}
        for name, source in self._sources.items():
            self._sort(source, now_s)
            self._note_turn(name)

    @property
    def is_over(self) -> bool:
        """Whether nothing is under way and nothing will begin."""
        return not self.under_way and not self._turns

    def next_moves(self, now_s: float) -> list[Move]:
        """The moves that begin now; with the last one ended and none to begin, the rest stays."""
        self._looks_left = LOOKS_MAX if self.under_way else float("inf")
        begun = []
        for name in list(self._turns):
            begun += self._begin_of(self._turns[name], now_s)
            # It goes behind the others when some of it has not been looked at.
            if self._note_turn(name) and self._looks_left <= 0:
                self._turns[name] = self._turns.pop(name)
            if self._looks_left <= 0 or not self._is_any_ready():
                break
        if not begun and not self.under_way:
            rest = sorted(self._waiting(), key=lambda one: one.wishes.order)
            for source in self._sources.values():
                source.queue.clear()
            for one in rest:
                if one.name not in self.stays:
                    self._stay(one, self._why(one, now_s))
        return begun

    def ended(
        self,
        name: str,
        outcome: Outcome,
        *,
        why: str = "",
        seconds: float = 0.0,
        copied_s: float = 0.0,
    ) -> None:
        """What became of a move. `why`: in words, if it did not arrive. `seconds`: it took,
        `copied_s` of them to copy all of its memory once, 0 if that was not seen."""
        move, container = self.under_way.pop(name), self._containers[name]
        source = self._sources[move.source]
        source.slots += 1
        self._note_turn(move.source)
        if move.target:
            self._rooms[move.target].slots += 1
            self._touch(self._rooms[move.target])
        if outcome is Outcome.ARRIVED:
            if copied_s:
                self._copied_bytes += container.memory_bytes
                self._copied_s += copied_s
                self._beside_s += max(seconds - copied_s, 0.0)
                self._measured += 1
            if container.wishes.group:
                self._groups[container.wishes.group].close(container)
            return
        if outcome is Outcome.HELD:
            # Its room on the target stays taken: it may run there yet.
            self._stay(container, why)
            return
        if move.target:
            self._give_back(self._rooms[move.target], container)
            self._refused.add((name, move.target))
        self._last_why[name] = why
        self._tries[name] = self._tries.get(name, 0) + (outcome is Outcome.UNDONE)
        if self._tries[name] >= TRIES_MAX:
            self._stay(container, why)
            return
        self._queue(source, container)
        self._note_turn(move.source)
        if container.wishes.group:
            group = self._groups[container.wishes.group]
            self._unpin(group)
            group.wait(container)

    def lose(self, host: str, why: str) -> None:
        """A target takes nothing from now on; moves under way to it end by themselves."""
        room = self._rooms[host]
        room.closed = why
        room.stamp += 1
        for group in self._groups.values():
            if group.target is room:
                self._unpin(group)

    def see(self, facts: HostState) -> None:
        """A target as it is now. What it has free counts only if nothing is under way to it:
        otherwise some of that is promised."""
        room = self._rooms[facts.name]
        if facts.closed and not room.closed:
            self.lose(facts.name, facts.closed)
        elif room.slots == self._limits.per_target and not self._is_pinned(room):
            room.free_bytes, room.free_cpus = facts.free_bytes, facts.free_cpus
            room.spread |= facts.spread
            self._touch(room)

    def stop(self, why: str) -> None:
        """Nothing begins from now on."""
        for one in self._waiting():
            self._stay(one, why)

    # ---- what waits ----

    def _take_in(self, container: Resident) -> None:
        policy = container.wishes.policy
        source = self._sources.setdefault(container.host, _Source(self._limits.per_source))
        if policy == "leave":
            self.stays[container.name] = LEFT
        elif container.blocked:
            self.stays[container.name] = container.blocked
        else:
            self._queue(source, container)
            if container.wishes.group:
                group = self._groups.setdefault(container.wishes.group, _Group())
                group.members.append(container)
                group.wait(container)

    def _queue(self, source: _Source, container: Resident) -> None:
        source.queue.append(container)
        if container.wishes.policy == "stop":
            self._to_stop.add(container.name)

    def _note_turn(self, host: str) -> bool:
        """Whether something of it could begin, if a target has room."""
        source = self._sources[host]
        has_turn = bool(source.slots and source.queue)
        if has_turn:
            self._turns.setdefault(host, source)
        else:
            self._turns.pop(host, None)
        return has_turn

    def _waiting(self) -> list[Resident]:
        return [one for source in self._sources.values() for one in source.queue]

    def _sort(self, source: _Source, now_s: float) -> None:
        def cheapest(one: Resident) -> tuple[float, float, str]:
            return -one.wishes.priority, self._costs[one.name], one.name

        def longest(one: Resident) -> tuple[float, float, str]:
            return -one.wishes.priority, -self._seconds(one), one.name

        source.queue.sort(key=cheapest)
        late = self._late(source.queue, now_s)
        if late:
            other = sorted(source.queue, key=longest)
            if self._late(other, now_s) < late:
                source.queue = other

    def _late(self, queue: Sequence[Resident], now_s: float) -> int:
        """How many would not be through by the deadline, in that order."""
        if self._limits.deadline_s == float("inf"):
            return 0
        ends, late = [now_s] * self._limits.per_source, 0
        for one in queue:
            end_s = ends[0] + self._seconds(one)
            if end_s > self._limits.deadline_s:
                late += 1
            else:
                heapq.heapreplace(ends, end_s)
        return late

    def _seconds(self, container: Resident) -> float:
        if not self._measured:
            return move_seconds(container, self._limits.rate_bytes_s)
        presumed_s = PRESUMED_BYTES / self._limits.rate_bytes_s
        rate_bytes_s = (PRESUMED_BYTES + self._copied_bytes) / (presumed_s + self._copied_s)
        return move_seconds(container, rate_bytes_s, self._beside_s / self._measured)

    def _stay(self, container: Resident, why: str) -> None:
        """It does not move; nor do those of its group that were to follow it."""
        self.stays[container.name] = why
        source = self._sources[container.host]
        source.queue = [one for one in source.queue if one.name != container.name]
        self._to_stop.discard(container.name)
        self._note_turn(container.host)
        if not container.wishes.group:
            return
        group = self._groups[container.wishes.group]
        self._unpin(group)
        group.close(container)
        for one in group.members:
            if one.name in group.waiting and one.wishes.order > container.wishes.order:
                self._stay(one, f"{container.name}, which its group begins with, stays")

    # ---- beginning ----

    def _begin_of(self, source: _Source, now_s: float) -> list[Move]:
        """Those of one host that begin now; each that waits is looked at once, while looks last."""
        begun, queue, freest = [], source.queue, self._freest()
        for _ in range(len(queue)):
            if self._looks_left <= 0 or not source.slots or not (freest or self._to_stop):
                break
            if source.index >= len(queue):
                source.index = 0
            container = queue[source.index]
            self._looks_left -= 1
            if self._may_begin(container, freest) and (move := self._begin(container, now_s)):
                begun.append(move)
                del queue[source.index]
                source.slots -= 1
                freest = self._freest()
            else:
                source.index += 1
        if self._looks_left > 0:
            source.index = 0
        return begun

    def _is_any_ready(self) -> bool:
        """Whether a target could take anything at all, or something waits that needs none."""
        return self._freest() is not None or bool(self._to_stop)

    def _may_begin(self, container: Resident, freest: _Room | None) -> bool:
        """At a glance, which most of what waits gets again and again: whether it is its turn, there
        is memory for it, and if its group has a target, a place there."""
        wishes, needed_bytes = container.wishes, container.needed_bytes
        if wishes.group:
            group = self._groups[wishes.group]
            if wishes.order > group.turn:
                return False
            if group.target is not None and wishes.policy != "stop":
                return group.target.slots > 0
            needed_bytes = group.needed_bytes
        if wishes.policy == "stop":
            return True
        if freest is None:
            return False
        if needed_bytes <= freest.free_bytes:
            return True
        self._looks_left -= 1
        return False

    def _begin(self, container: Resident, now_s: float) -> Move | None:
        name, wishes, seconds = container.name, container.wishes, self._seconds(container)
        if now_s + seconds > self._limits.deadline_s:
            return None
        group, target = self._groups.get(wishes.group), ""
        if wishes.policy != "stop":
            room = self._choose(container, group)
            if room is None:
                return None
            target = room.facts.name
            room.slots -= 1
            self._touch(room)
        if group is not None:
            group.begin(container)
        self._to_stop.discard(name)
        move = Move(name, container.host, target, wishes.policy, seconds, self._costs[name])
        self.under_way[name] = move
        return move

    def _choose(self, container: Resident, group: _Group | None) -> _Room | None:
        """The target, with the room for it taken; None if there is none now."""
        if group is not None and group.target is not None:
            return group.target
        together = [container]
        if group is not None:
            together = [
                one
                for one in group.members
                if one.name in group.waiting and one.wishes.policy != "stop"
            ]
        found = self._suiting(together)
        if found is not None:
            for one in together:
                self._take(found, one)
            if group is not None:
                group.target = found
        return found

    def _suiting(self, together: Sequence[Resident]) -> _Room | None:
        """The target with most memory free of those that suit all of these at once."""
        needed_bytes = sum([one.needed_bytes for one in together])
        unsuited, found = [], None
        while found is None and (room := self._freest()) is not None:
            self._looks_left -= 1
            if room.free_bytes < needed_bytes:
                break
            if self._why_not(together, room):
                unsuited.append(heapq.heappop(self._heap))
            else:
                found = room
        for entry in unsuited:
            heapq.heappush(self._heap, entry)
        return found

    def _why_not(self, together: Sequence[Resident], room: _Room) -> str:
        """Why these can't go to one that is open now, all of them."""
        if room.free_bytes < sum([one.needed_bytes for one in together]):
            return "has too little memory"
        if room.free_cpus < sum([one.cpus for one in together]):
            return "has too few processors"
        spread = set(room.spread)
        for one in together:
            if (one.name, room.facts.name) in self._refused:
                return self._last_why.get(one.name, "refused it")
            if why := why_not(one, room.facts):
                return why
            if one.wishes.spread in spread:
                return "has one of its anti-affinity"
            spread |= {one.wishes.spread} - {""}
        return ""

    def _why(self, container: Resident, now_s: float) -> str:
        """Why it does not begin, though nothing is under way."""
        if now_s + self._seconds(container) > self._limits.deadline_s:
            return f"the deadline: it would take about {self._seconds(container):.0f} s"
        others = len(self._rooms) - (container.host in self._rooms)
        named = (room for name, room in self._rooms.items() if name != container.host)
        reasons = [
            f"{one.facts.name}: {one.closed or self._why_not([container], one) or NO_ROOM}"
            for one in islice(named, NAMED_MAX)
        ]
        more = f"; and {others - NAMED_MAX} more" if others > NAMED_MAX else ""
        return f"no host can take it ({'; '.join(reasons)}{more})"

    # ---- room ----

    def _room(self, facts: HostState) -> _Room:
        return _Room(
            facts,
            facts.free_bytes,
            facts.free_cpus,
            self._limits.per_target,
            set(facts.spread),
            facts.closed,
        )

    def _take(self, room: _Room, container: Resident) -> None:
        room.free_bytes -= container.needed_bytes
        room.free_cpus -= container.cpus
        room.spread |= {container.wishes.spread} - {""}
        self._touch(room)

    def _give_back(self, room: _Room, container: Resident) -> None:
        room.free_bytes += container.needed_bytes
        room.free_cpus += container.cpus
        room.spread.discard(container.wishes.spread)
        self._touch(room)

    def _unpin(self, group: _Group) -> None:
        """The room of those that have not begun is given back."""
        if group.target is not None:
            for name in group.waiting:
                if self._containers[name].wishes.policy != "stop":
                    self._give_back(group.target, self._containers[name])
            group.target = None

    def _is_pinned(self, room: _Room) -> bool:
        return any(group.target is room and group.waiting for group in self._groups.values())

    def _freest(self) -> _Room | None:
        """The target with most memory free of those that could take something now."""
        while self._heap:
            _, _, stamp, room = self._heap[0]
            if stamp == room.stamp:
                return room
            heapq.heappop(self._heap)
        return None

    def _touch(self, room: _Room) -> None:
        """Its entry in the heap is as it is now."""
        room.stamp += 1
        if room.slots > 0 and not room.closed:
            heapq.heappush(self._heap, (-room.free_bytes, room.facts.name, room.stamp, room))


@dataclass(frozen=True, slots=True)
class Planned:
    """A move with its place in time, in seconds from the beginning."""

    move: Move
    begin_s: float
    end_s: float


def forecast(planner: Planner) -> list[Planned]:
    """All moves if each arrives and takes as long as predicted, in the order of their beginnings;
    `planner.stays` is what is left then. The planner is used up."""
    plan: list[Planned] = []
    ends: list[tuple[float, str]] = []
    now_s = 0.0
    while True:
        for move in planner.next_moves(now_s):
            plan.append(Planned(move, now_s, now_s + move.seconds))
            heapq.heappush(ends, (now_s + move.seconds, move.container))
        if not ends:
            return plan
        now_s = ends[0][0]
        while ends and ends[0][0] <= now_s:
            planner.ended(heapq.heappop(ends)[1], Outcome.ARRIVED)
