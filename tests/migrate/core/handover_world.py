"""A world of two hosts, their machines, journals and trees, and the link between: every step of it.

The machines under test are driven as `migrate.driver` drives them: an event leads to a transition,
whose state is recorded if it must be, and only then its acts begin, one after another, beside those
of earlier transitions; ROLLBACK and DISCARD stop all others but the writing of a record. An act
that is over queues its event.

A target in doubt may also ask the agent of its source's host, which answers from the journal, at
any moment: whether the link stands or not, and whether the coordinator lives or not.

The link keeps order and loses whatever is under way when it breaks. A crash loses all of a host but
its journal and its tree of tasks: trees are held by processes of their own. Faults are drawn from a
budget, so the graph of worlds is finite, and it is searched completely: there is no depth limit.

Names are plain strings here, since hashing an Enum's members costs most of the search's time.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from migrate.core import source_machine, target_machine
from migrate.core.events import source_reported, target_reported
from migrate.core.states import SourceState, TargetState

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

RUNS, FROZEN, HELD, NONE = "runs", "frozen", "held", "none"
GONE = "gone"
"""Of the source's tree: it went down with its host."""
CRASHED = "crashed"
LOST, BACK = "!lost", "!back"
"""Marks in a link's queue: what the receiving side notices of the link itself."""

WORLD_LIMIT = 2_000_000
"""Worlds of one search: several times what the largest test reaches (about 1 KiB each)."""

Rows = dict[tuple[str, str], tuple[str, tuple[str, ...]]]

SOURCE_MESSAGES = {
    "opened": "session_opened",
    "prepared": "target_prepared",
    "held": "target_held",
    "running": "target_running",
    "failed": "target_failed",
    "ask": "target_asks",
    LOST: "link_lost",
    BACK: "link_back",
    **{f"state:{state}": str(target_reported(state)) for state in TargetState},
}
TARGET_MESSAGES = {
    "open": "session_accepted",
    "prepare": "prepare_asked",
    "restore": "restore_asked",
    "commit": "commit_received",
    "abort": "abort_received",
    "ask": "source_asks",
    LOST: "link_lost",
    BACK: "link_back",
    **{f"state:{state}": str(source_reported(state)) for state in SourceState},
}

SOURCE_SENDS = {
    "open_session": "open",
    "prepare_target": "prepare",
    "request_restore": "restore",
    "send_commit": "commit",
    "ask_target": "ask",
    **{f"tell_state:{state}": f"state:{state}" for state in SourceState},
}
TARGET_SENDS = {
    "tell_opened": "opened",
    "tell_prepared": "prepared",
    "tell_held": "held",
    "tell_running": "running",
    "tell_failed": "failed",
    "tell_aborted": "state:aborted",
    "ask_source": "ask",
    **{f"tell_state:{state}": f"state:{state}" for state in TargetState},
}
IDLE = {
    "copy_rootfs",
    "receive",
    "tell_filled",
    "clean_up",
    "report_done",
    "report_aborted",
    "hold",
}
"""Acts without a trace in this world: left out, which only saves steps."""

ON_FIRST_ONLY = {"open", "prepare", "restore"}
"""What travels on the connection that opened the session and on no later one."""

SOURCE_ANSWERS = {
    "run_preflight": "preflight_passed",
    "run_round": "converged_now",
    "freeze_and_dump": "dumped",
    "send_final": "final_sent",
    "record_commit": "commit_recorded",
    "release": "released",
    "rollback": "rolled_back",
}
TARGET_ANSWERS = {
    "prepare": "prepared",
    "restore": "criu_held",
    "record_commit": "commit_recorded",
    "resume": "resumed",
    "fill": "fill_done",
    "discard": "discarded",
}


OVERTAKING = {"rollback", "discard"}

MAY_FAIL = {
    "freeze_and_dump",
    "record_commit",
    "release",
    "rollback",
    "restore",
    "resume",
    "discard",
}
"""The other acts' failures are no different from a cancellation at the same moment."""


class Violation(AssertionError):
    """A rule is broken in a reachable world; the message is the way that leads there."""


