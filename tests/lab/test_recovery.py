"""What an operator does when a migration does not end by itself: status, log, cancel and recover,
where commands die, the link is cut, or a host loses power."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from bench.lab.host import Host
from bench.lab.host_files import FLEET, OPERATOR
from bench.probe_process import ProbeProcess, start_probe
from tests.faults.evidence import journal_of, unfinished
from tests.faults.points import moment
from tests.faults.scene import ENVIRONMENT, SPEC, Scene
from tests.faults.watch import Watch
from tests.lab.invariants import AGENT_LOG
from tests.lab.migrating import Migration, Underway, begin, wait_clean
from tests.lab.waiting import wait_until

REACHED_DEADLINE_S = 60.0
# A peer that is silent is connected to twice, and the agent of this host may be at it as well.
COMMAND_DEADLINE_S = 90.0
RATE_PER_S = 200.0

COPYING = "source.run_round.before"
FROZEN = "source.send_final.before"
# The target holds a copy; the source has not decided yet.
HELD = "source.record_commit.before"
# The source has, and not told the target.
COMMITTED = "source.send_commit.before"
# The target has heard it, and written it down.
RESUMING = "target.resume.before"


class Stage:
    """A scene with a migration that stands at a moment, from `here` to `there`.

    The container stays where a test has led it; the next one migrates it from there.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.here = scene.source
        self.there = scene.target
        self.hosts = [self.here, self.there]
        self.watch = Watch(self.hosts, SPEC.name)
        self.migration = ""
        self.is_settled = False
        self._underway: Underway | None = None
        self._logs = {host.name: len(host.path(AGENT_LOG).read_bytes()) for host in self.hosts}

    def begin_until(self, name: str, *options: str) -> None:
        """Begins to migrate; returns when a process stands there."""
        self.scene.arm(moment(name))
        options = ("--json", *options)
        self._underway = begin(self.here, SPEC.name, self.there.name, *options, env=ENVIRONMENT)
        self.scene.wait_reached(moment(name), REACHED_DEADLINE_S)
        wait_until("its journal knows it", self._is_known)

    def _is_known(self) -> bool:
        with journal_of(self.here) as journal:
            for one, _ in journal.unfinished():
                self.migration = one.migration_id
        return bool(self.migration)

    def go_on(self, former: str, name: str = "") -> None:
        """From one moment, and until another."""
        if name:
            self.scene.arm(moment(name))
        self.scene.let_go(moment(former))
        if name:
            self.scene.wait_reached(moment(name), REACHED_DEADLINE_S)

    def finish_command(self) -> Migration:
        assert self._underway is not None
        underway, self._underway = self._underway, None
        return underway.finish()

    def kill_command(self, at: str) -> None:
        """It dies at the moment where it stands, or where it waits for what stands there."""
        assert self._underway is not None
        self._underway.kill()
        self.finish_command()
        if at.startswith("source"):
            self.scene.disarm(moment(at))

    def boot(self, host: Host) -> None:
        """It starts again with what is on its disks, and so does its agent."""
        self.scene.lab.boot(host.name)
        self.scene.start_agent(host)

    def executes(self, *hosts: Host) -> None:
        """It does on these, and on no other."""
        names = sorted(host.name for host in hosts)
        wait_until(f"it executes on {names}", lambda: self.watch.executes_on() == names)

    def settle(self, *, on: Host | None) -> None:
        """Returns when it executes where it must, and neither host is left with a question or a
        thing of the migration; it has never executed on both."""
        self.executes(*([on] if on else []))
        for host in self.hosts:
            wait_until(f"{host.name} has ended it", partial(self._has_ended, host))
            # Of a container that has gone with its host the files stay.
            wait_clean(host, *([SPEC.name] if host is (on or self.here) else []))
            log = host.path(AGENT_LOG).read_bytes()[self._logs[host.name] :].decode()
            assert "Traceback" not in log, log
        if on is not None:
            self.scene.guest.verify()
            self.scene.is_now_on(on)
        assert self.watch.twice() == []
        self.is_settled = on is not None

    def close(self) -> None:
        if self._underway is not None:
            self._underway.kill()
            self._underway.finish()

    @staticmethod
    def _has_ended(host: Host) -> bool:
        return not unfinished(host)


