"""Trackers on a kernel that notes soft-dirty pages, which the one below a lab may not do.

The memory workload writes to 512 KiB of 128 MiB without a pause, so a round after the first has
those pages, and what the program keeps of them besides.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from tests.criu_glue.soft_dirty_scenes import SCENES
from tests.lab.inside import inside
from tests.lab.migrating import Resident, migrate, resident, running_on, wait_clean

PAGE_BYTES: Final = 4096
MEMORY_MIB: Final = 128
PAGES: Final = (MEMORY_MIB << 20) // PAGE_BYTES
LATER_SHARE_MAX: Final = 0.01
WRITING: Final = ("1", "--hot-mib", "0.5")
# A round of a slow machine is long, and a container that writes all the time does not converge.
OPTIONS: Final = ("--max-rounds", "3", "--on-stall", "freeze")
# How the target's CRIU fails: after all tasks were restored (FI_POST_RESTORE).
FAILING: Final = {"CRIU_FAULT": "6"}
PUPPET: Final = Path(__file__).parents[1] / "criu_glue/programs/puppet.c"
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
    # For the table of docs/facts.md; shown by pytest -s.
    shown = ("rounds", "stills_ms", "downtime_ms", "downtime_parts_ms", "bytes_sent")
    print(tracker, json.dumps({name: report[name] for name in shown}))
    assert first["pages"] + first["zero_pages"] >= PAGES * 99 // 100
    assert len(later) >= 2
    assert all(one["pages"] < PAGES * LATER_SHARE_MAX for one in later), report["rounds"]
    guest.verify()
    guest.wait_answers()
    return report


def test_crius_own_rounds_there_and_back(machines: Lab) -> None:
    with resident(machines, spec_of("vm-predump", 67), rate_per_s=20) as guest:
        move(guest, "A", "B", "predump")
        move(guest, "B", "A", "predump")
        assert guest.stop_probe().clean


def test_after_a_failed_restore_all_is_sent_again(machines: Lab) -> None:
    """The migration that failed has cleared the bits: they say nothing any more."""
    source, options = machines.host("A"), ("--tracker", "soft-dirty", *OPTIONS)
    with resident(machines, spec_of("vm-again", 63), rate_per_s=20) as guest:
        machines.kill_agent("B")
        machines.start_agent("B", env=FAILING)
        failed = migrate(source, guest.name, "B", *options)
        machines.kill_agent("B")
        machines.start_agent("B")
        assert failed.code == 1
        assert "runs on A" in failed.stderr
        assert running_on(machines, guest.name) == ["A"]
        wait_clean(source, guest.name)
        guest.verify()
        guest.wait_answers()
        move(guest, "A", "B", "soft-dirty")
        assert guest.stop_probe().clean
