"""Every tracker on a kernel that has all of them, which the one below a lab may not have.

The memory workload writes to 512 KiB of 128 MiB without a pause, so a round after the first has
those pages, and what the program keeps of them besides.
"""

from __future__ import annotations

import re
import shutil
import statistics
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec, pid
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.criu_glue.soft_dirty_scenes import SCENES
from tests.lab.compiling import compiled
from tests.lab.inside import inside
from tests.lab.migrating import Resident, migrate, resident, running_on, wait_clean
from tests.vm.kernels import trackers

PAGE_BYTES: Final = 4096
MEMORY_MIB: Final = 128
PAGES: Final = (MEMORY_MIB << 20) // PAGE_BYTES
LATER_SHARE_MAX: Final = 0.01
# What can be compressed costs an emulated processor less on its way.
WRITING: Final = ("1", "--hot-mib", "0.5", "--text", "90")
# A round of a slow machine is long, and a container that writes all the time does not converge.
OPTIONS: Final = ("--max-rounds", "3", "--on-stall", "freeze")
# How the target's CRIU fails: after all tasks were restored (FI_POST_RESTORE).
FAILING: Final = {"CRIU_FAULT": "6"}
PUPPET: Final = Path(__file__).parents[1] / "criu_glue/programs/puppet.c"
HUGE_PAGES: Final = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
TRANSPARENT: Final = "/sys/kernel/mm/transparent_hugepage/enabled"
# Who has the container go there and back; soft-dirty does that below, too.
TURNS: Final = (*("predump", "write-protect") * 3, "soft-dirty")
# A move of this memory takes a minute where other work goes on beside.
LONG_S: Final = 4 * 3600
PLAY: Final = """
from tests.criu_glue.soft_dirty_scenes import play_all
answer(play_all(Path(given)))
"""


@pytest.mark.ci
def test_the_kernels_bits_say_what_was_written(machines: Lab, tmp_path: Path) -> None:
    host, program = machines.host("A"), "/root/puppet"
    subprocess.run(["gcc", "-O1", "-static", "-pthread", "-o", tmp_path / "p", PUPPET], check=True)
    shutil.copy2(tmp_path / "p", host.path(program))
    played = inside(host, PLAY, program, timeout_s=60.0 * host.patience)
    host.path(program).unlink()
    assert played == [scene.__name__ for scene in SCENES]


def spec_of(name: str, last: int) -> ContainerSpec:
    address = f"10.77.0.{last}/24"
    return ContainerSpec(name, "memory", args=WRITING, memory_mib=MEMORY_MIB, address=address)


def move(guest: Resident, source: str, target: str, tracker: str) -> dict[str, Any]:
    """A migration that succeeds, leaves nothing, and sends little after its first round."""
    lab = guest.lab
    moved = migrate(lab.host(source), guest.name, target, "--tracker", tracker, *OPTIONS)
    report = moved.done
    assert (report["tracker"], report["tracker_reason"]) == (tracker, "it was asked for")
    assert running_on(lab, guest.name) == [target]
    wait_clean(lab.host(source))
    wait_clean(lab.host(target), guest.name)
    first, *later = report["rounds"]
    assert first["pages"] + first["zero_pages"] >= PAGES * 99 // 100
    assert len(later) >= 2
    assert all(one["pages"] < PAGES * LATER_SHARE_MAX for one in later), report["rounds"]
    # One to three rounds of the report are of the freeze (`migrate/standstill.py`).
    stills = len(report["stills_ms"])
    assert stills == 0 if tracker == "write-protect" else 1 <= len(later) + 1 - stills <= 3
    guest.verify()
    guest.wait_answers()
    return report


@pytest.mark.timeout(LONG_S)
def test_every_tracker_there_and_back(machines: Lab) -> None:
    """In turns with the same container, so that they can be compared."""
    reports: dict[str, list[dict[str, Any]]] = {tracker: [] for tracker in trackers(machines)}
    with resident(machines, spec_of("vm-trackers", 62), rate_per_s=20) as guest:
        for tracker in TURNS:
            if tracker in reports:
                reports[tracker].append(move(guest, "A", "B", tracker))
                reports[tracker].append(move(guest, "B", "A", tracker))
        assert guest.stop_probe().clean
    for tracker, moves in reports.items():
        print(compared(tracker, moves))


