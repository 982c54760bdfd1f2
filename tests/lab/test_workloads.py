"""The workloads in containers of a lab host: clients reach them, and a checkpoint carries them.

The checkpoints here are plain ones of runc, restored on the same host: they show that what the
workloads do can be carried over, and what CRIU by itself refuses or loses.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from bench import containers
from bench.containers import ContainerError, ContainerSpec
from bench.probe_process import ProbeProcess, run_module, start_probe
from tests.lab.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.lab.host import Host
    from bench.lab.lab import Lab

IMAGES: Final = "/var/lib/migrate/workload-images"
CONFIGURATION: Final = "manage-cgroups ignore\ntcp-established\nghost-limit 1M\n"
ADDRESS: Final = "10.77.0.71/24"
ADDRESS6: Final = "fd77::71/112"
REDIS_MIB: Final = 16
CAP_SYS_RESOURCE: Final = 24


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("A")


@pytest.fixture
def run(host: Host) -> Iterator[Callable[..., ContainerSpec]]:
    """Runs a container of a workload; removes it after the test."""
    names = []

    def start(workload: str, *args: str, **more: Any) -> ContainerSpec:
        places = {"address": ADDRESS, "address6": ADDRESS6}
        spec = ContainerSpec(f"wl-{workload}", workload, args, **(places | more))
        names.append(spec.name)
        containers.create(host, spec)
        containers.start(host, spec.name)
        return spec

    yield start
    for name in names:
        containers.remove(host, name)
    host.run(["rm", "-rf", IMAGES])


def ask(lab: Lab, spec: ContainerSpec, *lines: str, address: str = "") -> list[str]:
    where = address or spec.ip
    return run_module(lab.client, "bench.workloads.ask", where, str(spec.port), *lines).splitlines()


def runc(host: Host, spec: ContainerSpec, command: str, *options: str) -> str:
    """Runs `runc checkpoint` or `runc restore`; returns "" or the errors of CRIU's log."""
    host.run(["mkdir", "-p", IMAGES])
    host.write_text(f"{IMAGES}/criu.conf", CONFIGURATION)
    script = f"""
        export CRIU_CONFIG_FILE={IMAGES}/criu.conf
        cd {containers.bundle_path(spec.name)}
        runc {command} --tcp-established --file-locks --image-path {IMAGES} --work-path {IMAGES} \
            "$@" {spec.name} </dev/null >/dev/null 2>&1 && exit 0
        grep -a Error {IMAGES}/*.log | grep -v RLIMIT_NOFILE; exit 1
    """
    result = host.run(["sh", "-c", script, "runc", *options], check=False)
    return "" if result.returncode == 0 else result.stdout or "failed without an error in the log"


def checkpoint_and_restore(host: Host, spec: ContainerSpec) -> None:
    assert runc(host, spec, "checkpoint") == ""
    assert runc(host, spec, "restore", "--detach") == ""
    assert containers.state(host, spec.name) == "running"


def redis(lab: Lab, spec: ContainerSpec, act: str, *options: str) -> None:
    """Fills or verifies; a verdict that is not ok raises."""
    where = (spec.ip, str(spec.port), f"--mib={REDIS_MIB}")
    report = json.loads(run_module(lab.client, "bench.workloads.redis_data", act, *where, *options))
    assert report["ok"]
    assert report["keys"] == REDIS_MIB * 256


def faults(lab: Lab, spec: ContainerSpec) -> dict[str, str]:
    verdicts: dict[str, str] = json.loads(ask(lab, spec, "CHECK")[0])
    return {name: verdict for name, verdict in verdicts.items() if verdict != "ok"}


def counters(lab: Lab, spec: ContainerSpec) -> dict[str, int]:
    answer = json.loads(ask(lab, spec, "COUNTERS")[0])
    counts: dict[str, int] = dict(answer["progress"])
    for process, beats in enumerate(answer["beats"]):
        counts |= {f"{process}.{thread}": beat for thread, beat in enumerate(beats)}
    return counts


# ---- containers and their clients ----


