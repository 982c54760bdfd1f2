"""Migrations that are refused before anything is touched, and what is said then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest

from bench.containers import ContainerSpec, create, remove, start, state
from bench.lab.lab import Lab
from bench.probe_process import PYTHON_INSIDE
from tests.lab.invariants import (
    SLOW,
    Threatened,
    assert_undone,
    attempt,
    explained,
    failure_lab,
    migration_id,
    threatened,
    wait_round,
)
from tests.lab.migrating import migrate, running_on, wait_clean

NAME: Final = "refused"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


@pytest.fixture(scope="module")
def under(lab: Lab) -> Iterator[Threatened]:
    """One container for all of them, since none touches it."""
    with threatened(lab, NAME) as under:
        yield under


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "B", "--frobnicate"], "--frobnicate"),
        (["--to", "B:x"], "'x' is not a port"),
        (["--to", "B", "--max-rounds", "0"], "--max-rounds"),
        (["--to", "B", "--report", "/nowhere/report.json"], "/nowhere is no directory"),
        ([], "--to"),
    ],
)
def test_wrong_usage(lab: Lab, arguments: list[str], words: str) -> None:
    done = lab.host("A").run(["migrate", NAME, *arguments], check=False)
    assert (done.returncode, done.stdout) == (2, "")
    usage, *_, error = done.stderr.splitlines()
    assert usage.startswith("Usage: ")
    assert error.startswith("Error: ")
    assert words in error


@pytest.mark.parametrize("name", ["../x", "-x", "a b", "x" * 65])
def test_a_name_that_is_none(lab: Lab, name: str) -> None:
    command = ["migrate", "container", "--to", "B", "--", name]
    done = lab.host("A").run(command, check=False)
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert "is not a container name" in error


def test_a_container_that_does_not_exist(lab: Lab) -> None:
    told = explained(migrate(lab.host("A"), "nobody", "B"), code=2)
    assert told.error == "runc has no container nobody in /run/runc"
    assert (told.host, told.container) == ("A", "")


# ---- the other host ----


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere", "no host is known by the name nowhere"),
        ("B:7399", "Connection refused"),
        ("10.77.0.199", "No route to host"),
        ("192.0.2.1", "Network is unreachable"),
    ],
)
def test_a_host_that_does_not_answer(under: Threatened, target: str, words: str) -> None:
    told = explained(migrate(under.lab.host("A"), NAME, target))
    assert words in told.error
    assert told.host == target.partition(":")[0]
    assert told.container == "runs on A"
    assert told.remedy


def test_to_the_host_where_it_runs(under: Threatened) -> None:
    told = explained(migrate(under.lab.host("A"), NAME, "A"), code=2)
    assert "same-host" in told.refusals
    assert_undone(under)


def test_a_container_of_that_name_runs_there(under: Threatened) -> None:
    """It must go on, with all its files."""
    lab = under.lab
    other = ContainerSpec(
        NAME, "memory", memory_mib=4, address="10.77.0.3/24", address6=None, mac="02:42:00:00:00:03"
    )
    create(lab.host("B"), other)
    start(lab.host("B"), NAME)
    try:
        told = explained(migrate(lab.host("A"), NAME, "B"), code=2)
        assert {"name-taken", "path-taken"} <= told.refusals.keys()
        assert all(remedy for _, remedy in told.refusals.values())
        assert running_on(lab, NAME) == ["A", "B"]
    finally:
        remove(lab.host("B"), NAME)
    assert_undone(under)


# $1 the name: what may be there already; how it goes again.
TAKEN: Final = {
    "bundle": (
        "mkdir -p /var/lib/migrate/containers/$1; touch /var/lib/migrate/containers/$1/precious",
        "rm /var/lib/migrate/containers/$1/precious && rmdir /var/lib/migrate/containers/$1",
    ),
    "namespace": ("ip netns add $1", "ip netns delete $1"),
    "cgroup": ("mkdir -p /sys/fs/cgroup/dolly/$1", "rmdir /sys/fs/cgroup/dolly/$1"),
}


@pytest.mark.parametrize("what", TAKEN)
def test_something_of_that_name_is_there(under: Threatened, what: str) -> None:
    """It is refused, and stays as it is."""
    make, unmake = TAKEN[what]
    target = under.lab.host("B")
    target.run(["sh", "-c", make, "make", NAME])
    told = explained(migrate(under.lab.host("A"), NAME, "B"), code=2)
    ((code, (message, remedy)),) = told.refusals.items()
    assert code == ("cgroup-taken" if what == "cgroup" else "path-taken")
    assert NAME in message
    assert remedy
    assert told.container == "runs on A"
    target.run(["sh", "-c", unmake, "unmake", NAME])
    wait_clean(target)


def test_a_host_without_memory(under: Threatened) -> None:
    """By a /proc/meminfo that says so."""
    target = under.lab.host("B")
    fake = "sed 's/^MemAvailable:.*/MemAvailable: 65536 kB/' /proc/meminfo >/run/meminfo"
    target.run(["sh", "-c", f"{fake}; mount --bind /run/meminfo /proc/meminfo"])
    told = explained(migrate(under.lab.host("A"), NAME, "B"), code=2)
    target.run(["sh", "-c", "umount /proc/meminfo; rm /run/meminfo"])
    message, remedy = told.refusals["memory"]
    assert "64 MiB" in message
    assert remedy
    assert told.host == "B"


def test_a_host_without_disk(under: Threatened) -> None:
    target, where = under.lab.host("B"), "/var/lib/migrate/containers"
    target.run(["sh", "-c", f"mkdir -p {where}; mount -t tmpfs -o size=1m none {where}"])
    told = explained(migrate(under.lab.host("A"), NAME, "B"), code=2)
    target.run(["umount", where])
    message, remedy = told.refusals["disk"]
    assert "1 MiB" in message
    assert remedy


# `migrate` with an identifier, a journal and claims of the test's own.
KNOWN_ID: Final = """
import sys
from pathlib import Path
from migrate import cli, config, moving
identifier, real = sys.argv.pop(1), config.HostPaths
config.HostPaths = lambda: real(state=Path("/run/other"), run=Path("/run/other/run"))
moving.new_migration_id = lambda: identifier
cli.main()
"""


def test_a_session_of_the_same_identifier(under: Threatened) -> None:
    """The one that is under way is not disturbed: it can even be reached again."""
    lab, source = under.lab, under.lab.host("A")
    other = ContainerSpec("other", "memory", memory_mib=4, address="10.77.0.5/24", address6=None)
    create(source, other)
    try:
        start(source, other.name)
        lab.set_rate("A", SLOW)
        with attempt(under) as underway:
            wait_round(underway)
            command = ["python3", "-c", KNOWN_ID, migration_id(underway), other.name, "--to", "B"]
            refused = source.run(command, env=PYTHON_INSIDE, check=False)
            assert refused.returncode == 2, refused.stderr
            assert "[session-known]" in refused.stderr
            underway.interrupt()
            assert explained(underway.finish()).error == "the migration was cancelled"
    finally:
        remove(source, other.name)
        source.run(["rm", "-rf", "/run/other"])
    assert_undone(under)


# ---- the container ----


def test_a_container_that_criu_can_not_move(lab: Lab) -> None:
    spec = ContainerSpec("ring", "blocker", args=("io_uring",), address="10.77.0.4/24")
    source = lab.host("A")
    create(source, spec)
    try:
        start(source, spec.name)
        told = explained(migrate(source, spec.name, "B"), code=2)
        assert told.host == "A"
        ((code, (message, remedy)),) = told.refusals.items()
        assert code == "io-uring", told
        assert message
        assert remedy
        assert state(source, spec.name) == "running"
        wait_clean(lab.host("B"))
    finally:
        remove(source, spec.name)


def test_after_all_that_it_is_untouched(under: Threatened) -> None:
    assert_undone(under)