class Host(NamedTuple):
    """One side.

    state: of its machine, or CRASHED. entering: a record being written and the acts behind it; no
    event is taken meanwhile. acts: what is left of each transition's acts, under way at once.
    events: of acts that are over, in their order. log: the last recorded state. tree: of the source
    RUNS, FROZEN, NONE or GONE; of the target NONE, HELD or RUNS.
    """

    state: str
    entering: tuple[str, tuple[str, ...]] | None
    acts: tuple[tuple[str, ...], ...]
    events: tuple[str, ...]
    log: str
    tree: str

    def is_quiet(self) -> bool:
        """Nothing is under way here."""
        return not (self.entering or self.acts or self.events)


class World(NamedTuple):
    """Everything. down: messages to the target; back: messages to the source, oldest first. first:
    the connection that opened the session still stands."""

    source: Host
    target: Host
    up: bool
    first: bool
    down: tuple[str, ...]
    back: tuple[str, ...]
    faults: int


class Protocol:
    """The tables and the rules of recording, as plain strings; tests break them on purpose."""

    def __init__(self) -> None:
        self.source: Rows = {
            (str(state), str(kind)): (str(after), tuple(str(act) for act in acts))
            for (state, kind), (after, acts) in source_machine.TABLE.items()
        }
        self.target: Rows = {
            (str(state), str(kind)): (str(after), tuple(str(act) for act in acts))
            for (state, kind), (after, acts) in target_machine.TABLE.items()
        }
        self.source_recorded = {str(state) for state in source_machine.RECORDED}
        self.target_recorded = {str(state) for state in target_machine.RECORDED}
        self.source_recovery = _plain(source_machine.RECOVERY)
        self.source_recovery_without_tree = _plain(source_machine.RECOVERY_WITHOUT_TREE)
        self.target_recovery = _plain(target_machine.RECOVERY)
        self.source_follow = _plain_sets(source_machine.MAY_FOLLOW)
        self.target_follow = _plain_sets(target_machine.MAY_FOLLOW)
        self.source_verdicts = _plain_verdicts(source_machine.VERDICTS)
        self.target_verdicts = _plain_verdicts(target_machine.VERDICTS)
        self.decided = {"rolling_back", "aborted", "releasing", "done"}
        """What the source's agent says of a migration whose coordinator lives. A commit is not
        among it: the coordinator may be about to record a rollback behind it."""


def _plain(recovery: Mapping[Any, tuple[Any, tuple[Any, ...]]]) -> Rows:
    return {
        (str(state), "recovery"): (str(after), tuple(str(act) for act in acts))
        for state, (after, acts) in recovery.items()
    }


def _plain_verdicts(verdicts: Mapping[Any, Any]) -> dict[str, str]:
    return {str(state): str(verdict) for state, verdict in verdicts.items()}


def _plain_sets(follow: Mapping[Any, frozenset[Any]]) -> dict[str, set[str]]:
    return {str(last): {str(state) for state in after} for last, after in follow.items()}


START = World(
    source=Host("new", None, (), ("started",), "", RUNS),
    target=Host("open", None, (), (), "", NONE),
    up=True,
    first=True,
    down=(),
    back=(),
    faults=0,
)


def _enter(host: Host, row: tuple[str, tuple[str, ...]], recorded: set[str], old: str) -> Host:
    """The host after a transition: with its record, or else its acts, begun."""
    after, acts = row
    # The state in which the question was taken: what is entered later is perhaps not recorded yet.
    acts = tuple(
        f"tell_state:{after}" if act == "tell_state" else act for act in acts if act not in IDLE
    )
    if after != old and after in recorded:
        return Host(after, (after, acts), host.acts, host.events, host.log, host.tree)
    return _begin(Host(after, host.entering, host.acts, host.events, host.log, host.tree), acts)


def _begin(host: Host, acts: tuple[str, ...]) -> Host:
    if OVERTAKING.intersection(acts):
        # A record that was asked for before cannot be called back: it is written, or refused.
        asked = [("record_commit",) for other in host.acts if other[0] == "record_commit"]
        return host._replace(acts=tuple(sorted((*asked, acts))))
    if not acts:
        return host
    under_way = tuple(sorted((*host.acts, acts)))
    return Host(host.state, host.entering, under_way, host.events, host.log, host.tree)


def _recorded(host: Host, follow: dict[str, set[str]], first: str) -> Host:
    assert host.entering is not None
    state, acts = host.entering
    if state != host.log and state not in follow[host.log or first]:
        raise Violation(f"the journal refuses {state} behind {host.log}")
    return _begin(host._replace(log=state, entering=None), acts)