def test_clients_reach_a_container_by_both_families(
    lab: Lab, run: Callable[..., ContainerSpec]
) -> None:
    spec = run("memory", "10", "--text", "30", memory_mib=16)
    assert spec.ip6 is not None
    with (
        start_probe("lines", spec.ip, spec.port, host=lab.client) as probe,
        start_probe("lines", spec.ip6, spec.port, host=lab.client, rate_per_s=200) as probe6,
    ):
        answers = ask(lab, spec, "VERIFY", "STATS", address=spec.ip6)
        reports = [probe.stop(), probe6.stop()]
    assert answers[0].startswith("VERIFY ok pages=4096 bad=0 ")
    assert all(report.clean for report in reports), reports


def test_container_is_what_its_spec_says(
    lab: Lab, host: Host, run: Callable[..., ContainerSpec]
) -> None:
    # An address of its own: the client still knows the other one's hardware address.
    spec = run(
        *("blocker", "idle"),
        address="10.77.0.72/24",
        address6="fd77::72/112",
        mac="02:00:00:00:07:01",
        gateway="10.77.0.1",
        seccomp=True,
    )
    status = host.read_text(f"/proc/{containers.pid(host, spec.name)}/status")
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    inside = ["ip", "netns", "exec", spec.name]
    link = json.loads(host.run([*inside, "ip", "-j", "address", "show", "dev", "eth0"]).stdout)[0]
    assert link["address"] == "02:00:00:00:07:01"
    assert {"10.77.0.72", "fd77::72"} <= {entry["local"] for entry in link["addr_info"]}
    assert "via 10.77.0.1" in host.run([*inside, "ip", "route", "show", "default"]).stdout
    port = json.loads(host.run(["ip", "-j", "link", "show", "dev", "v-wl-blocker"]).stdout)[0]
    assert port["master"] == "br0"
    assert ask(lab, spec, "KIND") == ["KIND idle ok"]


def test_removal_leaves_nothing(host: Host, run: Callable[..., ContainerSpec]) -> None:
    spec = run("blocker", "idle")
    with pytest.raises(ContainerError, match="already has a container wl-blocker"):
        containers.create(host, spec)
    for _ in range(2):
        containers.remove(host, spec.name)
        assert containers.state(host, spec.name) == "absent"
    remains = host.run(
        [
            *("sh", "-c", 'ip link show dev "$1"; ls -d "$2" /run/netns/"$3" "$4"', "remains"),
            *(containers.host_device(spec.name), containers.bundle_path(spec.name), spec.name),
            f"/sys/fs/cgroup/dolly/{spec.name}",
        ],
        check=False,
    )
    assert remains.stdout == ""


def test_container_that_ends_at_once_is_an_error(
    host: Host, run: Callable[..., ContainerSpec]
) -> None:
    with pytest.raises(ContainerError, match="wl-blocker on A ended by itself"):
        run("blocker", "no-such-kind")
    assert containers.state(host, "wl-blocker") == "stopped"


def test_container_that_the_runtime_refuses_is_an_error(host: Host) -> None:
    spec = ContainerSpec("wl-refused", "blocker", address=ADDRESS, address6=None)
    containers.create(host, spec)
    try:
        configuration = host.path(f"{containers.bundle_path(spec.name)}/config.json")
        # They are the lab's, and say who is to start it.
        annotations = json.loads(configuration.read_text())["annotations"]
        configuration.write_text(json.dumps({"annotations": annotations}))
        with pytest.raises(ContainerError, match=r"wl-refused on A: .*level=error"):
            containers.start(host, spec.name)
    finally:
        containers.remove(host, spec.name)


@pytest.mark.parametrize(
    "name", ["", "UPPER", "a_b", "a" * 14, "-a", "../a"], ids=lambda name: name or "empty"
)
def test_names_that_no_device_can_have_are_refused(name: str) -> None:
    with pytest.raises(ContainerError, match="container name"):
        ContainerSpec(name, "memory")


def test_redis_holds_what_it_was_filled_with(lab: Lab, run: Callable[..., ContainerSpec]) -> None:
    spec = run("redis")
    redis(lab, spec, "fill")
    redis(lab, spec, "verify")
    overwrite = ["redis-cli", "-h", spec.ip, "SETRANGE", "fill:00000077", "2000", "x"]
    lab.client.run(overwrite)
    with pytest.raises(Exception, match="fill:00000077: content of version 0 is wrong"):
        redis(lab, spec, "verify")


def test_redis_uses_no_io_uring(host: Host, run: Callable[..., ContainerSpec]) -> None:
    """CRIU can dump none; Redis of other builds does (criu issue 2131)."""
    spec = run("redis")
    descriptors = host.path(f"/proc/{containers.pid(host, spec.name)}/fd")
    links = [str(fd.readlink()) for fd in descriptors.iterdir()]
    assert "anon_inode:[eventpoll]" in links
    assert not [link for link in links if "io_uring" in link]


