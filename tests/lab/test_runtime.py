"""The drivers with real runtimes and a real CRIU; what both do alike is tried with runc."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.containers import ContainerSpec, bundle_path, create, pid, remove, start, state
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.inside import inside
from tests.lab.waiting import wait_until

SPEC = ContainerSpec("rt1", "memory", address="10.77.0.71/24", address6="fd77::71/112")
WORK = "/run/rt1"
# What a migration says to CRIU where runc has no words; the network is the test's own.
CRIU_CONFIG = "manage-cgroups ignore\nnetwork-lock skip\n"

DRIVER = """
from migrate.runtimes.known import drivers
driver = drivers()[Path("/run/rt1/runtime").read_text()]
"""
INSPECT = f"""{DRIVER}
container = driver.inspect("rt1")
fields = set(container.__slots__) - {{"mounts"}}
answer({{field: getattr(container, field) for field in fields}}
       | {{"mounts": [mount.destination for mount in container.mounts]}})
"""
COMMANDS = f"""{DRIVER}
from migrate.runtimes.command import descriptors_json
container = driver.inspect("rt1")
images, work = Path("/run/rt1/images"), Path("/run/rt1/work")
answer({{
    "checkpoint": driver.checkpoint_command(container, images, work, lazy=False),
    "lazy": driver.checkpoint_command(container, images, work, lazy=True),
    "restore": driver.restore_command("rt1", container.bundle, images, work, lazy=False),
    "descriptors": descriptors_json(container.descriptors).decode(),
}})
"""
STATES = f"""{DRIVER}
answer([driver.exists("rt1"), driver.state("rt1")])
"""
DELETE = f"""{DRIVER}
driver.kill("rt1")
for _ in range(2):
    driver.delete("rt1", bundle=Path("{bundle_path("rt1")}"))
answer([driver.exists("rt1"), driver.state("rt1")])
"""
# Stands before the real criu: notes what each request is, and holds those that are named in HOLD.
WRAPPER = """\
#!/usr/bin/python3 -ISE
import os, socket, sys, time
peer = socket.socket(fileno=int(sys.argv[2]))
kind = peer.recv(2, socket.MSG_PEEK)[1]
peer.detach()
with open("/run/rt1/requests", "a") as log:
    cgroup = open("/proc/self/cgroup").read().splitlines()[-1].removeprefix("0::")
    log.write(f"{kind} {cgroup}\\n")
while str(kind) in os.environ.get("HOLD", "").split() and not os.path.exists("/run/rt1/go"):
    time.sleep(0.01)
