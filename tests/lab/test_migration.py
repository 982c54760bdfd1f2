"""Containers that move from A to B and back while their clients stream: nothing is lost, all of the
memory is right, and nothing is left where they were."""

from __future__ import annotations

import itertools
from typing import Any, Final

import pytest

from bench import containers
from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.oci_spec import MASKED
from bench.probe_process import ProbeProcess, start_probe
from tests.lab.inside import inside
from tests.lab.migrating import (
    REDIS_MIB,
    VERSIONS,
    Resident,
    migrate,
    resident,
    running_on,
    wait_clean,
)
from tests.lab.trees import check_tree, tree_faults

PAGE_BYTES: Final = 4096
PAGES_PER_MIB: Final = (1 << 20) // PAGE_BYTES
DIRTIED_MIB_S: Final = 16
REPORT_KEYS: Final = {
    *("migration_id", "container", "runtime", "source", "target", "tracker", "restore", "outcome"),
    *("rounds", "downtime_ms", "downtime_parts_ms", "predicted_downtime_ms", "total_ms", "clock"),
    *("memory_bytes", "bytes_sent", "fill_ms", "faults", "error", "versions", "images_bytes"),
    *(
        "fault_p50_us",
        "fault_p99_us",
        "freeze_reason",
        "warnings",
        "throttle",
        "tracker_reason",
        "stills_ms",
        "held_frames",
        "prediction",
    ),
    "format",
}
ROUND_KEYS: Final = {
    *("number", "pages", "bytes_raw", "bytes_sent", "zero_pages", "unchanged_pages"),
    "duration_ms",
}
PARTS: Final = ["freeze", "dump", "final_delta", "rootfs", "restore", "handover", "resume"]


def move(guest: Resident, source: str, target: str, *options: str) -> dict[str, Any]:
    """A migration that succeeds and leaves nothing; its report."""
    lab = guest.lab
    report = migrate(lab.host(source), guest.name, target, *options).done
    assert running_on(lab, guest.name) == [target]
    wait_clean(lab.host(source))
    # No session and no pager either: the fill is over.
    wait_clean(lab.host(target), guest.name)
    return report


def check_report(report: dict[str, Any], source: str, target: str) -> None:
    """Every key is there, and figures that belong together agree."""
    assert report.keys() == REPORT_KEYS
    expected = {"runtime": "runc", "source": source, "target": target, "error": None, "format": 1}
    assert expected.items() <= report.items()
    assert report["versions"].keys() == {source, target}
    assert list(report["downtime_parts_ms"]) == PARTS
    parts = report["downtime_parts_ms"].values()
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(report["downtime_ms"], abs=1e-6)
    assert 0 < report["downtime_ms"] < report["total_ms"]
    assert report["predicted_downtime_ms"] > 0
    assert "ms of downtime are predicted" in report["freeze_reason"]
    assert report["clock"]["error_ms"] > 0
    rounds = report["rounds"]
    assert [one["number"] for one in rounds] == list(range(1, len(rounds) + 1))
    for one in rounds:
        assert one.keys() == ROUND_KEYS
        assert one["bytes_raw"] == one["pages"] * PAGE_BYTES
        assert one["duration_ms"] > 0
    # The rest are the image files.
    sent = sum(one["bytes_sent"] for one in rounds)
    assert report["bytes_sent"] - sent > 0
    assert report["images_bytes"] > 0


def hidden(host: Host, name: str) -> list[str]:
    """Where an empty tmpfs that nobody can write to is mounted over what the container is not to
    see."""
    root = f"/proc/{containers.pid(host, name)}"
    mounts = host.run(["cat", f"{root}/mountinfo"]).stdout.splitlines()
    found = []
    for mount in mounts:
        front, _, kind = mount.partition(" - ")
        where, options = front.split()[4:6]
        if where in MASKED and kind.startswith("tmpfs ") and "ro" in options.split(","):
            assert host.run(["ls", "-A", f"{root}/root{where}"]).stdout == ""
            assert host.run(["touch", f"{root}/root{where}/new"], check=False).returncode != 0
            found.append(where)
    return sorted(found)


def scheduling(host: Host, name: str) -> list[list[int]]:
    """Policy, priority and timer slack of a container's threads, each kind once."""
    script = """
group = Path("/sys/fs/cgroup/dolly", given, "cgroup.threads")
answer(sorted({
    (
        os.sched_getscheduler(int(one)),
        os.sched_getparam(int(one)).sched_priority,
        int(Path("/proc", one, "timerslack_ns").read_text()),
    )
    for one in group.read_text().split()
}))
"""
    found: list[list[int]] = inside(host, "import os\n" + script, name)
    return found