@pytest.fixture(scope="module")
def scenes() -> Iterator[list[Scene]]:
    """At most one, that every test finds as it was at first."""
    kept: list[Scene] = []
    yield kept
    for scene in kept:
        scene.__exit__(None, None, None)


@pytest.fixture
def stage(scenes: list[Scene]) -> Iterator[Stage]:
    if not scenes:
        scenes.append(Scene().__enter__())
    stage = Stage(scenes[0])
    with contextlib.closing(stage), stage.watch:
        yield stage
    if not stage.is_settled:
        scenes.pop().__exit__(None, None, None)


def client(scene: Scene) -> ProbeProcess:
    """One that streams, and must not notice."""
    return start_probe("lines", SPEC.ip, SPEC.port, host=scene.lab.client, rate_per_s=RATE_PER_S)


def run(host: Host, *words: str) -> subprocess.CompletedProcess[str]:
    """`migrate WORDS` to its end, whatever that is; never with a traceback."""
    command = ["migrate", *words]
    done = host.run(command, env=ENVIRONMENT, check=False, timeout_s=COMMAND_DEADLINE_S)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def told(host: Host, *words: str, code: int = 0) -> str:
    """What it says on the stream that belongs to the code with which it must end."""
    done = run(host, *words)
    assert done.returncode == code, done
    return done.stdout if code == 0 else done.stderr


def standing(host: Host, migration: str) -> dict[str, Any]:
    """`migrate status ID --json`: the one side that this host has. People are told the same."""
    (one,) = json.loads(told(host, "status", migration, "--json"))
    assert one["migration_id"] == migration
    shown = told(host, "status")
    for text in (migration, one["state"], one["container_state"], one["meaning"], one["remedy"]):
        assert text in shown, shown
    return dict(one)


def states(host: Host, migration: str) -> list[str]:
    """As `migrate log ID` has them."""
    return [line.split()[2] for line in told(host, "log", migration).splitlines()[1:]]


# ---- status, log ----


def test_what_is_told_of_a_migration_on_its_way_and_of_one_that_is_done(stage: Stage) -> None:
    here, there = stage.here, stage.there
    stage.begin_until(COPYING)
    ours, theirs = standing(here, stage.migration), standing(there, stage.migration)
    assert (ours["state"], ours["container_state"]) == ("precopy", f"runs on {here.name}")
    assert ours["driver"].startswith("the coordinator with pid ")
    assert (theirs["state"], theirs["container_state"]) == ("receiving", f"runs on {here.name}")
    refused = told(here, "recover", stage.migration, code=2)
    assert "is being migrated by the coordinator" in refused
    assert f"migrate cancel {stage.migration}" in refused
    twice = told(here, SPEC.name, "--to", there.name, code=2)
    assert f"is being migrated to {there.name} already" in twice

    stage.go_on(COPYING, FROZEN)
    assert standing(here, stage.migration)["container_state"] == f"stands still on {here.name}"
    assert standing(there, stage.migration)["container_state"] == ""

    stage.go_on(FROZEN, COMMITTED)
    ours, theirs = standing(here, stage.migration), standing(there, stage.migration)
    assert (ours["state"], ours["container_state"]) == ("committed", f"is held on {here.name}")
    assert (theirs["state"], theirs["container_state"]) == ("prepared", f"is held on {there.name}")
    assert "is committed" in told(here, "cancel", stage.migration, code=2)

    stage.go_on(COMMITTED)
    assert stage.finish_command().done
    ours, theirs = standing(here, stage.migration), standing(there, stage.migration)
    assert ours["ended"]
    assert theirs["ended"]
    assert ours["meaning"] == f"moved to {there.name}"
    assert theirs["meaning"] == f"arrived from {here.name}"
    assert "has ended" in told(here, "cancel", stage.migration, code=2)
    assert f"moved to {there.name}" in told(here, "recover", stage.migration)
    assert f"comes from {here.name}" in told(there, "cancel", stage.migration, code=2)
    way = ["begun", "precopy", "frozen", "committed", "releasing", "done"]
    assert states(here, stage.migration) == way
    way = ["begun", "receiving", "prepared", "committed", "running", "done"]
    assert states(there, stage.migration) == way
    stage.settle(on=there)