def _feed(protocol: Protocol, world: World, side: str, kind: str) -> World:
    if side == "source":
        host = _after(world.source, protocol.source, protocol.source_recorded, kind, side)
    else:
        host = _after(world.target, protocol.target, protocol.target_recorded, kind, side)
    return _with(world, side, host)


def _with(world: World, side: str, host: Host) -> World:
    # Not `_replace`, which takes several times as long and is called a million times.
    source, target, up, first, down, back, budget = world
    if side == "source":
        return World(host, target, up, first, down, back, budget)
    return World(source, host, up, first, down, back, budget)


def host_of(world: World, side: str) -> Host:
    """The host of one side."""
    return world.source if side == "source" else world.target


def _after(host: Host, rows: Rows, recorded: set[str], kind: str, side: str) -> Host:
    row = rows.get((host.state, kind))
    if row is None:
        raise Violation(f"the {side} has no row for {kind} in {host.state}")
    return _enter(host, row, recorded, host.state)


def _without_head(host: Host, number: int, *events: str, drop: bool = False) -> Host:
    """The host after the first act of a list is over (with `drop`, the whole list)."""
    rest = () if drop else host.acts[number][1:]
    others = host.acts[:number] + host.acts[number + 1 :]
    acts = tuple(sorted((*others, rest))) if rest else others
    return Host(host.state, host.entering, acts, host.events + events, host.log, host.tree)


def _without_event(host: Host) -> Host:
    return Host(host.state, host.entering, host.acts, host.events[1:], host.log, host.tree)


def _commit_record(host: Host, follow: dict[str, set[str]], first: str, number: int) -> Host:
    """RECORD_COMMIT: refused where another record came first."""
    if host.log != "committed" and "committed" not in follow[host.log or first]:
        return _without_head(host, number, "act_failed", drop=True)
    return _without_head(host, number, "commit_recorded")._replace(log="committed")


def _source_act(protocol: Protocol, world: World, number: int) -> World:
    host = world.source
    act = host.acts[number][0]
    answer = SOURCE_ANSWERS.get(act)
    if act == "record_commit":
        host = _commit_record(host, protocol.source_follow, "new", number)
        return _with(world, "source", host)
    host = _without_head(host, number, *((answer,) if answer else ()))
    if act == "freeze_and_dump":
        host = host._replace(tree=FROZEN)
    elif act == "release":
        host = host._replace(tree=NONE)
    elif act == "rollback":
        if host.tree == NONE:
            raise Violation("the source rolls back a tree that it has let die")
        if host.tree != GONE:
            host = host._replace(tree=RUNS)
        world = world._replace(source=host)
        return world._replace(down=(*world.down, "abort")) if world.up else world
    return _with(world, "source", host)


def _target_act(protocol: Protocol, world: World, number: int) -> World:
    host = world.target
    act = host.acts[number][0]
    answer = TARGET_ANSWERS.get(act)
    tree = host.tree
    if act == "record_commit":
        host = _commit_record(host, protocol.target_follow, "open", number)
        return _with(world, "target", host)
    if act == "restore":
        tree = HELD
    elif act == "resume":
        answer, tree = ("copy_lost", NONE) if tree == NONE else (answer, RUNS)
    elif act == "discard":
        if tree == RUNS:
            raise Violation("the target discards a running copy")
        if tree == HELD and world.source.log in COMMITTED_LOGS:
            raise Violation("the target discards the copy that the source has committed to")
        if tree == HELD and world.source.tree == GONE:
            raise Violation("the target discards the only copy that there is")
        tree = NONE
    elif act == "check_copy" and tree == NONE:
        answer = "copy_lost"
    host = _without_head(host, number, *((answer,) if answer else ()))
    return world._replace(target=host._replace(tree=tree))


def _sent(world: World) -> World:
    """The world after all messages that are next in line have gone out.

    Waiting to be sent is no different from being under way, so these steps need no orders of their
    own. TELL_* and ASK_* without a link do nothing (the link's return asks again); other acts that
    need the link fail.
    """
    for side, sends in (("source", SOURCE_SENDS), ("target", TARGET_SENDS)):
        number = 0
        while number < len(host_of(world, side).acts):
            host = host_of(world, side)
            act = host.acts[number][0]
            if act not in sends:
                number += 1
                continue
            message = sends[act]
            heard = world.first if message in ON_FIRST_ONLY else world.up
            if heard and side == "source":
                world = world._replace(down=(*world.down, message))
            elif heard:
                world = world._replace(back=(*world.back, message))
            if heard or act.startswith(("tell_", "ask_")):
                host = _without_head(host, number)
            else:
                host = _without_head(host, number, "act_failed", drop=True)
            world, number = _with(world, side, host), 0
    return world


