"""What a lab host is: a machine of its own, with CRIU and a runtime that work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.lab import agents
from bench.lab.errors import LabCommandError, LabError
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.waiting import wait_until


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("A")


def test_criu_is_new_enough_and_content(host: Host) -> None:
    version = re.search(
        r"Version: (\d+)\.(\d+)(?:\.(\d+))?", host.run(["criu", "--version"]).stdout
    )
    assert version is not None
    assert tuple(int(part or 0) for part in version.groups()) >= (4, 2, 1)
    assert "Looks good" in host.run(["criu", "check"]).stdout


@pytest.fixture
def container(host: Host) -> Iterator[str]:
    """A running runc container on host A that sleeps; its programs are the host's."""
    name = f"plain-{os.getpid()}"
    bundle = f"/var/lib/migrate/{name}"
    host.run(["mkdir", "-p", f"{bundle}/rootfs/usr"])
    host.run(["ln", "-s", "usr/bin", "usr/lib", "usr/lib64", f"{bundle}/rootfs"])
    host.run(["runc", "spec", "--bundle", bundle])
    spec = json.loads(host.read_text(f"{bundle}/config.json"))
    spec["process"]["terminal"] = False
    spec["process"]["args"] = ["/bin/sleep", "1000"]
    usr = {"destination": "/usr", "source": "/usr", "type": "bind", "options": ["bind", "ro"]}
    spec["mounts"] = [*spec["mounts"], usr]
    host.write_text(f"{bundle}/config.json", json.dumps(spec))
    # A container's output must not be the pipe that run() waits for.
    script = (
        f"exec runc run --detach --bundle {bundle} {name} >/dev/null 2>/run/{name}.log </dev/null"
    )
    started = host.run(["sh", "-c", script], check=False)
    assert started.returncode == 0, host.read_text(f"/run/{name}.log")
    yield name
    host.run(["runc", "delete", "--force", name])
    host.run(["rm", "-r", bundle, f"/run/{name}.log"])


def test_a_container_runs_in_a_cgroup_below_the_hosts(host: Host, container: str) -> None:
    state = json.loads(host.run(["runc", "state", container]).stdout)
    assert state["status"] == "running"
    # Seen from the machine: the container's process, in its own cgroup inside the lab's.
    inside = host.run(["grep", "^0:", f"/proc/{state['pid']}/cgroup"]).stdout.strip()
    cgroup = host.cgroup / inside.removeprefix("0::/")
    assert cgroup != host.cgroup
    assert len((cgroup / "cgroup.procs").read_text().split()) == 1
    host.run(["runc", "pause", container])
    assert (cgroup / "cgroup.freeze").read_text() == "1\n"
    host.run(["runc", "resume", container])


def test_a_host_sees_only_itself(lab: Lab, host: Host) -> None:
    script = (
        "hostname; readlink /proc/1/exe; grep ^0: /proc/self/cgroup; stat -f -c %T /sys/fs/cgroup"
    )
    lines = host.run(["sh", "-c", script]).stdout.splitlines()
    assert lines == ["A", "/usr/bin/catatonit", "0::/init.scope", "cgroup2fs"]
    assert host.run(["pgrep", "--count", "catatonit"]).stdout == "1\n"
    for namespace in ("mnt", "uts", "ipc", "pid", "net", "cgroup"):
        links = {Path(f"/proc/{pid}/ns/{namespace}").readlink() for pid in ("self", host.pid)}
        links |= {Path(f"/proc/{node.pid}/ns/{namespace}").readlink() for node in lab.hosts[1:]}
        assert len(links) == 3, namespace


def test_pid_1_reaps_orphans(host: Host) -> None:
    host.run(["sh", "-c", "(sleep 0.01 & ) >/dev/null 2>&1"])
    zombies = ["sh", "-c", "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l"]
    wait_until("no zombie is left", lambda: host.run(zombies).stdout == "0\n")


@pytest.mark.parametrize(
    "path", ["/opt/dolly/new", "/proc/sys/fs/pipe-max-size", "/proc/sys/vm/drop_caches", "/sys/new"]
)
def test_what_is_not_the_hosts_own_is_read_only(host: Host, path: str) -> None:
    done = host.run(["sh", "-c", f"echo 1 >{path}"], check=False)
    assert done.returncode != 0
    assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr


def test_the_source_is_this_projects(host: Host) -> None:
    here = Path(__file__)
    inside = Path("/opt/dolly") / here.relative_to(here.parents[2])
    assert host.read_text(inside) == here.read_text()
    assert host.run(["which", "migrate"]).stdout == "/usr/local/bin/migrate\n"


def test_disks_of_the_host_are_no_overlay(host: Host) -> None:
    for directory in ("/var/lib/migrate", "/var/lib/containers"):
        assert host.run(["stat", "-f", "-c", "%T", directory]).stdout != "overlayfs\n"
    # A journal with synchronous=FULL and WAL, on the host's own Python.
    script = (
        "import sqlite3; db = sqlite3.connect('/var/lib/migrate/probe.sqlite');"
        "print(db.execute('PRAGMA journal_mode=WAL').fetchone()[0]);"
        "db.execute('CREATE TABLE t (x)'); db.commit()"
    )
    assert host.run(["python3", "-c", script]).stdout == "wal\n"
    host.run(["sh", "-c", "rm /var/lib/migrate/probe.sqlite*"])


