"""What must hold after a failure, whichever it was.

with threatened(lab, "f1") as guest:                 # runs on A, a client streams
    ... a migration that fails ...
    told = explained(migration)                      # one message, and what it says
    assert_undone(guest)                             # runs on A as before, B keeps nothing
    assert_moves(guest)                              # a later migration succeeds
                                                     # at the end: the client lost nothing
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.containers import ContainerSpec, host_device
from bench.lab import agents
from bench.lab.host import Host
from bench.lab.lab import Lab
from criu_glue import hooks
from tests.lab.brake import Brake
from tests.lab.inside import inside
from tests.lab.migrating import (
    Migration,
    Resident,
    Underway,
    begin,
    migrate,
    resident,
    running_on,
    wait_clean,
)
from tests.lab.waiting import wait_until

AGENT_LOG: Final = "/var/log/migrate-agent.log"
FAST: Final = "10gbit"
SLOW: Final = "40mbit"
"""Of a link on which a round over a container of 24 MiB takes five seconds."""

# ---- a container under threat ----


@dataclass(frozen=True, slots=True)
class Picture:
    """A container on its host, as a failed migration must leave it.

    tasks: how many descriptors each has (a tracker opens one).
    """

    tasks: dict[int, int]
    tracers: dict[int, str]
    is_frozen: bool
    port: dict[str, Any]


_PICTURE: Final = """
import os, re
tasks, tracers = {}, {}
for pid in Path(f"/sys/fs/cgroup/dolly/{given}/cgroup.procs").read_text().split():
    tasks[pid] = len(os.listdir(f"/proc/{pid}/fd"))
    for thread in os.listdir(f"/proc/{pid}/task"):
        status = Path(f"/proc/{pid}/task/{thread}/status").read_text()
        tracers[thread] = re.search(r"TracerPid:\\t(\\d+)", status)[1]
answer({"tasks": tasks, "tracers": tracers})
"""


def picture(host: Host, name: str) -> Picture:
    """How the container is now."""
    seen = inside(host, _PICTURE, name)
    link = host.run(["bridge", "-json", "link", "show", "dev", host_device(name)]).stdout
    (port,) = json.loads(link)
    return Picture(
        tasks={int(task): count for task, count in seen["tasks"].items()},
        tracers={int(thread): tracer for thread, tracer in seen["tracers"].items()},
        is_frozen=is_frozen(host, name),
        port={key: port[key] for key in ("ifname", "master", "state")},
    )


def is_frozen(host: Host, name: str) -> bool:
    """Whether the container's cgroup was told to freeze."""
    return host.read_text(f"/sys/fs/cgroup/dolly/{name}/cgroup.freeze").strip() == "1"


@dataclass(slots=True)
class Threatened:
    """A container that runs on A, its streaming client, and how it was before."""

    guest: Resident
    before: Picture
    undone: int = field(default=0)

    @property
    def lab(self) -> Lab:
        return self.guest.lab

    @property
    def name(self) -> str:
        return self.guest.name


@contextlib.contextmanager
def threatened(
    lab: Lab,
    name: str,
    *,
    args: tuple[str, ...] = ("8",),
    memory_mib: int = 24,
    runtime: str = "runc",
) -> Iterator[Threatened]:
    """A container on A; at the end its client must have lost nothing.

    Agents that an earlier test has left dead are started, so that its failure is its own.
    """
    lab.set_rate("A", FAST)
    for host in lab.hosts:
        if not agents.listens(host):
            lab.start_agent(host.name, env=Brake(host).env)
    spec = ContainerSpec(
        name,
        "memory",
        args=args,
        memory_mib=memory_mib,
        address=f"10.77.0.{_number(name)}/24",
        address6=None,
        runtime=runtime,
    )
    with resident(lab, spec) as guest:
        yield Threatened(guest, picture(lab.host("A"), name))
        assert guest.probe is not None
        assert guest.probe.alive(), "the client's connection broke"
        client = guest.stop_probe()
        assert client.clean, client


def _number(name: str) -> int:
    """An address for each test, so that no ARP entry is left over from another's container."""
    return 2 + sum(name.encode()) % 97