# ---- what a checkpoint carries over ----


@pytest.mark.parametrize("seccomp", [False, True])
def test_checkpoint_carries_memory(
    lab: Lab, host: Host, run: Callable[..., ContainerSpec], seccomp: bool
) -> None:
    spec = run("memory", "20", "--text", "30", "--zero", "10", memory_mib=32, seccomp=seccomp)
    with start_probe("lines", spec.ip, spec.port, host=lab.client) as probe:
        checkpoint_and_restore(host, spec)
        verdict = ask(lab, spec, "VERIFY")[0]
        report = probe.stop()
    assert verdict.startswith("VERIFY ok pages=8192 bad=0 ")
    assert report.clean, report


def test_checkpoint_carries_redis(lab: Lab, host: Host, run: Callable[..., ContainerSpec]) -> None:
    spec = run("redis")
    redis(lab, spec, "fill")
    versions = "/run/versions"
    writing = [spec.ip, str(spec.port), f"--mib={REDIS_MIB}", f"--versions={versions}"]
    assert spec.ip6 is not None
    with (
        start_probe("redis", spec.ip6, spec.port, host=lab.client) as probe,
        ProbeProcess("bench.workloads.redis_writer", writing, host=lab.client) as writer,
    ):
        writer.wait_connected()
        checkpoint_and_restore(host, spec)
        reports = [writer.stop(), probe.stop()]
    assert all(report.clean for report in reports), reports
    redis(lab, spec, "verify", f"--versions={versions}")
    # The writer did write: without its versions the values are not the expected ones.
    with pytest.raises(Exception, match="must be 0 to 0"):
        redis(lab, spec, "verify")


def test_checkpoint_carries_a_tree_of_processes(
    lab: Lab, host: Host, run: Callable[..., ContainerSpec]
) -> None:
    options = ["--stopped"]
    if effective_capabilities() & 1 << CAP_SYS_RESOURCE:
        options.append("--user")  # CRIU needs the capability for another user's process
    spec = run("tree", *options)
    with start_probe("lines", spec.ip, spec.port, host=lab.client) as probe:
        assert faults(lab, spec) == {}
        checkpoint_and_restore(host, spec)
        assert faults(lab, spec) == {}
        before = counters(lab, spec)

        def all_grew() -> bool:
            now = counters(lab, spec)
            return all(now[name] > count for name, count in before.items())

        wait_until("every counter of the restored tree grows", all_grew)
        assert faults(lab, spec) == {}
        report = probe.stop()
    assert report.clean, report


def test_checkpoint_loses_two_things_without_a_word(
    lab: Lab, host: Host, run: Callable[..., ContainerSpec]
) -> None:
    """If this fails, CRIU has learnt to keep them: then what warns of them is out of date."""
    spec = run("tree", "--beyond-criu")
    assert faults(lab, spec) == {}
    checkpoint_and_restore(host, spec)
    assert faults(lab, spec).keys() == {"timerfd_periodic", "eventfd_semaphore"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("io_uring", "send_fds failed"),
        ("memfd_secret", "secretmem"),
        ("mqueue", "Can't lookup mount=.* path=/blocker"),
        ("userfaultfd", r"Can't dump file .*\[userfaultfd\]"),
        ("perf_event", r"Can't dump file .*\[perf_event\]"),
        ("ghost", "Can't dump ghost file"),
    ],
)
def test_checkpoint_refuses_and_the_container_runs_on(
    lab: Lab, host: Host, run: Callable[..., ContainerSpec], kind: str, reason: str
) -> None:
    spec = run("blocker", kind)
    with start_probe("lines", spec.ip, spec.port, host=lab.client) as probe:
        assert ask(lab, spec, "KIND") == [f"KIND {kind} ok"]
        assert re.search(reason, runc(host, spec, "checkpoint"))
        assert containers.state(host, spec.name) == "running"
        report = probe.stop()
    assert report.clean, report


def effective_capabilities() -> int:
    """Of this process, which every host's processes have at most (capabilities(7))."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"^CapEff:\s+([0-9a-f]+)$", status, re.MULTILINE)
    assert match is not None
    return int(match.group(1), 16)