def test_every_library_of_the_project_is_there(host: Host) -> None:
    modules = (
        "aiohttp click cryptography google.protobuf msgspec numpy paramiko prometheus_client psutil"
        " pycriu pyroute2 rich structlog xxhash zstandard"
    )
    host.run(["python3", "-c", f"import {', '.join(modules.split())}"])


def test_a_command_gets_the_hosts_environment_and_its_own(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTSIDE", "leaks")
    environment = host.run(["env"], env={"INSIDE": "yes"}).stdout.splitlines()
    assert "INSIDE=yes" in environment
    assert "HOME=/root" in environment
    assert not [line for line in environment if line.startswith(("OUTSIDE", "PYTHON"))]


def test_a_failure_shows_what_the_command_wrote(host: Host) -> None:
    with pytest.raises(LabCommandError, match=r"(?s)on A: .*status 3.*out here.*err here"):
        host.run(["sh", "-c", "echo out here; echo err here >&2; exit 3"])
    assert host.run(["sh", "-c", "cat; exit 3"], input="in", check=False).stdout == "in"


def _running(host: Host, marker: str) -> bool:
    return host.run(["pgrep", "--full", f"^sleep {marker}"], check=False).returncode == 0


def test_a_command_out_of_time_is_killed_inside(host: Host) -> None:
    with pytest.raises(LabCommandError, match="not through after"):
        host.run(["sleep", "1234.5"], timeout_s=0.2)
    wait_until("the command is gone", lambda: not _running(host, "1234.5"))


def test_kill_reaches_the_command_and_signal_sends_another(host: Host) -> None:
    killed = host.popen(["sleep", "2345.6"])
    wait_until("it runs", lambda: _running(host, "2345.6"))
    killed.kill()
    killed.wait()
    wait_until("the command is gone", lambda: not _running(host, "2345.6"))
    trapping = [
        "sh",
        "-c",
        "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.01; done",
    ]
    with host.popen(trapping, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        host.signal(process, signal.SIGINT)
        assert process.stdout.read() == "caught\n"
    assert process.returncode == 5


def test_a_host_comes_back_from_a_crash_with_its_disks(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"])
    host = lab.host("B")
    host.write_text("/var/lib/migrate/kept", "on disk")
    host.write_text("/etc/kept", "in the root", mode=0o600)
    host.write_text("/run/lost", "in memory")
    before = host.pid
    lab.crash("B")
    assert not Path(f"/proc/{before}").exists()
    with pytest.raises(LabError, match="B has crashed"):
        host.run(["true"])
    assert lab.host("A").run(["ping", "-4", "-c1", "-W1", "B"], check=False).returncode != 0
    lab.boot("B")
    assert host.pid != before
    assert host.read_text("/var/lib/migrate/kept") == "on disk"
    assert host.read_text("/etc/kept") == "in the root"
    assert not host.path("/run/lost").exists()
    assert lab.host("A").run(["ssh", "B", "hostname"]).stdout == "B\n"


def _replace_migrate(lab: Lab, script: str) -> None:
    for each in lab.hosts:
        each.write_text("/usr/local/bin/migrate", f"#!/bin/sh\n{script}\n", mode=0o755)


def test_start_agents_returns_when_every_agent_listens(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"])
    listener = f"TCP-LISTEN:{agents.PORT},fork,reuseaddr"
    # The listener comes late: a start that did not wait would find nobody.
    _replace_migrate(lab, f'test "$1" = agent && sleep 0.3 && exec socat {listener} EXEC:hostname')
    lab.start_agents()
    for each in lab.hosts:
        dial = ["socat", "-u", f"TCP:{each.address}:{agents.PORT}", "STDOUT"]
        assert lab.client.run(dial).stdout == f"{each.name}\n"


def test_an_agent_that_ends_fails_the_start_with_its_log(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A"])
    _replace_migrate(lab, "echo no certificate >&2; exit 3")
    with pytest.raises(LabError, match=r"(?s)agent on A ended.*no certificate"):
        lab.start_agents()


def test_a_killed_agent_is_gone_and_can_be_started_again(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A"])
    # Its answer is a variable that only the second start gives it.
    answer = "SYSTEM:'echo instance $INSTANCE'"
    _replace_migrate(lab, f"exec socat TCP-LISTEN:{agents.PORT},fork,reuseaddr {answer}")
    dial = ["socat", "-u", f"TCP:{lab.host('A').address}:{agents.PORT}", "STDOUT"]
    lab.start_agents()
    lab.kill_agent("A")
    assert lab.client.run(dial, check=False).returncode != 0
    lab.start_agent("A", env={"INSTANCE": "two"})
    assert lab.client.run(dial).stdout == "instance two\n"