def executed_ns(host: Host, name: str) -> dict[str, int]:
    """Every task of a container on this host, by its pid as this machine sees it, with the
    processor time that it has had.

    A CRIU that restores is in the container's cgroup too, with its hook and whoever looks after
    that; what tells them apart is that the tasks have pids of their own.
    """
    taken = {}
    ours = Path(f"/proc/{host.pid}/ns/pid").readlink()
    tasks: list[str] = []
    with contextlib.suppress(OSError):  # its cgroup is gone, or just going
        tasks = host.read_text(f"/sys/fs/cgroup/dolly/{name}/cgroup.procs").split()
    for task in tasks:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{task}/ns/pid").readlink() != ours:
                taken[task] = int(Path(f"/proc/{task}/schedstat").read_text().split()[0])
    return taken


def is_held(host: Host, name: str) -> bool:
    """Whether a restored copy is there whose CRIU waits for its verdict: before that its tasks
    still execute CRIU's code."""
    holds = host.path("/run/migrate/sessions").glob("*.target/work/hold")
    return any(hooks.is_held(hold) for hold in holds) and bool(executed_ns(host, name))


def assert_runs_once(under: Threatened) -> None:
    """While the client is answered over and over, tasks execute on A and on no other host.

    A copy that is held waits in the kernel like any idle task, so what counts is its time.
    """
    before = [executed_ns(host, under.name) for host in under.lab.hosts]
    under.guest.wait_answers()
    after = [executed_ns(host, under.name) for host in under.lab.hosts]
    executing = [
        host.name
        for host, earlier, later in zip(under.lab.hosts, before, after, strict=True)
        if any(later[task] > earlier[task] for task in earlier.keys() & later.keys())
    ]
    assert executing == ["A"], (before, after)


def assert_undone(under: Threatened) -> None:
    """It runs on A and nowhere else, untouched, its client is served, and B keeps nothing."""
    lab, name = under.lab, under.name
    wait_until("it is as before", lambda: picture(lab.host("A"), name) == under.before)
    wait_clean(lab.host("A"), name)
    wait_clean(lab.host("B"))
    assert_runs_once(under)
    under.guest.verify()


def assert_survives_a_failed_restore(under: Threatened) -> None:
    """After all tasks were restored, just before the hold (FI_POST_RESTORE)."""
    lab = under.lab
    lab.kill_agent("B")
    lab.start_agent("B", env={"CRIU_FAULT": "6"})
    told = explained(migrate(lab.host("A"), under.name, "B", "--json"))
    assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
    assert_undone(under)
    lab.kill_agent("B")
    lab.start_agent("B", env=Brake.env)
    assert_moves(under)


def assert_gave_back(under: Threatened) -> None:
    """It runs on A as before, whatever the target has not given up yet.

    A coordinator that was killed cleans up nothing: its directory goes with the next migration.
    """
    wait_until("it is as before", lambda: picture(under.lab.host("A"), under.name) == under.before)
    assert_runs_once(under)
    under.guest.verify()


def assert_moves(under: Threatened, *options: str) -> None:
    """A migration of the same container to the same host succeeds, and is complete."""
    lab, name = under.lab, under.name
    lab.set_rate("A", FAST)
    assert migrate(lab.host("A"), name, "B", *options).done
    assert running_on(lab, name) == ["B"]
    wait_clean(lab.host("A"))
    wait_clean(lab.host("B"), name)
    under.guest.wait_answers()
    under.guest.verify()


# ---- what the user is told ----


@dataclass(frozen=True, slots=True)
class Told:
    """The one message of a failed `migrate`. refusals: code to (message, remedy)."""

    error: str
    host: str = ""
    phase: str = ""
    container: str = ""
    remedy: str = ""
    refusals: dict[str, tuple[str, str]] = field(default_factory=dict)


_FIELD: Final = re.compile(r"  (host|phase|container|remedy): +(\S.*)")
_REFUSAL: Final = re.compile(r"  - (\S.*) \[([a-z-]+)\]")
_REFUSAL_REMEDY: Final = re.compile(r"    remedy: (\S.*)")


