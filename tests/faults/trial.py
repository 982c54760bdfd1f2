"""One point, carried out: a migration is begun and stopped at a moment, and somebody is killed.

What was killed is started again. Then everything has to come right by itself, or, where only an
operator can decide, by `migrate recover`.

What must hold in the end is in `_unsettled` (it becomes so) and `_faults_left` (it is so then).
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from typing import IO, Final

from bench.lab.errors import LabError
from bench.lab.host import Host
from bench.probe import Report
from bench.probe_process import ProbeError, ProbeProcess, start_probe
from migrate.errors import EXIT_DONE, EXIT_FAILED
from tests.faults import processes
from tests.faults.evidence import journal_of, unfinished
from tests.faults.outcome import Ended, Outcome
from tests.faults.points import Deed, Moment, Point, Victim, moment
from tests.faults.scene import ENVIRONMENT, SPEC, Scene, descriptors, tracers
from tests.faults.watch import Watch
from tests.lab.invariants import AGENT_LOG
from tests.lab.migrating import Migration, Underway, begin, remains
from tests.lab.waiting import wait_until

REACHED_DEADLINE_S: Final = 45.0
VICTIM_DEADLINE_S: Final = 10.0
# Longer than a container that stands still waits for its target (FROZEN_SILENCE_S).
SILENCE_S: Final = 7.0
# What recovers by itself has done so by then.
OPERATOR_AFTER_S: Final = 25.0
RECOVER_DEADLINE_S: Final = 40.0
# What the operator has had recovered is complete by then.
RECOVERED_AFTER_S: Final = 30.0
POLL_S: Final = 0.2
CLIENT_PER_S: Final = 200.0

# Holds the journal's lock until its input ends.
LOCK: Final = """
import sqlite3, sys
journal = sqlite3.connect("/var/lib/migrate/journal.sqlite", isolation_level=None)
journal.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