os.execv("/usr/sbin/criu", ["criu", *sys.argv[1:]])
"""


@pytest.fixture
def runtime() -> str:
    """Whose container it is."""
    return "runc"


with_both = pytest.mark.parametrize("runtime", ["runc", "crun"])


@pytest.fixture
def host(lab: Lab, runtime: str) -> Iterator[Host]:
    """Host A with a running container and a directory for its images."""
    host = lab.host("A")
    create(host, replace(SPEC, runtime=runtime))
    host.run(["mkdir", "-p", f"{WORK}/images", f"{WORK}/work", f"{WORK}/bin"])
    host.write_text(f"{WORK}/runtime", runtime)
    host.write_text(f"{WORK}/criu.conf", CRIU_CONFIG)
    host.write_text(f"{WORK}/bin/criu", WRAPPER, 0o755)
    try:
        start(host, SPEC.name)
        yield host
    finally:
        inside(host, DELETE)
        remove(host, SPEC.name)
        host.run(["rm", "-rf", WORK])


def environment(**more: str) -> dict[str, str]:
    path = f"{WORK}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"CRIU_CONFIG_FILE": f"{WORK}/criu.conf", "PATH": path, **more}


def detached(command: list[str], *, log: str) -> list[str]:
    """runc hands its own standard streams to what it restores."""
    return ["sh", "-c", f"exec {shlex.join(command)} </dev/null >/dev/null 2>{log}"]


def restore(host: Host, command: list[str], **more: str) -> None:
    log = f"{WORK}/restore.err"
    done = host.run(detached(command, log=log), env=environment(**more), check=False)
    assert done.returncode == 0, host.read_text(log)


def requests(host: Host) -> list[list[str]]:
    path = host.path(f"{WORK}/requests")
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def procs(host: Host) -> list[str]:
    """Read inside the host: outside the pids are others."""
    return host.run(["cat", "/sys/fs/cgroup/dolly/rt1/cgroup.procs"]).stdout.split()


def rootfs_files(host: Host) -> list[Path]:
    return sorted(host.path(f"{bundle_path(SPEC.name)}/rootfs").rglob("*"))


@with_both
def test_inspect_tells_what_the_runtime_knows(host: Host, runtime: str) -> None:
    container: dict[str, Any] = inside(host, INSPECT)
    spec = json.loads(host.read_text(f"{bundle_path('rt1')}/config.json"))
    assert container["spec"] == spec
    assert container["runtime"] == runtime
    assert container["pid"] == pid(host, "rt1")
    assert container["status"] == "running"
    assert container["bundle"] == bundle_path("rt1")
    assert container["rootfs"] == f"{bundle_path('rt1')}/rootfs"
    assert container["cgroup"] == "/sys/fs/cgroup/dolly/rt1"
    assert container["netns"] == "/run/netns/rt1"
    assert container["terminal"] is False
    assert container["descriptors"] == ["/dev/null"] * 3
    assert "/proc" in container["mounts"]
    assert str(container["pid"]) in procs(host)


@with_both
def test_the_commands_move_a_container_and_criu_is_asked_in_this_order(
    host: Host, runtime: str
) -> None:
    commands = inside(host, COMMANDS)
    host.run(["ip", "link", "set", "v-rt1", "nomaster", "down"])
    host.run(commands["checkpoint"], env=environment())
    assert host.read_text(f"{WORK}/images/descriptors.json") == commands["descriptors"]
    assert inside(host, STATES) == [False, None]
    # VERSION=10, DUMP=1 (criu/images/rpc.proto), in the runtime's own cgroup.
    dump = requests(host)
    assert [kind for kind, _ in dump] == ["10", "1"]
    assert {cgroup for _, cgroup in dump} == {"/init.scope"}
    restore(host, commands["restore"])
    # VERSION, RESTORE=2: runc has it in the container's cgroup already, which crun only makes.
    inside_of = {"runc": "/dolly/rt1", "crun": "/init.scope"}[runtime]
    assert requests(host)[2:] == [["10", "/init.scope"], ["2", inside_of]]
    container = inside(host, INSPECT)
    assert container["status"] == "running"
    assert container["descriptors"][:2] == ["/dev/null"] * 2


def test_a_lazy_dump_asks_for_the_feature_first_and_survives_its_criu(host: Host) -> None:
    """The dump waits for somebody to fetch pages; killing its CRIU lets the container run on."""
    commands = inside(host, COMMANDS)
    host.run(["ip", "link", "set", "v-rt1", "nomaster", "down"])
    dump = host.popen(commands["lazy"], env=environment())
    inventory = host.path(f"{WORK}/images/inventory.img")
    wait_until("the dump has been written", inventory.exists)
    # FEATURE_CHECK=9 only for a lazy dump.
    assert [kind for kind, _ in requests(host)] == ["10", "9", "1"]
    host.run(["pkill", "-KILL", "-f", "criu: dump"])
    assert dump.wait(timeout=20) != 0
    wait_until("it runs again", lambda: state(host, "rt1") == "running")


def test_a_container_that_is_frozen_already_is_dumped_and_gone(host: Host) -> None:
    commands = inside(host, COMMANDS)
    host.run(["ip", "link", "set", "v-rt1", "nomaster", "down"])
    host.write_text("/sys/fs/cgroup/dolly/rt1/cgroup.freeze", "1")
    wait_until("runc says so", lambda: inside(host, STATES) == [True, "paused"])
    host.run(commands["checkpoint"], env=environment())
    assert inside(host, STATES) == [False, None]
    assert not host.path("/sys/fs/cgroup/dolly/rt1").exists()


def test_a_dump_that_is_undone_leaves_a_frozen_container_frozen(host: Host) -> None:
    """So it is for whoever froze it to thaw it."""
    commands = inside(host, COMMANDS)
    host.write_text(f"{WORK}/hook", '#!/bin/sh\n[ "$CRTOOLS_SCRIPT_ACTION" != post-dump ]\n', 0o755)
    host.write_text(f"{WORK}/criu.conf", f"{CRIU_CONFIG}action-script {WORK}/hook\n")
    host.write_text("/sys/fs/cgroup/dolly/rt1/cgroup.freeze", "1")
    assert host.run(commands["checkpoint"], env=environment(), check=False).returncode == 1
    assert inside(host, STATES) == [True, "paused"]
    host.write_text("/sys/fs/cgroup/dolly/rt1/cgroup.freeze", "0")
    wait_until("it runs again", lambda: inside(host, STATES) == [True, "running"])


def held_restore(host: Host) -> Any:
    """A restore that waits at its gate, of a container that was dumped."""
    commands = inside(host, COMMANDS)
    host.run(["ip", "link", "set", "v-rt1", "nomaster", "down"])
    host.run(commands["checkpoint"], env=environment())
    process = host.popen(
        detached(commands["restore"], log=f"{WORK}/restore.err"), env=environment(HOLD="2")
    )
    wait_until("the restore is at its gate", lambda: "2" in [kind for kind, _ in requests(host)])
    return process


def test_a_restore_at_its_gate_takes_the_name_and_goes_on_when_let(host: Host) -> None:
    process = held_restore(host)
    assert inside(host, STATES) == [True, None]
    host.write_text(f"{WORK}/go", "")
    assert process.wait(timeout=20) == 0, host.read_text(f"{WORK}/restore.err")
    assert inside(host, STATES) == [True, "running"]


def test_a_restore_whose_criu_ends_is_cleaned_up_by_runc(host: Host) -> None:
    process = held_restore(host)
    files = rootfs_files(host)
    gate = procs(host)
    assert len(gate) == 1
    host.run(["kill", "-KILL", *gate])
    assert process.wait(timeout=20) == 1
    assert inside(host, STATES) == [False, None]
    assert rootfs_files(host) == files
    assert not host.path("/sys/fs/cgroup/dolly/rt1").exists()
    assert "criu-root" not in host.run(["cat", "/proc/self/mounts"]).stdout


@with_both
def test_delete_after_a_killed_restore_keeps_the_root_file_system(host: Host, runtime: str) -> None:
    """runc's own `delete` would empty it through the bind mount that the restore has left; crun's
    is in the bundle, which whoever made that deletes."""
    process = held_restore(host)
    files = rootfs_files(host)
    assert files
    process.kill()
    process.wait(timeout=20)
    # With crun it is in the cgroup of whoever started it, where `users_of` finds it.
    assert bool(procs(host)) == (runtime == "runc")
    where = {"runc": "/run/runc/rt1", "crun": bundle_path("rt1")}[runtime]
    assert f"{where}/criu-root" in host.run(["cat", "/proc/self/mounts"]).stdout
    assert inside(host, STATES) == [True, None]
    assert inside(host, DELETE) == [False, None]
    host.run(["pkill", "-KILL", "-f", "criu swrk"], check=False)
    assert rootfs_files(host) == files
    assert not host.path("/sys/fs/cgroup/dolly/rt1").exists()
    assert "criu-root" not in host.run(["cat", "/proc/self/mounts"]).stdout


@pytest.mark.parametrize("frozen", [False, True])
def test_kill_and_delete_end_a_container_in_any_state(host: Host, frozen: bool) -> None:
    if frozen:
        host.write_text("/sys/fs/cgroup/dolly/rt1/cgroup.freeze", "1")
    assert inside(host, DELETE) == [False, None]
    assert not host.path("/sys/fs/cgroup/dolly/rt1").exists()