def explained(migration: Migration, code: int = 1) -> Told:
    """What it said, which must be one message and nothing else; its report must say the same."""
    assert migration.code == code, migration
    first, *rest = migration.stderr.splitlines()
    assert not re.match(r"\s|timestamp=|Traceback", first), migration.stderr
    fields: dict[str, str] = {}
    refusals: dict[str, tuple[str, str]] = {}
    last = ""
    for line in rest:
        if found := _FIELD.fullmatch(line):
            assert found[1] not in fields, migration.stderr
            fields[found[1]] = found[2]
        elif found := _REFUSAL.fullmatch(line):
            last = found[2]
            refusals[last] = (found[1], "")
        elif found := _REFUSAL_REMEDY.fullmatch(line):
            refusals[last] = (refusals[last][0], found[1])
        else:
            raise AssertionError(f"{line!r} is no part of a message: {migration.stderr}")
    told = Told(first, refusals=refusals, **fields)
    assert migration.report is not None, "no report"
    assert migration.report["outcome"] == "aborted"
    error = migration.report["error"]
    assert (error["message"], error["host"], error["phase"]) == (first, told.host, told.phase)
    return told


# ---- a migration that will fail ----


@contextlib.contextmanager
def attempt(
    under: Threatened, *options: str, env: Mapping[str, str] | None = None
) -> Iterator[Underway]:
    """`migrate NAME --to B` on A, for the test to disturb; ended with the block at the latest."""
    underway = begin(under.lab.host("A"), under.name, "B", "--json", *options, env=env)
    try:
        yield underway
    finally:
        if underway.process.poll() is None:
            underway.kill()
        # It has been finished by the test already, unless that failed.
        with contextlib.suppress(ValueError):
            underway.finish()


@contextlib.contextmanager
def held_unheard(under: Threatened) -> Iterator[str]:
    """B holds a copy, and A's coordinator, stopped in the restore, does not hear of it; it is
    killed with the block. The migration's id."""
    brake, target = Brake(under.lab.host("B")), under.lab.host("B")
    with brake.on("restore"), attempt(under) as underway:
        brake.wait_reached(underway)
        session = migration_id(underway)
        underway.interrupt(signal.SIGSTOP)
        brake.release()
        wait_session(target, session, "held")
        assert is_held(target, under.name)
        yield session


def migration_id(underway: Underway) -> str:
    """Of a migration that has a session; waits for that."""
    wait_until("a session", lambda: underway.events("started") or _ended(underway))
    return str(underway.events("started")[0]["migration_id"])


def wait_round(underway: Underway) -> None:
    """Returns when the first round is well under way."""

    def moving() -> bool:
        told = underway.events("progress")
        return (bool(told) and told[-1]["bytes_done"] > 0) or _ended(underway)

    wait_until("pages travel", moving)


def session_states(host: Host, migration: str) -> list[str]:
    """The states that a session has entered, by the agent's log."""
    pattern = rf"event='session' migration='{migration}' state='(\w+)'"
    return re.findall(pattern, host.read_text(AGENT_LOG))


def wait_session(host: Host, migration: str, state: str) -> None:
    """Returns as soon as a session has entered a state."""
    wait_until(f"session {state}", lambda: state in session_states(host, migration))


def _ended(underway: Underway) -> bool:
    assert underway.process.poll() is None, f"ended: {underway.stdout[-2000:]} {underway.stderr}"
    return False


# ---- the whole lab ----

UNFINISHED: Final = """
from migrate.journal import Journal
with Journal.open_read_only(Path("/var/lib/migrate/journal.sqlite")) as journal:
    found = journal.unfinished()
    answer([[one.migration_id, one.role, records[-1].state] for one, records in found])
"""


@contextlib.contextmanager
def failure_lab() -> Iterator[Lab]:
    """Two hosts with agents; when the tests are over there is nothing left on either, and neither
    journal has an open question."""
    with Lab(["A", "B"]) as lab:
        for host in lab.hosts:
            lab.start_agent(host.name, env=Brake(host).env)
        yield lab
        for host in lab.hosts:
            wait_clean(host)
            assert inside(host, UNFINISHED) == [], host.name
            assert "Traceback" not in host.read_text(AGENT_LOG), host.read_text(AGENT_LOG)
