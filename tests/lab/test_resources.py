"""Hosts that run out of something: refused before anything is touched where it can be known, and
undone where not. The limits are real ones: small file systems, limits of open files.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pytest

from bench.lab import agents
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.faults.points import moment
from tests.faults.scene import ENVIRONMENT, Scene
from tests.lab.brake import Brake
from tests.lab.inside import inside
from tests.lab.invariants import (
    FAST,
    SLOW,
    UNFINISHED,
    Threatened,
    assert_gave_back,
    assert_moves,
    assert_undone,
    attempt,
    explained,
    failure_lab,
    is_frozen,
    is_held,
    migration_id,
    threatened,
    wait_round,
    wait_session,
)
from tests.lab.migrating import Migration, begin, migrate, running_on, wait_clean
from tests.lab.waiting import wait_until

NAME: Final = "short"
STATE: Final = "/var/lib/migrate"
REPORT: Final = "/tmp/limited-report.json"
RESUME: Final = moment("target.resume.before")
REACHED_DEADLINE_S: Final = 60.0


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


# ---- what can't be known before ----


def test_the_page_store_runs_full(lab: Lab) -> None:
    with threatened(lab, "r-store") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            shrink(lab.host("B"), f"/run/migrate/sessions/{migration_id(underway)}.target")
            told = explained(underway.finish())
        assert "has no room left" in told.error
        assert (told.host, told.phase, told.container) == ("B", "precopy", "runs on A")
        assert told.remedy
        assert_undone(under)
        assert_moves(under)


def test_no_space_for_the_root_file_system(lab: Lab) -> None:
    """A container has more files than any number of bytes can tell before."""
    with threatened(lab, "r-root") as under:
        with small_filesystem(lab.host("B"), f"{STATE}/containers", "size=80m,nr_inodes=6"):
            told = explained(migrate(lab.host("A"), under.name, "B"))
        assert "No space left on device" in told.error
        assert (told.host, told.phase, told.container) == ("B", "rootfs", "runs on A")
        assert told.remedy
        assert_undone(under)
        assert_moves(under)


def test_no_space_for_the_images_of_the_dump(lab: Lab) -> None:
    brake = Brake(lab.host("A"))
    with threatened(lab, "r-images") as under:
        with brake.on("dump"), attempt(under, env=brake.env) as underway:
            brake.wait_reached(underway)
            # CRIU writes some twenty images, of a page at least.
            shrink(lab.host("A"), f"/run/migrate/sessions/{migration_id(underway)}.source", 40)
            brake.release()
            told = explained(underway.finish())
        # In CRIU's own words where its log found room for them.
        assert "no space left" in told.error.lower()
        assert (told.host, told.phase, told.container) == ("A", "dump", "runs on A")
        assert told.remedy
        assert_undone(under)
        assert_moves(under)


def test_the_agent_runs_out_of_descriptors(lab: Lab) -> None:
    target = lab.host("B")
    with threatened(lab, "r-agent") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            with few_descriptors(target, agent_pid(target), spare=2):
                lab.set_rate("A", FAST)
                told = explained(underway.finish())
        assert "Too many open files" in told.error
        assert (told.host, told.container) == ("B", "runs on A")
        assert "LimitNOFILE" in told.remedy
        assert_undone(under)
        assert_moves(under)


def test_the_coordinator_runs_out_of_descriptors(lab: Lab) -> None:
    source = lab.host("A")
    with threatened(lab, "r-command") as under:
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            pid = inside_pid(source.command_pid(underway.process))
            with few_descriptors(source, pid, spare=2):
                lab.set_rate("A", FAST)
                told = explained(underway.finish())
        assert "Too many open files" in told.error
        assert (told.host, told.container) == ("A", "runs on A")
        assert "ulimit" in told.remedy
        assert_undone(under)
        assert_moves(under)


def test_the_pager_runs_out_of_descriptors(lab: Lab) -> None:
    """Before CRIU has given it anything: nothing can be restored then."""
    brake, target = Brake(lab.host("B")), lab.host("B")
    with threatened(lab, "r-pager") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            for pid in target.run(["pgrep", "-f", "criu_glue.pager"]).stdout.split():
                target.run(["prlimit", "--pid", pid, "--nofile=3:3"])
            brake.release()
            told = explained(underway.finish())
        assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
        assert told.remedy
        assert_undone(under)
        assert_moves(under)


def test_no_room_in_the_journal_when_it_is_time_to_commit(lab: Lab) -> None:
    """The container goes on here, and the journal has it when there is room again."""
    brake, source = Brake(lab.host("B")), lab.host("A")
    with threatened(lab, "r-commit") as under, state_apart(lab, "A", Brake.env):
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            fill_journal(source)
            brake.release()
            told = explained(underway.finish())
        assert told.error == f"{STATE}/journal.sqlite cannot be used: database or disk is full"
        assert (told.host, told.phase, told.container) == ("A", "held", "runs on A")
        assert told.remedy == f"free space in {STATE}"
        assert_gave_back(under)
        assert [state for *_, state in inside(source, UNFINISHED)] == ["frozen"]
        empty(source, STATE)
        wait_until("the journal has its end", lambda: inside(source, UNFINISHED) == [])
        assert_undone(under)
        assert_moves(under)


def test_no_room_in_the_journal_of_the_target_when_it_takes_over(lab: Lab) -> None:
    """It says so and both hold; when there is room the source's next COMMIT is recorded."""
    brake, target = Brake(lab.host("B")), lab.host("B")
    with state_apart(lab, "B", Brake.env), threatened(lab, "r-taken") as under:
        with brake.on("restore"), attempt(under) as underway:
            brake.wait_reached(underway)
            session = migration_id(underway)
            fill_journal(target)
            brake.release()
            wait_session(target, session, "in_doubt")
            assert is_held(target, under.name)
            assert is_frozen(lab.host("A"), under.name)
            empty(target, STATE)
            done = underway.finish()
        assert done.code == 0, done
        assert running_on(lab, under.name) == ["B"]
        wait_clean(lab.host("A"))
        wait_clean(target, under.name)
        under.guest.wait_answers()
        under.guest.verify()
        assert inside(target, UNFINISHED) == []


