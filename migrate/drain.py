"""The process that empties this host, or brings home what it has sent away.

    python -m migrate.drain ID ORDER     ORDER: `messages.Drain` as JSON

The agent begins it (`agent/drains.py`), in a session of its own: it outlives the agent, and whoever
asked for it. It plans by `core/drain_plan.py`, writes down each act before it (`drain_state.py`),
and looks after the moves, which are commands of their own (`drain_moves.py`), or those of the hosts
that give back (`drain_others.py`). SIGTERM: it begins nothing more, and ends when what is under way
has ended. One that is killed is gone on with by `drain-node --resume`, which waits for its moves
first.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Literal

import msgspec
import structlog

from criu_glue.no_core import forbid_cores
from migrate import config, cordon, drain_hooks, drain_state, drain_survey, policy
from migrate.claim import Claim
from migrate.core import messages
from migrate.core.drain_facts import RATE_BYTES_S, STOP_S, HostState, Resident
from migrate.core.drain_plan import LEFT, Limits, Outcome, Planner, forecast
from migrate.drain_moves import Look, Moves
from migrate.drain_others import DrainRefusedError, Others
from migrate.drain_report import exit_code
from migrate.errors import EXIT_FAILED, MigrateError
from migrate.host_checks import raise_descriptor_limit
from migrate.logs import log_to_stderr
from migrate.moving import new_migration_id
from migrate.runtimes import known

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from migrate.config import HostPaths
    from migrate.core.drain_facts import Move
    from migrate.preflight import SourceCheck
    from migrate.runtimes.base import Runtime

log = structlog.get_logger()

# How often moves are looked at.
LOOK_S: Final = 0.3
# Rounds of a dry run, in each of which targets have refused something.
DRY_ROUNDS_MAX: Final = 8
CANCELLED: Final = "the drain was cancelled"


class Drain:
    """One drain, from its order to its end. In one event loop."""

    def __init__(
        self,
        paths: HostPaths,
        runtimes: Mapping[str, Runtime],
        drain_id: str,
        order: messages.Drain,
    ) -> None:
        self._paths = paths
        self._runtimes = runtimes
        self._order = order
        self._host = socket.gethostname()
        self._own = Moves(paths)
        self._others = Others(paths)
        # By migration: what has to be before it begins, and then "moving".
        self._beginnings: dict[str, asyncio.Task[Look]] = {}
        # By container: what is asked when it has arrived.
        self._checks: dict[str, asyncio.Task[None]] = {}
        # Containers that have failed their checks.
        self._coming_back: set[str] = set()
        self._stopped = False
        self._moves: dict[str, messages.DrainMove] = {}
        self._state = messages.Drained(
            self._host, drain_id, order, "planning", began_wall_s=time.time()
        )

    @property
    def _empties(self) -> bool:
        """Whether this host is emptied, or brought home to."""
        return self._order.act != "home"

    def stop(self) -> None:
        """Begin nothing more."""
        self._stopped = True

    async def run(self) -> None:
        """To its end, which is in its file. Raises JournalError."""
        former = drain_state.read(self._paths)
        self._moves = {
            one.container: one for one in former.moves if one.state in ("arrived", "moving", "held")
        }
        was_cordoned = cordon.read(self._paths) is not None
        self._save()
        try:
            if self._order.act == "home":
                await self._settle(former.asked.act)
                await self._bring_home()
            elif self._order.dry_run:
                await self._forecast()
            else:
                if not was_cordoned:
                    cordon.put(self._paths, cordon.Cordon(self._state.drain_id))
                await self._settle(former.asked.act)
                await self._empty()
            self._end(exit_code(self._moves.values(), empties=self._empties))
        except DrainRefusedError as error:
            if not was_cordoned and self._order.act != "home":
                cordon.lift(self._paths)
            self._end(error.exit_code, str(error))
        except MigrateError as error:
            self._end(EXIT_FAILED, str(error))

    # ---- three kinds ----

    async def _empty(self) -> None:
        hosts = await self._others.targets(self._order.to)
        residents, _ = await asyncio.to_thread(self._residents)
        self._moves = {
            name: one
            for name, one in self._moves.items()
            if name not in {one.name for one in residents} or one.state in ("held", "stays")
        }
        while new := [one for one in residents if one.name not in self._moves]:
            self._list(new)
            await self._drive(Planner(hosts, new, self._limits(), now_s=self._now_s()))
            # What was on its way here when the host was cordoned has come meanwhile.
            hosts = await asyncio.gather(*(self._others.describe(one.name) for one in hosts))
            residents, _ = await asyncio.to_thread(self._residents)

    async def _bring_home(self) -> None:
        cordon.lift(self._paths)
        away = [one for one in self._moves.values() if one.state == "arrived"]
        rules = policy.load(self._paths.policy)
        here = await asyncio.to_thread(drain_survey.describe, self._paths, self._runtimes, rules)
        # What only the hosts that have them know is judged by the moves themselves.
        told = drain_survey.host_state(here)
        home = HostState(told.name, told.free_bytes, told.free_cpus, closed=told.closed)
        residents = [
            Resident(one.container, one.target, one.memory_bytes, one.memory_bytes) for one in away
        ]
        await self._drive(Planner([home], residents, self._limits(), now_s=self._now_s()))

    async def _forecast(self) -> None:
        hosts = await self._others.targets(self._order.to)
        residents, checks = await asyncio.to_thread(self._residents)
        self._moves = {}
        self._list(residents)
        refused: dict[tuple[str, str], str] = {}
        asked: set[tuple[str, str]] = set()
        for _ in range(DRY_ROUNDS_MAX):
            planner = Planner(hosts, residents, self._limits(), refused=refused)
            plan = forecast(planner)
            new = {(one.move.container, one.move.target) for one in plan if one.move.target}
            answers = await self._others.refusals(sorted(new - asked), checks)
            asked |= new
            refused.update(answers)
            if not answers:
                break
        for one in plan:
            self._change(
                one.move.container,
                target=one.move.target,
                begin_s=one.begin_s,
                predicted_s=one.move.seconds,
                predicted_downtime_ms=_finite(one.move.downtime_ms),
            )
        self._note_stays(planner)

    # ---- the loop ----

    async def _drive(self, planner: Planner) -> None:
        """Moves begin and end until nothing is left to begin."""
        self._state = msgspec.structs.replace(self._state, phase="moving")
        self._note_stays(planner)
        begun_s: dict[str, float] = {}
        while not planner.is_over or self._checks:
            if self._stopped:
                planner.stop(CANCELLED)
            for move in planner.next_moves(self._now_s()):
                begun_s[move.container] = self._now_s()
                self._begin(move)
            self._note_stays(planner)
            await asyncio.sleep(LOOK_S)
            under_way = list(planner.under_way.items())
            # At once: a host that does not answer is waited for some seconds.
            looks = await asyncio.gather(*(self._look(move) for _, move in under_way))
            for (name, move), look in zip(under_way, looks, strict=True):
                if look.state != "moving":
                    await self._ended(move, look, planner, self._now_s() - begun_s[name])
            for name in [name for name, task in self._checks.items() if task.done()]:
                await self._checks.pop(name)
            self._note_stays(planner)

    def _begin(self, move: Move) -> None:
        migration_id = new_migration_id()
        self._change(
            move.container,
            state="moving",
            target=move.target if move.source == self._host else move.source,
            migration_id=migration_id,
            begin_s=self._now_s(),
            predicted_s=move.seconds,
            predicted_downtime_ms=_finite(move.downtime_ms),
            why="",
        )
        if move.source == self._host:
            beginning = self._begin_here(move, migration_id)
            self._beginnings[migration_id] = asyncio.create_task(beginning)

    async def _begin_here(self, move: Move, migration_id: str) -> Look:
        """Beside the others: an operator's program takes its time, a container that ends too."""
        if not move.target:
            await asyncio.to_thread(self._end_container, move.container)
            return Look("arrived")
        hooks, about = self._paths.drain_hooks, (move.container, move.source, move.target)
        why = await asyncio.to_thread(drain_hooks.ask, hooks, "before", *about)
        if why or self._stopped:
            return Look("undone", why or CANCELLED)
        options = [word for path in self._order.shared for word in ("--shared", path)]
        if move.policy == "stop-and-copy":
            options += ["--tracker", "none"]
        named = (migration_id, move.container, move.target, self._share_mib_s)
        await asyncio.to_thread(self._own.begin, *named, options)
        return Look("moving")

    async def _look(self, move: Move) -> Look:
        migration_id = self._moves[move.container].migration_id
        if move.source != self._host:
            return await self._ask_back(move.container, migration_id, move.source)
        beginning = self._beginnings[migration_id]
        if not beginning.done():
            return Look("moving")
        try:
            begun = beginning.result()
        except (MigrateError, OSError) as error:
            return Look("undone", str(error))
        if begun.state != "moving":
            return begun
        return await asyncio.to_thread(self._own.look, migration_id, self._share_mib_s)

    async def _ask_back(self, container: str, migration_id: str, host: str) -> Look:
        word = messages.GiveBack(migration_id, container, self._share_mib_s)
        return await self._others.give_back(word, host)

    async def _ended(self, move: Move, look: Look, planner: Planner, seconds: float) -> None:
        name = move.container
        self._change(name, seconds=round(seconds, 3), downtime_ms=look.downtime_ms)
        target = move.target if move.target != self._host else ""
        told = await self._others.describe(target) if target else None
        closed = told.closed if told is not None else ""
        if closed:
            planner.lose(target, closed)
        match look.state:
            case "arrived":
                planner.ended(name, Outcome.ARRIVED, seconds=seconds, copied_s=look.copied_s)
                if self._empties and target:
                    self._begin_check(name, target)
                else:
                    self._change(name, state="stopped" if self._empties else "home", why="")
            case "held":
                self._change(name, state="held", why=look.why)
                planner.ended(name, Outcome.HELD, why=look.why)
            case _:
                self._change(name, state="waiting" if self._empties else "arrived", why=look.why)
                outcome = Outcome.TARGET_LOST if closed else Outcome.UNDONE
                planner.ended(name, outcome, why=look.why)
        # Behind the end: of a target that something is under way to, what is free is not counted.
        # What has failed there may not have given back its room yet.
        if told is not None and not closed and look.state == "arrived":
            planner.see(told)

    def _begin_check(self, name: str, target: str) -> None:
        """Beside the moves, which go on meanwhile."""
        self._checks[name] = asyncio.create_task(self._check(name, target))

    async def _check(self, name: str, target: str) -> None:
        """What the operator's programs say of a container that has arrived. Until then it is not
        said to have: a drain that is gone on with asks them."""
        about = (name, self._host, target)
        why = await asyncio.to_thread(drain_hooks.ask, self._paths.drain_hooks, "after", *about)
        self._change(name, state="arrived", why=why)
        if not why or not self._order.move_back:
            return
        migration_id = new_migration_id()
        cordon.expect(self._paths, migration_id)
        self._coming_back.add(name)
        while True:
            look = await self._ask_back(name, migration_id, target)
            if look.state != "moving":
                break
            await asyncio.sleep(LOOK_S)
        self._coming_back.remove(name)
        if look.state == "arrived":
            self._change(name, state="stays", target="", why=f"{why}; moved back")
        else:
            self._change(name, why=f"{why}; and it did not come back: {look.why}")

    async def _settle(self, former_act: str) -> None:
        """What a former process of this host's drains has begun has to end first."""
        for one in [one for one in self._moves.values() if one.state in ("moving", "held")]:
            look = Look("moving")
            while look.state == "moving":
                if former_act == "home":
                    look = await self._ask_back(one.container, one.migration_id, one.target)
                else:
                    look = await asyncio.to_thread(self._own.look, one.migration_id)
                await asyncio.sleep(LOOK_S)
            if look.state == "held":
                self._change(one.container, state="held", why=look.why)
            elif (look.state == "arrived") is (former_act == "home"):
                # It is here.
                del self._moves[one.container]
            else:
                self._change(one.container, state="arrived", why="")
                if self._empties:
                    self._begin_check(one.container, one.target)
        # One that is brought back is here again when this host's containers are looked at.
        for name in list(self._checks):
            await self._checks.pop(name)

    # ---- hosts and containers ----

    def _residents(self) -> tuple[list[Resident], dict[str, SourceCheck]]:
        allowed = drain_survey.may_send(policy.load(self._paths.policy), self._order.to)
        return drain_survey.residents(self._paths, self._runtimes, allowed, self._order.shared)

    def _end_container(self, name: str) -> None:
        """A container whose policy is to stop: asked to end, and ended when it does not."""
        runtime = known.having(name)
        with suppress(ProcessLookupError):
            os.kill(runtime.inspect(name).pid, signal.SIGTERM)
        limit_s = time.monotonic() + STOP_S
        while runtime.state(name) == "running" and time.monotonic() < limit_s:
            time.sleep(LOOK_S)
        runtime.kill(name)

    # ---- what is written down ----

    @property
    def _share_mib_s(self) -> float | None:
        """Of each move that is under way now; together they have all of the drain's bandwidth."""
        mib_s = self._order.bandwidth_mib_s
        if mib_s is None:
            return None
        moving = sum(
            one.state == "moving" and bool(one.target) and one.container not in self._checks
            for one in self._moves.values()
        )
        number = max(moving + len(self._coming_back), 1)
        return max(mib_s / number, config.BANDWIDTH_MIB_S_MIN)

    def _limits(self) -> Limits:
        parallel = self._order.parallel
        deadline_s = self._order.deadline_s
        share_mib_s = (self._order.bandwidth_mib_s or float("inf")) / parallel
        rate_bytes_s = min(RATE_BYTES_S, share_mib_s * (1 << 20))
        return Limits(parallel, parallel, deadline_s or float("inf"), rate_bytes_s)

    def _now_s(self) -> float:
        """Since the drain began; the wall's clock, since another process may go on with it."""
        return time.time() - self._state.began_wall_s

    def _list(self, residents: Sequence[Resident]) -> None:
        for one in residents:
            self._moves[one.name] = messages.DrainMove(
                one.name, one.runtime, one.memory_bytes, "waiting"
            )

    def _note_stays(self, planner: Planner) -> None:
        """Those that will not move; in an undrain they stay where they had arrived."""
        for name, why in planner.stays.items():
            move = self._moves[name]
            if move.state == "waiting":
                state: Literal["left", "stays"] = "left" if why == LEFT else "stays"
                self._moves[name] = msgspec.structs.replace(move, state=state, why=why)
            elif move.state == "arrived" and not self._empties:
                self._moves[name] = msgspec.structs.replace(move, why=why)
        self._save()

    def _change(self, name: str, **fields: object) -> None:
        self._moves[name] = msgspec.structs.replace(self._moves[name], **fields)
        self._save()

    def _save(self) -> None:
        moves = tuple(self._moves.values())
        self._state = msgspec.structs.replace(self._state, moves=moves)
        drain_state.write(self._paths, self._state)

    def _end(self, code: int, why: str = "") -> None:
        self._state = msgspec.structs.replace(
            self._state, phase="ended", exit_code=code, why=why[: messages.MAX_TEXT]
        )
        self._save()
        log.info("drain ended", drain=self._state.drain_id, code=code, why=why)


def _finite(downtime_ms: float) -> float | None:
    return round(downtime_ms, 1) if downtime_ms < float("inf") else None


async def _run(paths: HostPaths, drain_id: str, order: messages.Drain) -> None:
    drain = Drain(paths, known.drivers(), drain_id, order)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, drain.stop)
    await drain.run()


def main() -> None:
    """See the module."""
    forbid_cores()
    raise_descriptor_limit()
    log_to_stderr(logging.INFO)
    paths, (drain_id, order) = config.HostPaths(), sys.argv[1:]
    with Claim.take(paths.drain_claim, "drain"):
        asyncio.run(_run(paths, drain_id, msgspec.json.decode(order, type=messages.Drain)))


if __name__ == "__main__":
    main()