def _failed_acts(protocol: Protocol, world: World) -> Iterator[tuple[str, World]]:
    """An act that reports a failure: without its effect, and (the worse one) with it."""
    for side, act_of in (("source", _source_act), ("target", _target_act)):
        host = host_of(world, side)
        for number, (act, *_) in enumerate(host.acts):
            if act not in MAY_FAIL:
                continue
            without = _without_head(host, number, "act_failed", drop=True)
            yield f"{side} fails {act}", _with(world, side, without)
            if act not in {"release", "rollback", "discard"}:
                done = act_of(protocol, world, number)
                after = host_of(done, side)
                after = _without_head(host, number, "act_failed", drop=True)._replace(
                    log=after.log, tree=after.tree
                )
                yield f"{side} does and fails {act}", _with(done, side, after)


def _faults(protocol: Protocol, world: World) -> Iterator[tuple[str, World]]:
    source, target = world.source, world.target
    if world.up and source.state != "new":
        cut = world._replace(up=False, first=False, down=(LOST,), back=(LOST,))
        yield "link breaks", cut
    else:
        cut = world
    if source.state != CRASHED:
        dead = Host(CRASHED, None, (), (), source.log, source.tree)
        yield "source crashes", cut._replace(source=dead, back=())
        if source.tree == FROZEN and source.log == "frozen" and target.state in HOLDING:
            yield "source loses power", cut._replace(source=dead._replace(tree=GONE), back=())
        if source.state in BEFORE_COMMIT | {"committed"}:
            # Before the commit the rows of all failures are the same: one stands for them.
            kind = "deadline_passed" if source.state == "committed" else "cancelled"
            told = source._replace(events=(*source.events, kind))
            yield f"source {kind}", world._replace(source=told)
    if target.state != CRASHED and target.log:
        dead = Host(CRASHED, None, (), (), target.log, target.tree)
        yield "target crashes", cut._replace(target=dead, down=())
        if target.tree == HELD:
            yield "target loses power", cut._replace(target=dead._replace(tree=NONE), down=())
    if target.state != CRASHED:
        if target.tree == HELD:
            told = target._replace(tree=NONE, events=(*target.events, "copy_lost"))
            yield "copy dies", world._replace(target=told)
        if target.state in {"restoring", "held", "committed"}:
            told = target._replace(events=(*target.events, "deadline_passed"))
            yield "target deadline_passed", world._replace(target=told)
    yield from _failed_acts(protocol, world)


def _restarted(host: Host, recovery: Rows, recorded: set[str], first: str) -> Host:
    log = host.log or first
    fresh = Host(log, None, (), (), host.log, host.tree)
    return _enter(fresh, recovery[log, "recovery"], recorded, log)


def _source_restarted(protocol: Protocol, host: Host) -> Host:
    is_gone = host.tree == GONE
    recovery = protocol.source_recovery_without_tree if is_gone else protocol.source_recovery
    return _restarted(host, recovery, protocol.source_recorded, "new")