def test_a_dead_coordinator_is_told_and_recovered_without_an_agent(stage: Stage) -> None:
    here = stage.here
    stage.begin_until(COPYING)
    stage.scene.lab.kill_agent(here.name)
    stage.kill_command(COPYING)
    seen = standing(here, stage.migration)
    assert seen["container_state"] == f"runs on {here.name}"
    assert "its coordinator is dead, and no agent runs here" in seen["meaning"]
    assert seen["remedy"] == f"migrate recover {stage.migration}"
    said = told(here, *seen["remedy"].split()[1:])
    assert f"{stage.migration} aborted: {SPEC.name} runs on {here.name}" in said
    assert standing(here, stage.migration)["meaning"] == f"undone, it stayed on {here.name}"
    stage.scene.start_agent(here)
    stage.settle(on=here)


# ---- cancel ----


@pytest.mark.parametrize("at", [COPYING, FROZEN, HELD], ids=["copying", "frozen", "held"])
def test_cancel(stage: Stage, at: str) -> None:
    """The second time by an operator from elsewhere."""
    here = stage.here
    elsewhere = ("--host", here.name, "--fleet", FLEET, "--as", OPERATOR)
    asking = (stage.scene.lab.client, elsewhere) if at == FROZEN else (here, ())
    with client(stage.scene) as probe:
        stage.begin_until(at)
        said = told(asking[0], "cancel", stage.migration, *asking[1])
        assert said == f"{stage.migration} is undone; {SPEC.name} runs on {here.name}\n"
        command = stage.finish_command()
        assert command.code == 1
        assert command.stderr.startswith("the migration was cancelled\n")
        stage.settle(on=here)
        assert probe.stop().clean
    assert "has ended" in told(asking[0], "cancel", stage.migration, *asking[1], code=2)


def test_cancel_of_a_migration_whose_coordinator_is_dead(stage: Stage) -> None:
    here = stage.here
    stage.begin_until(COPYING)
    stage.scene.lab.kill_agent(here.name)
    stage.kill_command(COPYING)
    said = told(here, "cancel", stage.migration)
    assert said == f"{stage.migration} is undone; {SPEC.name} runs on {here.name}\n"
    stage.scene.start_agent(here)
    stage.settle(on=here)


# ---- committed, and nobody can be asked ----


def test_held_on_both_hosts_until_the_link_is_back(stage: Stage) -> None:
    here, there = stage.here, stage.there
    with client(stage.scene) as probe:
        stage.begin_until(COMMITTED)
        stage.scene.set_link(up=False)
        stage.kill_command(COMMITTED)
        for host, peer in ((here, there), (there, here)):
            seen = standing(host, stage.migration)
            assert seen["container_state"] == f"is held on {host.name}"
            assert f"bring {peer.name} back" in seen["remedy"]
            assert f"migrate recover {stage.migration}" in seen["remedy"]
            left = told(host, "recover", stage.migration, code=3)
            assert f"the agent of {peer.name} does not answer" in left
            assert f"is held on {host.name}" in left
            assert "--force-source" in left
            assert "--force-target" in left
        again = run(here, SPEC.name, "--to", there.name)
        assert again.returncode in (2, 3), again
        assert stage.migration in again.stderr
        stage.executes()
        stage.scene.set_link(up=True)
        told(here, "recover")
        stage.settle(on=there)
        heard = probe.stop()
        # After so long a silence TCP may wait longer before it sends again than the client does for
        # its last answers.
        assert (heard.resets, heard.out_of_order, heard.error) == (0, 0, ""), heard
        assert not heard.violations


def test_force_is_refused_while_the_peer_can_be_asked(stage: Stage) -> None:
    """A source that has not decided may take its container back, a target that has recorded the
    commit may run its copy, both at any moment."""
    here, there = stage.here, stage.there
    stage.begin_until(HELD)
    left = told(there, "recover", stage.migration, "--force-target", code=3)
    assert f"{here.name} says frozen" in left
    stage.go_on(HELD, RESUMING)
    stage.kill_command(RESUMING)
    left = told(here, "recover", stage.migration, "--force-source", code=3)
    assert f"{there.name} says committed" in left
    stage.executes()
    stage.go_on(RESUMING)
    stage.settle(on=there)