def compared(tracker: str, moves: list[dict[str, Any]]) -> str:
    """For the tables of decision 0022; shown by pytest -s."""
    later = [one for report in moves for one in report["rounds"][1:]]
    parts = ("freeze", "dump", "final_delta", "restore")
    columns = {
        "pages of a first round": [report["rounds"][0]["pages"] for report in moves],
        "pages of a later one": [one["pages"] for one in later],
        "bytes of a later one": [one["bytes_sent"] for one in later],
        "ms still in a round": [still for report in moves for still in report["stills_ms"]],
        **{f"ms {part}": [report["downtime_parts_ms"][part] for report in moves] for part in parts},
        "ms downtime": [report["downtime_ms"] for report in moves],
    }
    rows = [f"{tracker}, {len(moves)} moves:"]
    for name, values in columns.items():
        if values:
            least, middle, most = min(values), statistics.median(values), max(values)
            rows.append(
                f"  {name}: {least:.0f} to {most:.0f}, median {middle:.0f} (n={len(values)})"
            )
    return "\n".join(rows)


@pytest.mark.timeout(LONG_S)
@pytest.mark.parametrize(("tracker", "last"), [("soft-dirty", 63), ("predump", 64)])
def test_after_a_failed_restore_all_is_sent_again(machines: Lab, tracker: str, last: int) -> None:
    """The migration that failed has cleared the bits: they say nothing any more. There and back."""
    with resident(machines, spec_of("vm-again", last), rate_per_s=20) as guest:
        for source, target in ("AB", "BA"):
            fail(guest, source, target, tracker)
            move(guest, source, target, tracker)
        assert guest.stop_probe().clean


def fail(guest: Resident, source: str, target: str, tracker: str) -> None:
    """A migration whose restore fails: the container runs where it was, and nothing is left."""
    lab = guest.lab
    restart_agent(lab, target, FAILING)
    failed = migrate(lab.host(source), guest.name, target, "--tracker", tracker, *OPTIONS)
    restart_agent(lab, target, {})
    assert failed.code == 1
    assert f"runs on {source}" in failed.stderr
    assert running_on(lab, guest.name) == [source]
    wait_clean(lab.host(source), guest.name)
    wait_clean(lab.host(target))
    guest.verify()
    guest.wait_answers()


def restart_agent(lab: Lab, name: str, env: Mapping[str, str]) -> None:
    lab.kill_agent(name)
    lab.start_agent(name, env=env)


@pytest.fixture
def _huge_pages(machines: Lab) -> Iterator[None]:
    """Both machines have some of either kind, and use transparent ones wherever they can."""
    settings = ((TRANSPARENT, "always", "madvise"), (HUGE_PAGES, "8", "0"))
    try:
        for host in machines.hosts:
            # A machine that has run for a while has its free memory in small pieces.
            host.run(["sysctl", "-q", "vm.drop_caches=3", "vm.compact_memory=1"])
            for path, value, _ in settings:
                host.write_text(path, value)
            assert host.read_text(HUGE_PAGES).strip() == "8"
        yield
    finally:
        for host in machines.hosts:
            for path, _, before in settings:
                host.write_text(path, before)


@pytest.mark.usefixtures("_huge_pages")
def test_memory_of_every_kind(machines: Lab, tmp_path: Path) -> None:
    """Huge pages of both kinds, what is locked, and what grows downwards."""
    program = compiled("kinds_memory", tmp_path)
    spec = ContainerSpec("vm-kinds", "memory", args=("1",), address="10.77.0.70/24")
    with resident(machines, spec, program=program, rate_per_s=20) as guest:
        host = machines.host("A")
        assert kinds_of(host, guest.name) >= {"ht", "lo", "huge"}
        report = migrate(host, guest.name, "B", "--tracker", "soft-dirty", *OPTIONS).done
        assert any("transparent huge pages" in text for text in report["warnings"])
        assert running_on(machines, guest.name) == ["B"]
        # A lazy restore fills memory page by page: nothing is transparently huge after it.
        assert kinds_of(machines.host("B"), guest.name) >= {"ht", "lo"}
        guest.verify()
        guest.wait_answers()
        assert guest.stop_probe().clean


def kinds_of(host: Host, name: str) -> set[str]:
    """The flags of all mappings of a container's first process (proc(5): VmFlags), and "huge" if
    it has transparent huge pages."""
    rows = host.read_text(f"/proc/{pid(host, name)}/smaps").splitlines()
    flags = {flag for row in rows if row.startswith("VmFlags:") for flag in row.split()[1:]}
    is_huge = any(re.fullmatch(r"AnonHugePages: +[1-9]\d* kB", row) for row in rows)
    return flags | ({"huge"} if is_huge else set())
