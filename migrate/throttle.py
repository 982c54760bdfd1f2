"""The coordinator's side of a slowed container: pulls its brake, and sees to it that it is let go.

    slow     the plan goes to the journal, then a keeper (`throttle_keeper.py`) pulls the brake
    paused   the container runs freely: who stops its tasks must not meet a pulse
    stilled  within `paused`: it stands still, for a dirty tracker that needs that (`may_still`)
    lift     as it was before; ahead of the freeze, and in a rollback

Two processes hold a brake, this one and the keeper; either lets go of it when the other is gone. So
it is with a container that stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING, Final

import msgspec

from migrate import config
from migrate.brakes import BrakePlan, put_back
from migrate.core.throttling import quota, quota_cpus
from migrate.errors import MigrateError
from migrate.processes import Outliving, module_command, waited
from migrate.throttle_keeper import DONE

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

ANSWER_DEADLINE_S: Final = 5.0
"""The keeper answers in less than a millisecond, if it comes to it."""
_ANSWER_BYTES: Final = 4096


class Throttle:
    """The brake of one container, in one event loop. `note` writes a plan into the journal.

    The container must run freely when this is made: the processor time that it uses from then on is
    what shares are shares of.
    """

    def __init__(
        self,
        cgroup: Path,
        session: Path,
        note: Callable[[BrakePlan], Awaitable[None]],
        warn: Callable[[str], None],
        *,
        answer_deadline_s: float = ANSWER_DEADLINE_S,
    ) -> None:
        self._cgroup = cgroup
        self._session = session
        self._note = note
        self._warn = warn
        self._answer_deadline_s = answer_deadline_s
        self._made_s, self._used_s = time.monotonic(), used_s(cgroup)
        self._cpus = 0.0
        self._plan: BrakePlan | None = None
        self._watches: list[asyncio.Task[None]] = []
        # The rest is for whoever has the lock: rounds are collected in threads.
        self._lock = threading.Lock()
        self._keeper: _Keeper | None = None
        self._pulled: BrakePlan | None = None
        self._is_over = False
        self.stills_ms: list[float] = []
        """How long the container has stood still, each time; the report has it."""

    async def slow(self, share: float) -> str:
        """Leave the container so much of its processor time; the name of what does it. Raises
        MigrateError: then it runs freely."""
        plan = await asyncio.to_thread(self._plan_for, share)
        await self._hold(plan)
        return plan.name

    async def may_still(self) -> None:
        """From now on `stilled` may be entered: who lets go of it is there. Raises MigrateError."""
        plan = await asyncio.to_thread(self._first_plan)
        await self._hold(msgspec.structs.replace(plan, stills=True))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the container runs freely. Blocking, for any thread, one at a time. Raises
        MigrateError."""
        with self._lock:
            keeper = self._keeper
            if keeper is not None and keeper.ask(b"pause") != DONE:
                self._let_go()
        try:
            yield
        finally:
            with self._lock:
                # Unless it was lifted meanwhile.
                is_held = keeper is not None and keeper is self._keeper
                if is_held and keeper is not None and keeper.ask(b"go on") != DONE:
                    self._let_go()

    @contextlib.contextmanager
    def stilled(self) -> Iterator[None]:
        """Within it the container stands still, every task of it. As `paused`, within which it has
        to be. Raises MigrateError, also when the container may have run meanwhile."""
        started_s = time.monotonic()
        with self._lock:
            keeper = self._keeper
            self._ask_still(keeper, b"still")
        try:
            yield
        finally:
            with self._lock:
                # If it was lifted meanwhile, or its keeper was killed, the container has run.
                self._ask_still(keeper if keeper is self._keeper else None, b"run")
            self.stills_ms.append((time.monotonic() - started_s) * 1000)

    async def lift(self) -> None:
        """Have the container run as before, for good. Idempotent. Raises MigrateError."""
        await asyncio.to_thread(self._lift)

    async def close(self) -> None:
        """Lift it, and wait for the end of its keeper. Raises MigrateError."""
        await self.lift()
        await asyncio.gather(*self._watches)

    async def _hold(self, plan: BrakePlan) -> None:
        # Before the act: whoever comes after a crash must know what to put back.
        await self._note(plan)
        self._plan = plan
        started = await asyncio.to_thread(self._start)
        if started is not None:
            self._watches.append(asyncio.create_task(self._watch(started)))
        await asyncio.to_thread(self._pull, plan)

    def _ask_still(self, keeper: _Keeper | None, word: bytes) -> None:
        answer = "nobody would let go of it" if keeper is None else keeper.ask(word)
        if answer != DONE:
            self._let_go()
            raise MigrateError(
                f"the container does not stand still while its tasks are looked at: {answer}",
                remedy="try again; --tracker none does without",
            )

    def _first_plan(self) -> BrakePlan:
        return BrakePlan(str(self._cgroup), _cpu_max(self._cgroup))

    def _plan_for(self, share: float) -> BrakePlan:
        """The plan, with what is to be done now as its last word."""
        if self._plan is None:
            self._plan = self._first_plan()
        if not self._plan.words:
            before = self._plan.cpu_max
            used = (used_s(self._cgroup) - self._used_s) / (time.monotonic() - self._made_s)
            allowed = quota_cpus(before) if before else None
            self._cpus = used if allowed is None else min(used, allowed)
        word = quota(share, self._cpus) if self._plan.cpu_max else f"{share:.4f}"
        return msgspec.structs.replace(self._plan, words=(*self._plan.words, word))

    def _start(self) -> _Keeper | None:
        """A keeper, if there is none."""
        with self._lock:
            if self._is_over or self._keeper is not None:
                return None
            self._keeper = _Keeper(self._session, self._answer_deadline_s)
            return self._keeper

    def _pull(self, plan: BrakePlan) -> None:
        with self._lock:
            if self._keeper is None:
                raise MigrateError("the container can't be held back: nobody holds its brake")
            self._pulled = plan
            answer = self._keeper.ask(msgspec.json.encode(plan))
            if answer != DONE:
                self._let_go()
                raise MigrateError(f"the container can't be held back by {plan.name}: {answer}")

    async def _watch(self, keeper: _Keeper) -> None:
        """Let go of what a keeper has left that was killed."""
        await keeper.process.wait()
        if await asyncio.to_thread(self._lost, keeper):
            self._warn("what holds the container back has ended: it runs freely")

    def _lost(self, keeper: _Keeper) -> bool:
        with self._lock:
            if self._keeper is not keeper:
                return False
            self._let_go()
        return True

    def _lift(self) -> None:
        with self._lock:
            self._is_over = True
            self._let_go()

    def _let_go(self) -> None:
        if self._keeper is not None:
            self._keeper.end()
            self._keeper = None
        if self._pulled is not None:
            try:
                # The keeper has done so, unless it was killed.
                put_back(self._pulled)
            except OSError as error:
                raise MigrateError(
                    f"the container can't be given its processor time back: {error}",
                    remedy=self._pulled.remedy,
                ) from error
            self._pulled = None


