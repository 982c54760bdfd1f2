"""Content that must arrive as it was: files that change while they are copied, memory over a slow
link; and content that need not travel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec, bundle_path
from bench.lab.lab import Lab
from tests.lab.compiling import compiled
from tests.lab.migrating import (
    Resident,
    migrate,
    resident,
    running_on,
)
from tests.lab.trees import check_tree, tree_counters

PAGE_BYTES: Final = 4096
RECORD: Final = "{:015d}\n"
KEEPER_MIB: Final = 16
ZERO_PERCENT: Final = 25
KEEPER: Final = ContainerSpec(
    "mv-keeper",
    "blocker",
    args=("keeper", str(KEEPER_MIB), str(ZERO_PERCENT), "1"),
    address="10.77.0.87/24",
    address6="fd77::87/112",
)
SLOW: Final = "400mbit"
MAPPED_MIB: Final = 128
DIRECTORIES: Final = 20
FILES: Final = 500


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """programs/keeper.c."""
    return compiled("keeper", tmp_path_factory.mktemp("programs"))


@pytest.fixture
def guest(agents: Lab, keeper: Path) -> Iterator[Resident]:
    with resident(agents, KEEPER, program=keeper) as guest:
        yield guest


def check(guest: Resident) -> None:
    """Files and memory as the keeper itself sees them."""
    (answer,) = guest.ask("CHECK")
    assert answer.startswith("CHECK ok "), answer


def data(guest: Resident, name: str) -> bytes:
    """A file of the container, read from outside, on the host that it runs on."""
    (host,) = running_on(guest.lab, guest.name)
    bundle = f"/var/lib/migrate/containers/{guest.name}"
    return guest.lab.host(host).path(f"{bundle}/rootfs/data/{name}").read_bytes()


def check_files(guest: Resident) -> None:
    """The files of the host it runs on are those that it works with."""
    stopped, answer = guest.ask("STOP", "CHECK")
    assert stopped == "STOP ok"
    assert answer.startswith("CHECK ok records="), answer
    records = int(answer.partition("=")[2])
    log = data(guest, "log")
    assert log == "".join(map(RECORD.format, range(records))).encode()
    # What is written to the file on this host is what the container has mapped: one file, not two.
    before = data(guest, "mapped")
    guest.ask("SPOIL")
    after = data(guest, "mapped")
    assert before != after
    assert before[8:] == after[8:]
    assert guest.ask("SPOIL", "CHECK", "GO")[1] == answer


def check_what_travelled(report: dict[str, Any]) -> None:
    """Zeros travelled as a mark, and pages that were written with what they held not again."""
    pages = KEEPER_MIB << 20 >> 12
    zeros = pages * ZERO_PERCENT // 100
    first, *later = report["rounds"]
    assert first["zero_pages"] >= zeros
    assert first["pages"] >= pages - zeros
    # A mark a run of pages, not a page: the content that travelled is all that there is.
    assert first["bytes_sent"] < (first["pages"] + zeros // 2) * PAGE_BYTES
    # Every page of the memory has been written again since, with what it held.
    assert sum(one["unchanged_pages"] for one in later) >= pages - zeros
    assert sum(one["pages"] for one in later) < pages // 4
    assert sum(one["bytes_sent"] for one in later) < pages // 4 * PAGE_BYTES


def test_files_and_memory_that_are_written_meanwhile(guest: Resident) -> None:
    lab = guest.lab
    check(guest)
    check_what_travelled(migrate(lab.host("A"), guest.name, "B").done)
    check_files(guest)
    migrate(lab.host("B"), guest.name, "A").done  # noqa: B018
    check_files(guest)
    assert guest.stop_probe().clean


def test_a_large_mapped_file_beside_many_others(agents: Lab, keeper: Path) -> None:
    """The last look at all files and the one at mapped files do not get in each other's way."""
    spec = replace(KEEPER, args=("keeper", "1", "0", str(MAPPED_MIB)))
    with resident(agents, spec, program=keeper) as guest:
        for number in range(DIRECTORIES):
            directory = guest.lab.host("A").path(f"{bundle_path(spec.name)}/rootfs/a/{number}")
            directory.mkdir(parents=True)
            for other in range(FILES):
                (directory / str(other)).touch()
        migrate(agents.host("A"), guest.name, "B").done  # noqa: B018
        check_files(guest)
        assert guest.stop_probe().clean


def test_rounds_over_a_slow_link(new_lab: Callable[..., Lab]) -> None:
    """Rounds take long there: tasks, mappings and children come and go between them, and pages are
    written while they are read."""
    lab = new_lab(["A", "B"], rate=SLOW)
    lab.start_agents()
    memory = ContainerSpec("mv-slow", "memory", args=("24", "--text", "30"), memory_mib=64)
    tree = ContainerSpec("mv-tree", "tree", address="10.77.0.51/24", address6="fd77::51/112")
    options = ["--max-downtime", "1", "--max-rounds", "4"]
    with resident(lab, memory) as guest:
        report = migrate(lab.host("A"), guest.name, "B", *options).done
        # The last two are the one while both sides prepare, and the final delta.
        assert len(report["rounds"]) >= 5
        guest.verify()
        assert guest.stop_probe().clean
    with resident(lab, tree) as guest:
        forks = tree_counters(guest)["forks"]
        report = migrate(lab.host("A"), guest.name, "B", *options).done
        assert len(report["rounds"]) >= 5
        check_tree(guest)
        assert tree_counters(guest)["forks"] > forks
        assert guest.stop_probe().clean