@pytest.mark.parametrize("is_killed", [False, True], ids=["agent-lives", "agent-killed"])
def test_no_room_in_the_journal_of_the_target_when_it_has_taken_over(is_killed: bool) -> None:
    """It runs there, whatever the journal says, which has all of it when there is room again."""
    with Scene() as scene, state_apart(scene.lab, "B", ENVIRONMENT):
        source, target, name = scene.source, scene.target, scene.guest.name
        scene.arm(RESUME)
        underway = begin(source, name, "B", env=ENVIRONMENT)
        scene.wait_reached(RESUME, REACHED_DEADLINE_S)
        fill_journal(target)
        scene.let_go(RESUME)
        session = underway.finish().done["migration_id"]
        wait_session(target, session, "done")
        assert [state for *_, state in inside(target, UNFINISHED)] == ["committed"]
        if is_killed:
            scene.lab.kill_agent("B")
        empty(target, STATE)
        if is_killed:
            scene.lab.start_agent("B", ENVIRONMENT)
        wait_until("the journal has its end", lambda: inside(target, UNFINISHED) == [])
        assert running_on(scene.lab, name) == ["B"]
        scene.guest.verify()
        assert migrate(target, name, "A", env=ENVIRONMENT).done
        wait_clean(target)
        wait_clean(source, name)


# ---- what can ----


@pytest.fixture(scope="module")
def under(lab: Lab) -> Iterator[Threatened]:
    """One container for all that is refused, since nothing touches it."""
    with threatened(lab, NAME) as under:
        yield under


@pytest.mark.parametrize("where", ["A", "B"])
@pytest.mark.parametrize("directory", [STATE, "/run/migrate"])
def test_no_space_for_what_the_project_keeps(under: Threatened, where: str, directory: str) -> None:
    """The journal, and the directories of sessions."""
    with small_filesystem(under.lab.host(where), directory, "size=200k"):
        told = explained(migrate(under.lab.host("A"), NAME, "B"), code=2)
    message, remedy = told.refusals["space"]
    assert message.startswith(f"{directory} has room for ")
    assert remedy == f"free space in {directory}"
    assert (told.host, told.container) == (where, "runs on A")
    assert_undone(under)


def test_the_source_can_not_write_its_journal(under: Threatened) -> None:
    """There is not even room to note that a migration was refused."""
    source = under.lab.host("A")
    with small_filesystem(source, STATE, "size=200k"):
        fill(source, STATE)
        done = source.run(["migrate", NAME, "--to", "B"], check=False)
    assert done.returncode == 2, done
    error, *rest = done.stderr.splitlines()
    assert error.startswith(f"{STATE}/journal.sqlite cannot be used: ")
    assert f"  remedy:    free space in {STATE}" in rest, done.stderr
    assert "Traceback" not in done.stderr
    assert_undone(under)


def test_the_source_has_no_memory_for_the_images(under: Threatened) -> None:
    source = under.lab.host("A")
    fake = "sed 's/^MemAvailable:.*/MemAvailable: 65536 kB/' /proc/meminfo >/run/meminfo"
    source.run(["sh", "-c", f"{fake}; mount --bind /run/meminfo /proc/meminfo"])
    told = explained(migrate(source, NAME, "B"), code=2)
    source.run(["sh", "-c", "umount /proc/meminfo; rm /run/meminfo"])
    message, remedy = told.refusals["memory"]
    assert message.startswith("64 MiB of memory are free")
    assert remedy
    assert (told.host, told.container) == ("A", "runs on A")