def test_force_source_when_the_target_is_gone(stage: Stage) -> None:
    here, there = stage.here, stage.there
    stage.begin_until(COMMITTED)
    stage.scene.lab.crash(there.name)
    stage.kill_command(COMMITTED)
    assert f"is held on {here.name}" in told(here, "recover", stage.migration, code=3)
    assert "need the migration's id" in told(here, "recover", "--force-source", code=2)
    said = told(here, "recover", stage.migration, "--force-source")
    assert f"{stage.migration} aborted: {SPEC.name} runs on {here.name}" in said
    stage.executes(here)
    stage.boot(there)
    stage.settle(on=here)
    assert states(there, stage.migration)[-1] == "aborted"


def test_force_target_when_the_source_is_gone(stage: Stage) -> None:
    here, there = stage.here, stage.there
    stage.begin_until(COMMITTED)
    stage.scene.lab.crash(here.name)
    stage.kill_command(RESUMING)
    assert f"is held on {there.name}" in told(there, "recover", stage.migration, code=3)
    told(there, "recover", stage.migration, "--force-target")
    stage.executes(there)
    stage.boot(here)
    stage.scene.disarm(moment(COMMITTED))
    stage.settle(on=there)
    assert standing(here, stage.migration)["meaning"] == f"moved to {there.name}"


# ---- a host loses power ----


@pytest.mark.parametrize("at", [COPYING, HELD], ids=["receiving", "held"])
def test_the_target_loses_power_before_it_has_the_commit(stage: Stage, at: str) -> None:
    """What it had is gone, and when it comes back it knows that nothing has become of it."""
    here, there = stage.here, stage.there
    stage.begin_until(at, "--link-patience", "2")
    stage.scene.lab.crash(there.name)
    stage.go_on(at)
    if at == COPYING:
        command = stage.finish_command()
        assert command.code == 1, command
        assert f"runs on {here.name}" in command.stderr
        stage.boot(there)
    else:
        # The commit may be in the journal by now: then only the target can tell.
        stage.boot(there)
        assert stage.finish_command().code == 1
    stage.settle(on=here)


def test_the_target_loses_power_between_commit_and_resume(stage: Stage) -> None:
    """Nobody can know whether the container has run there: its operator decides."""
    here, there = stage.here, stage.there
    stage.begin_until(RESUMING)
    stage.scene.lab.crash(there.name)
    stage.kill_command(RESUMING)
    stage.boot(there)
    stage.scene.disarm(moment(RESUMING))
    seen = standing(there, stage.migration)
    assert "went down before it was known" in seen["meaning"]
    assert "--force-source" in seen["remedy"]
    assert standing(here, stage.migration)["container_state"] == f"is held on {here.name}"
    told(here, "recover", stage.migration, code=3)
    told(here, "recover", stage.migration, "--force-source", code=3)
    told(there, "recover", stage.migration, code=3)
    stage.executes()
    told(there, "recover", stage.migration, "--force-source")
    told(here, "recover")
    stage.settle(on=here)


def test_the_source_loses_power_after_the_commit(stage: Stage) -> None:
    """Its journal is all that is needed of it: the copy runs as soon as it can be asked."""
    here, there = stage.here, stage.there
    stage.begin_until(COMMITTED)
    stage.scene.lab.crash(here.name)
    stage.kill_command(RESUMING)
    stage.executes()
    stage.boot(here)
    stage.scene.disarm(moment(COMMITTED))
    stage.settle(on=there)


def test_the_source_loses_power_while_the_container_is_frozen(stage: Stage) -> None:
    """The container goes with its host, as without a migration, and the target keeps nothing."""
    stage.begin_until(FROZEN, "--link-patience", "2")
    stage.scene.lab.crash(stage.here.name)
    stage.kill_command(RESUMING)
    stage.boot(stage.here)
    stage.settle(on=None)


def test_the_source_loses_power_when_the_target_holds_a_copy(stage: Stage) -> None:
    """That copy is all that is left: it runs as soon as the source is back and gives it away."""
    here, there = stage.here, stage.there
    stage.begin_until(HELD, "--link-patience", "2")
    stage.scene.lab.crash(here.name)
    stage.kill_command(RESUMING)
    stage.boot(here)
    stage.settle(on=there)