def _repairs(protocol: Protocol, world: World) -> Iterator[tuple[str, World]]:
    """What happens sooner or later after a fault: restarts, reconnects, questions asked again."""
    source, target = world.source, world.target
    # Guard and holder may act or be dead too: the restart goes another way from the same world.
    if source.state == CRASHED:
        verdict = protocol.source_verdicts[source.log or "new"]
        if source.tree == FROZEN and verdict != "hold":
            tree = RUNS if verdict == "undo" else NONE
            yield f"guard: {verdict}", world._replace(source=source._replace(tree=tree))
        yield "source restarts", _with(world, "source", _source_restarted(protocol, source))
    if target.state == CRASHED:
        verdict = protocol.target_verdicts[target.log or "open"]
        if target.tree == HELD and verdict != "hold":
            tree = RUNS if verdict == "let_go" else NONE
            yield f"holder: {verdict}", world._replace(target=target._replace(tree=tree))
        host = _restarted(target, protocol.target_recovery, protocol.target_recorded, "open")
        yield "target restarts", _with(world, "target", host)
    if CRASHED in (source.state, target.state):
        return
    if not (world.up or world.down or world.back):
        # Both have noticed the loss. One that had not would notice it before anything new anyway.
        yield "link is back", world._replace(up=True, down=(BACK,), back=(BACK,))
    if not (source.is_quiet() and target.is_quiet()) or world.down or world.back:
        return
    # All is quiet. Timers ask again; acts that failed are tried again by the operator.
    for side, host in (("source", source), ("target", target)):
        if host.state in {"in_doubt", "lost"}:
            yield f"{side} asks again", _feed(protocol, world, side, "deadline_passed")
    if source.state in {"releasing", "rolling_back"}:
        again = _source_restarted(protocol, source)
        yield "operator recovers the source", _with(world, "source", again)
    if target.state in {"aborting", "committed", "running"}:
        host = _restarted(target, protocol.target_recovery, protocol.target_recorded, "open")
        yield "operator recovers the target", _with(world, "target", host)


def _agent_answers(protocol: Protocol, world: World) -> Iterator[tuple[str, World]]:
    """The source's agent tells a target in doubt what the journal says."""
    source, target = world.source, world.target
    if target.state != "in_doubt" or target.entering or target.acts or target.events:
        return
    kind = TARGET_MESSAGES[f"state:{source.log or 'new'}"]
    is_said = source.state == CRASHED or source.log in protocol.decided
    if is_said and kind != "source_undecided":
        told = world._replace(target=target._replace(events=(kind,)))
        yield f"source's agent: {source.log}", told


def _is_quiet_but_for_fill(world: World) -> bool:
    acts = all(acts == ("fill",) for acts in world.target.acts)
    return (
        acts
        and (world.source.is_quiet() and world.target._replace(acts=()).is_quiet())
        and not (world.down or world.back)
    )


def _source_moves(protocol: Protocol, world: World) -> Iterator[tuple[str, World]]:
    """Acts carried out, a record written, events taken, messages delivered on the source."""
    host = world.source
    for number, acts in enumerate(host.acts):
        yield f"source: {acts[0]}", _source_act(protocol, world, number)
    if host.entering:
        host = _recorded(host, protocol.source_follow, "new")
        yield f"source: record {host.log}", _with(world, "source", host)
    elif host.state != CRASHED:
        if host.events:
            rest = _with(world, "source", _without_event(host))
            yield f"source < {host.events[0]}", _feed(protocol, rest, "source", host.events[0])
        if world.back:
            kind = SOURCE_MESSAGES[world.back[0]]
            rest = world._replace(back=world.back[1:])
            yield f"source << {world.back[0]}", _feed(protocol, rest, "source", kind)


def _target_moves(protocol: Protocol, world: World) -> Iterator[tuple[str, World]]:
    """The same on the target."""
    host = world.target
    for number, acts in enumerate(host.acts):
        if acts[0] == "fill" and not _is_quiet_but_for_fill(world):
            continue  # it takes seconds, everything else milliseconds
        yield f"target: {acts[0]}", _target_act(protocol, world, number)
    if host.entering:
        host = _recorded(host, protocol.target_follow, "open")
        yield f"target: record {host.log}", _with(world, "target", host)
    elif host.state != CRASHED:
        if host.events:
            rest = _with(world, "target", _without_event(host))
            yield f"target < {host.events[0]}", _feed(protocol, rest, "target", host.events[0])
        if world.down:
            rest = world._replace(down=world.down[1:])
            message = world.down[0]
            if host.state != "open" or message == "open":
                rest = _feed(protocol, rest, "target", TARGET_MESSAGES[message])
            # else: there is no session that the message could be for
            yield f"target << {message}", rest


HOLDING = {"held", "in_doubt"}
BEFORE_COMMIT = frozenset(str(state) for state in source_machine.UNDOABLE)
COMMITTED_LOGS = frozenset({"committed", "releasing", "done"})