class Trial:
    """One point in a scene. `run` once."""

    def __init__(self, scene: Scene, point: Point) -> None:
        self.scene = scene
        self.point = point
        self.source = scene.source
        self.target = scene.target
        self.hosts = [self.source, self.target]
        self.underway: Underway
        self.probe: ProbeProcess
        self.watch = Watch(self.hosts, SPEC.name)
        self.migration = ""
        self.command: Migration | None = None
        self._descriptors: list[int] = []
        self._logs = {host.name: len(host.path(AGENT_LOG).read_bytes()) for host in self.hosts}
        self._cut_s: float | None = None
        self._lock: subprocess.Popen[str] | None = None
        self._stopped: int | None = None
        self._down: list[Host] = []
        self._operator = False
        self._fault_s = 0.0

    def run(self) -> Outcome:
        """Carry it out. What does not hold is in the outcome; only a broken lab raises."""
        begin_s = time.monotonic()
        self._fault_s = begin_s
        problems: list[str] = []
        report: Report | None = None
        self.probe = start_probe(
            "lines", SPEC.ip, SPEC.port, host=self.scene.lab.client, rate_per_s=CLIENT_PER_S
        )
        with self.probe, self.watch:
            self._descriptors = descriptors(self.source)
            self.underway = begin(
                self.source, SPEC.name, self.target.name, "--json", env=ENVIRONMENT
            )
            try:
                self._lead_there()
                self._strike()
                problems += self._settle()
                problems += self._faults_left() if self._has_ended() else []
            except (AssertionError, LabError, OSError) as error:
                problems.append(f"{type(error).__name__}: {error}"[:2000])
            finally:
                settled_s = time.monotonic() - self._fault_s
                self._put_right()
            executes_on = self.watch.executes_on()
            try:
                report = self.probe.stop()
            except ProbeError as error:
                problems.append(str(error))
        if report is not None and not report.clean:
            problems.append(f"the client: {report}"[:600])
        if twice := self.watch.twice():
            first, last = (window.end_s - self._fault_s for window in (twice[0], twice[-1]))
            problems.append(f"executed on both hosts at once, {first:.2f} s to {last:.2f} s later")
        assert self.command is not None
        return Outcome(
            point=str(self.point),
            side=self.point.moment.side,
            phase=self.point.phase,
            victim=str(self.point.victim),
            course=self.point.course.name,
            ended=self._ended(executes_on),
            operator=self._operator,
            idle_s=round(self.watch.idle_s(self._fault_s), 3),
            gap_s=round(report.gap_max_ms / 1000, 3) if report is not None else 0.0,
            settled_s=round(settled_s, 3),
            total_s=round(time.monotonic() - begin_s, 3),
            exit_code=self.command.code,
            problems=tuple(problems),
        )

    # ---- to the moment, and the fault ----

    def _lead_there(self) -> None:
        """The steps of the course; at the end the process stands at the point's moment."""
        moments = [moment(name) for name, _ in self.point.course.steps] + [self.point.moment]
        self.scene.arm(moments[0])
        for number, (_, deed) in enumerate(self.point.course.steps):
            self._wait(moments[number])
            self.scene.arm(moments[number + 1])
            self._do(deed)
            self.scene.let_go(moments[number])
            self._start_again()
        self._wait(moments[-1])

    def _wait(self, at: Moment) -> None:
        self.scene.wait_reached(at, REACHED_DEADLINE_S)
        if not self.migration:
            with journal_of(self.source) as journal:
                known = [one for one, _ in journal.unfinished() if one.role == "source"]
                ids = [one.migration_id for one in known]
                self.migration = ids[-1] if ids else ""

    def _strike(self) -> None:
        self._fault_s = time.monotonic()
        self._do(self.point.victim)
        self._unlock()
        self.scene.let_go(self.point.moment)
        if self.point.victim is Victim.LINK:
            self._wait_silence()
        self._mend()
        self._continue_pager()
        self._start_again()

    def _do(self, deed: Deed | Victim) -> None:
        match deed:
            case Victim.COORDINATOR:
                self.source.signal(self.underway.process, signal.SIGKILL)
            case Victim.AGENT | Victim.SOURCE_AGENT:
                host = self.target if deed is Victim.AGENT else self.source
                self.scene.lab.kill_agent(host.name)
                self._down.append(host)
            case Victim.FRONT:
                pid = processes.front(self.target)
                assert pid is not None, "there is no front"
                processes.send(pid, signal.SIGKILL)
            case Victim.LINK:
                self._cut_s = time.monotonic()
                self.scene.set_link(up=False)
            case Victim.CONNECTIONS:
                count = self.scene.lab.reset_connections(self.source.name, self.target.name)
                assert count, "there was no connection to reset"
            case Deed.MEND_LINK:
                self._mend()
            case Deed.INTERRUPT:
                self.underway.interrupt()
            case Deed.LOCK_JOURNAL:
                self._lock = self.target.popen(
                    ["python3", "-c", LOCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
                _stream(self._lock.stdout).readline()
            case Deed.STOP_PAGER:
                self._stopped = self._find(Victim.PAGER_WORKER)
                processes.send(self._stopped, signal.SIGSTOP)
            case Victim():
                processes.send(self._find(deed), signal.SIGKILL)

    def _find(self, victim: Victim) -> int:
        """Waits for it: what the other side starts may take its time."""
        found: list[int] = []

        def there() -> bool:
            pid = processes.find(self.source, victim, self.migration) or processes.find(
                self.target, victim, self.migration
            )
            found[:] = [pid] if pid else []
            return bool(found)

        wait_until(f"there is a {victim}", there, deadline_s=VICTIM_DEADLINE_S)
        return found[0]

    # ---- what was done is undone ----

    def _wait_silence(self) -> None:
        """As long as a link is silent; no longer than the migration lasts."""
        end_s = time.monotonic() + SILENCE_S
        while time.monotonic() < end_s and not self._has_ended():
            time.sleep(POLL_S)

    def _mend(self) -> None:
        if self._cut_s is not None:
            self._cut_s = None
            self.scene.set_link(up=True)

    def _unlock(self) -> None:
        if self._lock is not None:
            lock, self._lock = self._lock, None
            with lock:
                _stream(lock.stdin).close()

    def _continue_pager(self) -> None:
        if self._stopped is not None:
            processes.send(self._stopped, signal.SIGCONT)
            self._stopped = None

    def _start_again(self) -> None:
        while self._down:
            self.scene.start_agent(self._down.pop())

    def _put_right(self) -> None:
        """Nothing of this point is left to disturb the next one."""
        for name, _ in self.point.course.steps:
            self.scene.disarm(moment(name))
        self.scene.disarm(self.point.moment)
        self._unlock()
        self._mend()
        self._continue_pager()
        if not self._has_ended():
            self.underway.kill()
            wait_until("`migrate` is dead", self._has_ended)

    def _has_ended(self) -> bool:
        """Whether the command has ended; then it leaves its report to us."""
        if self.command is None and self.underway.process.poll() is not None:
            self.command = self.underway.finish()
        return self.command is not None

    # ---- what must come right ----

    def _settle(self) -> list[str]:
        """Waits until nothing is left to do; an operator helps if it does not end by itself."""
        limit_s = time.monotonic() + OPERATOR_AFTER_S
        while problems := self._unsettled():
            if time.monotonic() > limit_s:
                if self._operator:
                    return problems
                self._operator = True
                told = self._recover()
                if told:
                    return [*problems, *told]
                limit_s = time.monotonic() + RECOVERED_AFTER_S
            time.sleep(POLL_S)
        return []

    def _unsettled(self) -> list[str]:
        """What is not as it has to be at the end, the cheapest to find first."""
        if not self._has_ended():
            return ["`migrate` has not ended"]
        hosts = self.watch.executes_on()
        if len(hosts) != 1:
            return [f"it executes on {hosts or 'no host'}"]
        self.scene.is_now_on(self.scene.lab.host(hosts[0]))
        asked: list[str] = []
        for host in self.hosts:
            asked += [f"the journal of {host.name}: {line}" for line in unfinished(host)]
        # Looking at everything on a host costs it more than a recovery does.
        return asked or [
            f"left on {host.name}: {line}"
            for host in self.hosts
            for line in remains(host, *([SPEC.name] if host.name == hosts[0] else []))
        ]

    def _recover(self) -> list[str]:
        """What an operator does: look on either host, and have it recovered."""
        problems: list[str] = []
        for host in self.hosts:
            open_questions = unfinished(host)
            status = host.run(["migrate", "status"], env=ENVIRONMENT, check=False, timeout_s=30)
            if open_questions and SPEC.name not in status.stdout:
                problems.append(f"`migrate status` on {host.name} does not show it: {status}")
        for host in self.hosts:
            done = host.run(
                ["migrate", "recover"],
                env=ENVIRONMENT,
                check=False,
                timeout_s=RECOVER_DEADLINE_S,
            )
            if done.returncode:
                problems.append(f"`migrate recover` on {host.name}: {done.stdout}{done.stderr}")
        return problems

    def _faults_left(self) -> list[str]:
        """What is wrong with a container that runs again."""
        problems = []
        assert self.command is not None
        guest, here = self.scene.guest, self.scene.source
        if not self.probe.alive():
            problems.append("the client's connection broke")
        else:
            guest.wait_answers()
        guest.verify()
        # The questions above were asked over connections that the server has yet to close.
        with contextlib.suppress(AssertionError):
            wait_until("they are closed", lambda: descriptors(here) == self._descriptors)
        if (found := descriptors(here)) != self._descriptors:
            problems.append(f"its tasks have {found} descriptors, not {self._descriptors}")
        if (found_tracers := tracers(here)) != {"0"}:
            problems.append(f"its tasks are traced by {found_tracers}")
        for host in self.hosts:
            log = host.path(AGENT_LOG).read_bytes()[self._logs[host.name] :].decode()
            if "Traceback" in log:
                problems.append(f"the agent of {host.name}: {log[log.index('Traceback') :][:1500]}")
        if "Traceback" in self.command.stderr:
            problems.append(f"`migrate`: {self.command.stderr[:1500]}")
        code, moved = self.command.code, here is self.target
        if (code == EXIT_DONE and not moved) or (code == EXIT_FAILED and moved):
            problems.append(f"`migrate` ended with {code}, and it executes on {here.name}")
        return problems

    def _ended(self, executes_on: list[str]) -> Ended:
        if executes_on == [self.source.name]:
            return "source"
        return "target" if executes_on == [self.target.name] else "nowhere"


def _stream(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
