"""A throttle with a real keeper on a real cgroup; limits on a directory with a cgroup's files."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from migrate.brakes import BrakePlan, put_back
from migrate.core.throttling import MOST
from migrate.errors import MigrateError
from migrate.processes import users_of
from migrate.throttle import Throttle
from tests.freezer import cgroup_of_its_own
from tests.lab.waiting import wait_until

DEADLINE_S = 20.0
COUNT = "while True: pass"
UNLIMITED = "max 100000"


class Scene:
    """A container's cgroup and a migration's session."""

    def __init__(self, cgroup: Path, session: Path) -> None:
        self.cgroup = cgroup
        self.session = session
        self.noted: list[tuple[BrakePlan, str]] = []
        self.warnings: list[str] = []
        self.warned = asyncio.Event()
        self.throttle = self.make_throttle()

    def make_throttle(self, **options: float) -> Throttle:
        return Throttle(self.cgroup, self.session, self._note, self._warn, **options)

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        self.warned.set()

    async def _note(self, plan: BrakePlan) -> None:
        """Keeps what the cgroup was like when the plan was written down."""
        self.noted.append((plan, self.limit if plan.cpu_max else str(self.is_frozen)))

    @property
    def is_frozen(self) -> bool:
        return (self.cgroup / "cgroup.freeze").read_text().strip() == "1"

    @property
    def limit(self) -> str:
        return (self.cgroup / "cpu.max").read_text()

    @property
    def keepers(self) -> list[psutil.Process]:
        return [one.process for one in users_of(self.session)]

    def wait_pulses(self) -> None:
        """It is frozen, and then it is not, over and over."""
        for _ in range(3):
            wait_until("it is frozen", lambda: self.is_frozen)
            wait_until("it is thawed", lambda: not self.is_frozen)

    def assert_runs(self) -> None:
        """It is never seen frozen while other processes come and go."""
        seen = []
        for _ in range(5):
            subprocess.run([sys.executable, "-S", "-c", ""], check=True)
            seen.append(self.is_frozen)
        assert not any(seen)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """A process that never rests, in a cgroup of its own."""
    with (
        cgroup_of_its_own() as cgroup,
        subprocess.Popen([sys.executable, "-c", COUNT]) as counter,
    ):
        (cgroup / "cgroup.procs").write_text(str(counter.pid))
        yield Scene(cgroup, tmp_path / "session")
        (cgroup / "cgroup.freeze").write_text("0")
        counter.kill()


@pytest.fixture
def limited(tmp_path: Path) -> Scene:
    """The files of a cgroup where the controller `cpu` is."""
    cgroup = tmp_path / "cgroup"
    cgroup.mkdir()
    for name, content in {
        "cpu.max": UNLIMITED,
        "cpu.max.burst": "0",
        "cpu.stat": "usage_usec 0",
        "cgroup.freeze": "0",
    }.items():
        (cgroup / name).write_text(f"{content}\n")
    return Scene(cgroup, tmp_path / "session")


# ---- pulses ----


async def test_pulses_are_paused_while_tasks_are_looked_at_and_end_with_the_throttle(
    scene: Scene,
) -> None:
    assert await scene.throttle.slow(1 - MOST) == "pulses of the freezer"
    scene.wait_pulses()
    with scene.throttle.paused():
        scene.assert_runs()
    scene.wait_pulses()
    await scene.throttle.lift()
    scene.assert_runs()
    await scene.throttle.close()
    assert scene.keepers == []
    assert scene.warnings == []


async def test_it_is_slowed_more_by_the_same_keeper(scene: Scene) -> None:
    await scene.throttle.slow(0.5)
    (keeper,) = scene.keepers
    await scene.throttle.slow(0.1)
    scene.wait_pulses()
    assert scene.keepers == [keeper]
    assert [plan.words for plan, _ in scene.noted] == [("0.5000",), ("0.5000", "0.1000")]
    assert scene.noted[0][1] == "False"
    await scene.throttle.close()


async def test_a_keeper_that_is_killed_leaves_nothing_frozen(scene: Scene) -> None:
    await scene.throttle.slow(1 - MOST)
    (keeper,) = scene.keepers
    wait_until("it is frozen", lambda: scene.is_frozen)
    # Stopped first, so that it leaves it frozen.
    keeper.send_signal(signal.SIGSTOP)
    (scene.cgroup / "cgroup.freeze").write_text("1")
    keeper.kill()
    await asyncio.wait_for(scene.warned.wait(), DEADLINE_S)
    assert "has ended" in scene.warnings[0]
    scene.assert_runs()
    # The next step is taken by another one.
    await scene.throttle.slow(0.1)
    scene.wait_pulses()
    await scene.throttle.close()
    scene.assert_runs()


async def test_a_keeper_that_hangs_is_ended(scene: Scene) -> None:
    throttle = scene.make_throttle(answer_deadline_s=0.2)
    await throttle.slow(1 - MOST)
    (keeper,) = scene.keepers
    keeper.send_signal(signal.SIGSTOP)
    (scene.cgroup / "cgroup.freeze").write_text("1")
    with throttle.paused():
        scene.assert_runs()
    await throttle.close()
    assert scene.keepers == []
    scene.assert_runs()


async def test_signals_for_the_command_do_not_end_it(scene: Scene) -> None:
    await scene.throttle.slow(0.1)
    (keeper,) = scene.keepers
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        keeper.send_signal(number)
    scene.wait_pulses()
    assert scene.keepers == [keeper]
    await scene.throttle.close()


async def test_once_lifted_it_is_not_pulled_again(scene: Scene) -> None:
    await scene.throttle.lift()
    with pytest.raises(MigrateError, match="nobody holds"):
        await scene.throttle.slow(0.5)
    with scene.throttle.paused():
        scene.assert_runs()
    assert scene.keepers == []


async def test_a_container_that_has_ended_can_not_be_slowed(tmp_path: Path) -> None:
    with cgroup_of_its_own() as cgroup:
        scene = Scene(cgroup, tmp_path / "session")
        await scene.throttle.slow(0.5)
        cgroup.rmdir()
        wait_until("its keeper has ended", lambda: not scene.keepers)
        await scene.throttle.close()
        cgroup.mkdir()


# ---- standing still ----


async def test_it_stands_still_for_a_moment_whatever_slows_it(scene: Scene) -> None:
    await scene.throttle.may_still()
    assert [(plan.stills, plan.words) for plan, _ in scene.noted] == [(True, ())]
    scene.assert_runs()
    (keeper,) = scene.keepers
    for _ in range(2):
        with scene.throttle.paused():
            with scene.throttle.stilled():
                assert "frozen 1" in (scene.cgroup / "cgroup.events").read_text()
            scene.assert_runs()
        await scene.throttle.slow(1 - MOST)
        scene.wait_pulses()
    assert scene.keepers == [keeper]
    assert scene.noted[-1][0].stills
    assert len(scene.throttle.stills_ms) == 2
    await scene.throttle.close()
    scene.assert_runs()
    with pytest.raises(MigrateError, match="nobody would let go"), scene.throttle.stilled():
        pass


async def test_a_keeper_that_is_killed_meanwhile_makes_the_stillness_fail(scene: Scene) -> None:
    """It was let go before the end: what was seen in it may be wrong."""
    await scene.throttle.may_still()
    (keeper,) = scene.keepers

    async def look() -> None:
        with scene.throttle.stilled():
            keeper.kill()
            await asyncio.wait_for(scene.warned.wait(), DEADLINE_S)
            scene.assert_runs()

    with pytest.raises(MigrateError, match="stand still"):
        await look()
    scene.assert_runs()
    await scene.throttle.close()
    assert scene.keepers == []


async def test_without_a_keeper_it_does_not_stand_still(scene: Scene) -> None:
    with pytest.raises(MigrateError, match="nobody would let go"), scene.throttle.stilled():
        pass
    scene.assert_runs()


async def test_a_container_that_has_ended_can_not_stand_still(tmp_path: Path) -> None:
    with cgroup_of_its_own() as cgroup:
        scene = Scene(cgroup, tmp_path / "session")
        await scene.throttle.may_still()
        cgroup.rmdir()
        with pytest.raises(MigrateError, match="No such file"), scene.throttle.stilled():
            pass
        await scene.throttle.close()
        cgroup.mkdir()


COORDINATOR = """
import asyncio, sys
from pathlib import Path
from migrate.throttle import Throttle