def check(protocol: Protocol, world: World) -> None:
    """The rules that hold in every world."""
    source, target = world.source, world.target
    if source.tree == RUNS and target.tree == RUNS:
        raise Violation("two copies run")
    if source.tree == NONE and target.tree != RUNS:
        raise Violation("the source has let its tree die and none runs on the target")
    if target.tree == RUNS and target.log not in {"committed", "running", "done"}:
        raise Violation("the target runs the copy without a recorded COMMIT")
    if target.tree == RUNS and source.log not in COMMITTED_LOGS:
        raise Violation("the target runs the copy and the source's journal has no commit")
    if source.state in BEFORE_COMMIT and source.log not in COMMITTED_LOGS:
        if protocol.source.get((source.state, "cancelled"), ("", ()))[0] != "rolling_back":
            raise Violation(f"the source cannot roll back in {source.state}")
        if protocol.source_recovery[source.log or "new", "recovery"][0] not in {
            "rolling_back",
            "aborted",
        }:
            raise Violation(f"a restart of the source in {source.state} does not roll back")


def settled(world: World) -> bool:
    """Exactly one copy runs, both sides know it, and nothing is under way."""
    source, target = world.source, world.target
    if not (source.is_quiet() and target.is_quiet()) or world.down or world.back:
        return False
    moved = (source.state, source.tree, target.state, target.tree) == ("done", NONE, "done", RUNS)
    # A source that went down with its tree, and a target that lost its copy too: nothing can run.
    tree_is_right = source.tree in (RUNS, GONE)
    stayed = source.state == "aborted" and tree_is_right and target.tree == NONE
    return moved or (stayed and target.state in {"open", "aborted"})


def steps(protocol: Protocol, world: World) -> list[tuple[str, World]]:
    """Every step that is no fault. Raises `Violation` for one that must not be possible."""
    return [
        (label, _sent(after))
        for some in (_source_moves, _target_moves, _agent_answers, _repairs)
        for label, after in some(protocol, world)
    ]


def faults(protocol: Protocol, world: World) -> list[tuple[str, World]]:
    """Every fault that can happen now, if the budget has any left."""
    if not world.faults:
        return []
    poorer = world._replace(faults=world.faults - 1)
    return [(label, _sent(after)) for label, after in _faults(protocol, poorer)]


class Search:
    """Every world that is reachable with at most `faults` faults, and the ways between them."""

    def __init__(self, protocol: Protocol, faults: int) -> None:
        self.protocol = protocol
        self.worlds = [START._replace(faults=faults)]
        self.numbers = {self.worlds[0]: 0}
        self.came_from = [(0, "")]
        """Number of a world -> the one it was first reached from, and by which step."""
        self.free_from: list[list[int]] = [[]]
        """Number of a world -> those from which a step that is no fault leads to it."""
        self.ends: list[World] = []
        """Worlds that no step but a fault leads out of."""

    def run(self) -> None:
        """Breadth first, so that the way to a violation is a shortest one. Raises `Violation`."""
        number = 0
        while number < len(self.worlds):
            world = self.worlds[number]
            try:
                check(self.protocol, world)
                free = steps(self.protocol, world)
            except Violation as violation:
                raise Violation(f"{violation}\n{self.way(number)}") from None
            if not free:
                self.ends.append(world)
            for label, after in free:
                self.free_from[self._number(after, number, label)].append(number)
            if world.faults:
                for label, after in faults(self.protocol, world):
                    self._number(after, number, label)
            number += 1

    def _number(self, world: World, before: int, label: str) -> int:
        number = self.numbers.setdefault(world, len(self.worlds))
        if number == len(self.worlds):
            if number == WORLD_LIMIT:
                raise Violation(f"more than {WORLD_LIMIT} worlds")
            self.worlds.append(world)
            self.came_from.append((before, label))
            self.free_from.append([])
        return number

    def way(self, number: int) -> str:
        """The steps from the start to a world, one a line, and the world itself."""
        labels: list[str] = []
        at = number
        while at:
            at, label = self.came_from[at]
            labels.append(label)
        return "\n".join([*reversed(labels), str(self.worlds[number])])

    def unsettleable(self) -> list[int]:
        """The worlds from which no way without a fault leads to a settled one."""
        good = [settled(world) for world in self.worlds]
        queue = deque(number for number, is_good in enumerate(good) if is_good)
        while queue:
            for before in self.free_from[queue.popleft()]:
                if not good[before]:
                    good[before] = True
                    queue.append(before)
        return [number for number, is_good in enumerate(good) if not is_good]