def test_memory_moves_there_and_back(agents: Lab) -> None:
    """With a seccomp filter, and clients over both families of addresses."""
    spec = ContainerSpec(
        "mv-memory",
        "memory",
        args=(str(DIRTIED_MIB_S), "--text", "30", "--zero", "10"),
        memory_mib=64,
        address="10.77.0.81/24",
        address6="fd77::81/112",
        seccomp=True,
    )
    assert spec.ip6 is not None
    with (
        resident(agents, spec) as guest,
        start_probe("lines", spec.ip6, spec.port, host=agents.client, rate_per_s=200) as probe6,
    ):
        masked = hidden(agents.host("A"), spec.name)
        assert "/sys/firmware" in masked
        scheduled = scheduling(agents.host("A"), spec.name)
        for source, target in (("A", "B"), ("B", "A")):
            report = move(guest, source, target)
            check_report(report, source, target)
            assert hidden(agents.host(target), spec.name) == masked
            # Those that restored it were more urgent than it is.
            assert scheduling(agents.host(target), spec.name) == scheduled
            assert (report["tracker"], report["restore"]) == ("write-protect", "lazy")
            assert report["warnings"] == []
            # Everything at first, then only what was written.
            first, *later = report["rounds"]
            pages = (spec.memory_mib << 20) // PAGE_BYTES
            # Zeros that the pager has filled in share the zero page: they do not travel back.
            zeros = first["zero_pages"] if source == "A" else pages // 10
            assert zeros > 0
            assert first["pages"] + zeros >= pages * 99 // 100
            assert len(later) >= 2
            for before, one in itertools.pairwise(report["rounds"]):
                # Twice as much as it writes in a second: it makes up for time that it did not get.
                written = 2 * DIRTIED_MIB_S * PAGES_PER_MIB * (before["duration_ms"] / 1000 + 1)
                assert one["pages"] + one["unchanged_pages"] <= written, report["rounds"]
            assert report["fill_ms"] > 0
            guest.verify()
            guest.wait_answers()
        # Nothing of either move is left that could take the mounts with it.
        wait_clean(agents.host("A"), spec.name)
        assert hidden(agents.host("A"), spec.name) == masked
        clients = [guest.stop_probe(), probe6.stop()]
    assert all(client.clean for client in clients), clients


def test_redis_moves_there_and_back(agents: Lab) -> None:
    spec = ContainerSpec("mv-redis", "redis", address="10.77.0.82/24", address6="fd77::82/112")
    versions = VERSIONS.format(name=spec.name)
    writing = [spec.ip, str(spec.port), f"--mib={REDIS_MIB}", f"--versions={versions}"]
    with resident(agents, spec) as guest:
        guest.redis("fill")
        with ProbeProcess("bench.workloads.redis_writer", writing, host=agents.client) as writer:
            writer.wait_connected()
            check_report(move(guest, "A", "B"), "A", "B")
            assert writer.alive()
            check_report(move(guest, "B", "A"), "B", "A")
            clients = [writer.stop(), guest.stop_probe()]
        assert all(client.clean for client in clients), clients
        guest.redis("verify", f"--versions={versions}")


def test_a_tree_of_processes_moves_there_and_back(agents: Lab) -> None:
    """Eight processes of four threads with 39 features of the kernel between them; tasks and
    mappings come and go between the rounds, which a slow link makes long."""
    spec = ContainerSpec(
        "mv-tree",
        "tree",
        args=("--stopped",),
        address="10.77.0.83/24",
        address6="fd77::83/112",
    )
    with resident(agents, spec) as guest:
        for source, target in (("A", "B"), ("B", "A")):
            assert tree_faults(guest) == {}
            check_report(move(guest, source, target), source, target)
            check_tree(guest)
        client = guest.stop_probe()
    assert client.clean, client


def test_what_criu_loses_without_a_word(agents: Lab) -> None:
    """If this fails, it is kept now: then what warns of the loss is out of date."""
    spec = ContainerSpec(
        "mv-beyond",
        "tree",
        args=("--beyond-criu", "--no-forks"),
        address="10.77.0.84/24",
        address6="fd77::84/112",
    )
    with resident(agents, spec) as guest:
        assert tree_faults(guest) == {}
        report = migrate(agents.host("A"), guest.name, "B").done
        # CRIU alone also loses periodic timers; criu_glue/core/timers.py mends that.
        assert tree_faults(guest).keys() == {"eventfd_semaphore"}
        (warning,) = report["warnings"]
        assert "eventfd" in warning
        assert guest.stop_probe().clean