class _Keeper:
    """The keeper as a process. Everything blocks."""

    def __init__(self, session: Path, answer_deadline_s: float) -> None:
        self._answer_deadline_s = answer_deadline_s
        self._has_begun = False
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(config.PREPARE_DEADLINE_S)
        with theirs:
            self.process = Outliving(
                module_command("migrate.throttle_keeper", str(session)),
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=None,
            )

    def ask(self, line: bytes) -> str:
        """Say a line; the answer, or why there is none."""
        try:
            if not self._has_begun and self._hear() == DONE:
                self._has_begun = True
                self._socket.settimeout(self._answer_deadline_s)
            self._socket.sendall(line + b"\n")
            return self._hear() or "its keeper has ended"
        except OSError as error:
            return f"its keeper does not answer: {error}"

    def _hear(self) -> str:
        return self._socket.recv(_ANSWER_BYTES).decode(errors="replace").strip()

    def end(self) -> None:
        """Have it let go; returns when it does nothing more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        try:
            while self._socket.recv(_ANSWER_BYTES):
                pass
        except OSError:
            self.process.kill()
            waited(lambda: self.process.returncode is not None, ANSWER_DEADLINE_S)
        self._socket.close()


def _cpu_max(cgroup: Path) -> str:
    """What cpu.max holds; "" where there is none, or none that may be lowered."""
    try:
        held = (cgroup / "cpu.max").read_text().strip()
        burst = (cgroup / "cpu.max.burst").read_text().strip()
    except OSError:
        return ""
    # The kernel refuses a quota below the burst (kernel/sched/core.c: tg_set_cfs_bandwidth).
    return held if burst == "0" else ""


def used_s(cgroup: Path) -> float:
    """Processor time that the container's tasks have had, 0 of one that has ended; cpu.stat has it
    without the controller too."""
    try:
        words = (cgroup / "cpu.stat").read_text().split()
    except OSError:
        return 0.0
    return int(words[words.index("usage_usec") + 1]) / 1e6