async def main():
    async def note(plan):
        pass
    throttle = Throttle(Path(sys.argv[1]), Path(sys.argv[2]), note, print)
    if sys.argv[3] == "slow":
        await throttle.slow(0.02)
    else:
        await throttle.may_still()
        stilled = throttle.stilled()
        stilled.__enter__()
    print("held", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("act", ["slow", "still"])
def test_a_coordinator_that_is_killed_leaves_nothing_frozen(scene: Scene, act: str) -> None:
    command = [sys.executable, "-c", COORDINATOR, str(scene.cgroup), str(scene.session), act]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as coordinator:
        assert coordinator.stdout is not None
        assert coordinator.stdout.readline() == b"held\n"
        wait_until("it is frozen", lambda: scene.is_frozen)
        coordinator.kill()
    wait_until("its keeper has ended", lambda: users_of(scene.session) == [])
    scene.assert_runs()


# ---- limits ----


async def test_a_limit_is_written_down_set_and_put_back(limited: Scene) -> None:
    assert await limited.throttle.slow(0.5) == "cpu.max"
    (noted,) = limited.noted
    assert noted == (BrakePlan(str(limited.cgroup), UNLIMITED, (limited.limit,)), f"{UNLIMITED}\n")
    assert limited.limit != UNLIMITED
    limit = limited.limit
    with limited.throttle.paused():
        assert limited.limit == UNLIMITED
    assert limited.limit == limit
    await limited.throttle.lift()
    assert limited.limit == UNLIMITED
    assert not limited.is_frozen
    await limited.throttle.close()


async def test_a_share_is_one_of_what_the_container_used(limited: Scene) -> None:
    """Of eight processors at most, and at most of what it was allowed."""
    (limited.cgroup / "cpu.max").write_text("800000 100000\n")
    (limited.cgroup / "cpu.stat").write_text(f"usage_usec {1 << 60}\n")
    await limited.throttle.slow(0.5)
    assert limited.limit == "400000 100000"
    await limited.throttle.slow(0.25)
    assert limited.limit == "200000 100000"
    await limited.throttle.close()
    assert limited.limit == "800000 100000"


async def test_the_limit_of_somebody_else_stays(limited: Scene) -> None:
    await limited.throttle.slow(0.5)
    (limited.cgroup / "cpu.max").write_text("123456 100000")
    await limited.throttle.close()
    assert limited.limit == "123456 100000"


async def test_where_a_limit_may_exceed_itself_it_is_not_touched(limited: Scene) -> None:
    """The kernel refuses a quota below cpu.max.burst."""
    (limited.cgroup / "cpu.max.burst").write_text("50000\n")
    assert await limited.throttle.slow(0.5) == "pulses of the freezer"
    await limited.throttle.close()
    assert limited.limit == f"{UNLIMITED}\n"


def test_what_cannot_be_put_back_is_an_error(limited: Scene) -> None:
    plan = BrakePlan(str(limited.cgroup), UNLIMITED, ("1000 100000",))
    (limited.cgroup / "cpu.max").unlink()
    put_back(plan)
    (limited.cgroup / "cpu.max").mkdir()
    with pytest.raises(IsADirectoryError):
        put_back(plan)
    assert plan.remedy == f"echo {UNLIMITED} > {limited.cgroup}/cpu.max"


async def test_a_limit_and_standing_still_are_put_back_together(limited: Scene) -> None:
    await limited.throttle.may_still()
    await limited.throttle.slow(0.5)
    plan = limited.noted[-1][0]
    assert (plan.stills, limited.limit != UNLIMITED) == (True, True)
    await limited.throttle.close()
    (limited.cgroup / "cpu.max").write_text(plan.words[-1])
    (limited.cgroup / "cgroup.freeze").write_text("1")
    put_back(plan)
    assert (limited.limit, limited.is_frozen) == (UNLIMITED, False)
    assert plan.remedy.endswith("cgroup.freeze")


def test_a_plan_survives_the_journal() -> None:
    plan = BrakePlan("/sys/fs/cgroup/web", UNLIMITED, ("1000 100000",), stills=True)
    assert msgspec.convert(msgspec.to_builtins(plan), BrakePlan) == plan
    assert os.fspath(plan.cgroup) in plan.remedy