def test_the_command_may_not_open_enough_files(under: Threatened) -> None:
    told = explained(limited_migrate(under.lab.host("A"), NAME, "B", descriptors=48), code=2)
    assert_refused_for_descriptors(under, told.refusals)
    # It has not even looked at the container.
    assert (told.host, told.container) == ("A", "")


def test_the_agent_may_not_open_enough_files(under: Threatened) -> None:
    target = under.lab.host("B")
    with few_descriptors(target, agent_pid(target), spare=40):
        told = explained(migrate(under.lab.host("A"), NAME, "B"), code=2)
    assert_refused_for_descriptors(under, told.refusals)
    assert (told.host, told.container) == ("B", "runs on A")


def assert_refused_for_descriptors(under: Threatened, refusals: dict[str, tuple[str, str]]) -> None:
    ((code, (message, remedy)),) = refusals.items()
    assert code == "open-files"
    assert "are needed" in message
    assert "LimitNOFILE" in remedy
    assert_undone(under)


# ---- limits ----


@contextlib.contextmanager
def small_filesystem(host: Host, directory: str, options: str) -> Iterator[None]:
    """A tmpfs lies over a directory of the host."""
    host.run(["mkdir", "-p", directory])
    host.run(["mount", "-t", "tmpfs", "-o", options, "none", directory])
    try:
        yield
    finally:
        host.run(["umount", directory])


@contextlib.contextmanager
def state_apart(lab: Lab, name: str, env: Mapping[str, str]) -> Iterator[None]:
    """A host keeps its journal and its bundles on a small file system of their own meanwhile."""
    lab.kill_agent(name)
    with small_filesystem(lab.host(name), STATE, "size=192m"):
        lab.start_agent(name, env)
        try:
            yield
        finally:
            lab.kill_agent(name)
    lab.start_agent(name, env)


def fill(host: Host, directory: str) -> None:
    """Leaves a file system no room at all."""
    host.run(["sh", "-c", f"dd if=/dev/zero of={directory}/filling bs=4k 2>/dev/null || :"])


def empty(host: Host, directory: str) -> None:
    """Gives the room back."""
    host.run(["rm", f"{directory}/filling"])


# A write-ahead log is written anew from its beginning, where it needs no room.
USE_UP: Final = """
from migrate.errors import JournalError
from migrate.journal import Journal
with Journal.open(Path("/var/lib/migrate/journal.sqlite")) as journal:
    try:
        while True:
            journal.claim_attempt(0.0)
    except JournalError as error:
        answer(error.message)
"""


def fill_journal(host: Host) -> None:
    """Returns when the journal of a host takes not one record more, for want of room."""
    fill(host, STATE)
    assert inside(host, USE_UP).endswith("cannot be used: database or disk is full")


def shrink(host: Host, directory: str, spare_kib: int = 4) -> None:
    """Leaves a session's tmpfs so much room."""
    used_kib = int(host.run(["df", "-k", "--output=used", directory]).stdout.split()[-1])
    host.run(["mount", "-o", f"remount,size={used_kib + spare_kib}k", directory])


@contextlib.contextmanager
def few_descriptors(host: Host, pid: int, *, spare: int) -> Iterator[None]:
    """A process of the host may open so many files more than it has open now."""
    highest = max(int(path.name) for path in host.path(f"/proc/{pid}/fd").iterdir())
    before = host.run(["prlimit", "--pid", str(pid), "--nofile", "-o", "SOFT,HARD", "--noheadings"])
    limit = highest + 1 + spare
    # The soft limit alone: the kernel looks at no other, and it can be raised again.
    host.run(["prlimit", "--pid", str(pid), f"--nofile={limit}:"])
    try:
        yield
    finally:
        if host.path(f"/proc/{pid}").exists():
            soft = before.stdout.split()[0]
            host.run(["prlimit", "--pid", str(pid), f"--nofile={soft}:"])


def agent_pid(host: Host) -> int:
    """Inside the host."""
    return int(host.read_text(agents.PID_FILE))


def inside_pid(pid: int) -> int:
    """A process of this machine's by the pid that it has in its own namespace."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def limited_migrate(source: Host, name: str, target: str, *, descriptors: int) -> Migration:
    """`migrate` that may open so many files."""
    limit = ["prlimit", f"--nofile={descriptors}:{descriptors}"]
    command = [*limit, "migrate", name, "--to", target, "--report", REPORT]
    done = source.run(command, check=False)
    path = source.path(REPORT)
    report = json.loads(path.read_text()) if path.exists() else None
    path.unlink(missing_ok=True)
    return Migration(report, done.returncode, done.stdout, done.stderr)
