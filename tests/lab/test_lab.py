"""The life of a lab: it leaves nothing behind, however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.lab import lab as labs
from bench.lab import paths, remains
from bench.lab.errors import LabError
from bench.lab.lab import Lab
from tests.lab.waiting import wait_until


def _pids(cgroup: Path) -> set[int]:
    """All processes in a cgroup and below, as this machine sees them."""
    found: set[int] = set()
    for procs in cgroup.rglob("cgroup.procs"):
        found |= {int(pid) for pid in procs.read_text().split()}
    return found


def _litter(lab: Lab) -> None:
    """Leaves in host A everything that a run may leave: daemons, mounts, cgroups, namespaces."""
    script = """
        mkdir -p /sys/fs/cgroup/workload/deeper
        setsid --fork sh -c 'echo $$ >/sys/fs/cgroup/workload/deeper/cgroup.procs; exec sleep 1000'
        mkdir /mnt/litter && mount -t tmpfs litter /mnt/litter && echo x >/mnt/litter/file
        ip netns add litter
        unshare --pid --fork --mount-proc setsid --fork sleep 1000 &
        mkdir /var/lib/migrate/deep && echo x >/var/lib/migrate/deep/file
        rm /etc/debian_version
    """
    lab.host("A").run(["sh", "-c", f"({script}) >/dev/null 2>&1 </dev/null"])
    frozen = lab.host("A").cgroup / "workload" / "deeper"
    wait_until("the daemon is in its cgroup", lambda: _pids(frozen))
    (frozen / "cgroup.freeze").write_text("1")


def _traces(name: str) -> list[str]:
    """Everything on this machine that tells of the lab `name`."""
    places = [paths.state_path(name), paths.cgroup_path(name)]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return [str(place) for place in places if place.exists()] + [
        mount for mount in mounts if name in mount
    ]


def test_down_leaves_nothing() -> None:
    interfaces = set(Path("/sys/class/net").iterdir())
    with Lab(["A", "B"]) as lab:
        _litter(lab)
        pids = _pids(paths.cgroup_path(lab.name)) | {lab.keeper_pid}
        # Two hosts and a client with their shims, two sshd, the daemons.
        assert len(pids) >= 10
        # While it is up, nothing of it is to be seen in this machine's own mounts and networks.
        assert _traces(lab.name) == [
            str(paths.state_path(lab.name)),
            str(paths.cgroup_path(lab.name)),
        ]
        assert set(Path("/sys/class/net").iterdir()) == interfaces
        assert not Path("/run/netns/litter").exists()
    assert _traces(lab.name) == []
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_a_killed_keeper_takes_everything_with_it_and_the_next_command_sweeps() -> None:
    lab = Lab(["A"])
    lab.start()
    _litter(lab)
    pids = _pids(paths.cgroup_path(lab.name))
    os.kill(lab.keeper_pid, signal.SIGKILL)
    # Nobody helps: the processes end by themselves, frozen ones too.
    wait_until("all processes end", lambda: not _pids(paths.cgroup_path(lab.name)))
    assert lab.name not in labs.names()
    with Lab(["A"]):
        assert _traces(lab.name) == []
    lab.close()
    # Orphans are reaped by this machine's own pid 1, when it gets to it.
    wait_until("they are reaped", lambda: not [p for p in pids if Path(f"/proc/{p}").exists()])


def test_the_sweep_spares_the_living(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A"])
    with remains.sweeping():
        assert lab.name not in remains.sweep()
    assert lab.host("A").run(["hostname"]).stdout == "A\n"


OWNER = """
import sys, time
from bench.lab.lab import Lab
with Lab(["A"], name=sys.argv[1]) as lab:
    print(lab.keeper_pid, flush=True)
    time.sleep(1000)
"""


def _start_owner(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OWNER, name],
        cwd=paths.PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_lab_ends_with_its_owner(number: signal.Signals) -> None:
    name = f"owned-{os.getpid()}-{number.name}"
    owner = _start_owner(name)
    with owner:
        assert owner.stdout is not None
        keeper_pid = int(owner.stdout.readline())
        assert name in labs.names()
        owner.send_signal(number)
        owner.communicate()
    wait_until("the keeper ends", lambda: not Path(f"/proc/{keeper_pid}").exists())
    assert _traces(name) == []


def test_an_owner_killed_while_its_lab_starts_leaves_nothing() -> None:
    name = f"early-{os.getpid()}"
    owner = _start_owner(name)
    with owner:
        wait_until("the lab begins to exist", paths.state_path(name).exists)
        owner.kill()
    wait_until("the lab is gone", lambda: not paths.state_path(name).exists())
    assert _traces(name) == []


def test_two_labs_with_the_same_addresses_do_not_meet(new_lab: Callable[..., Lab]) -> None:
    first, second = new_lab(["A", "B"]), new_lab(["A", "B"])
    assert first.host("B").address == second.host("B").address
    for lab in (first, second):
        lab.host("B").write_text("/root/which", lab.name)
    for lab in (first, second):
        assert lab.host("A").run(["ssh", "B", "cat", "/root/which"]).stdout == lab.name


def test_a_name_is_given_once(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A"])
    with pytest.raises(LabError, match="up already"):
        Lab(["A"], name=lab.name).start()
    assert lab.host("A").run(["hostname"]).stdout == "A\n"


def test_a_lab_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    lab = Lab(["A"], source=tmp_path / "missing")
    with pytest.raises(LabError, match=r"host A did not start: .*missing"):
        lab.start()
    assert _traces(lab.name) == []


def test_the_command_line_from_up_to_down() -> None:
    name = f"cli-{os.getpid()}"

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [paths.PROJECT / "scripts" / "lab", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    up = command("up", "--name", name, "left", "right")
    try:
        assert up.returncode == 0, up.stderr
        assert f"lab {name} is up" in up.stdout
        assert "right" in command("list").stdout
        assert command("exec", "--name", name, "right", "hostname").stdout == "right\n"
        assert command("exec", "--name", name, "client", "sh", "-c", "exit 7").returncode == 7
        assert "no host middle" in command("exec", "--name", name, "middle", "true").stderr
        assert Lab.attach(name).host("left").read_text("/etc/hostname") == "left\n"
    finally:
        down = command("down", "--name", name)
    assert (down.returncode, down.stderr) == (0, "")
    assert _traces(name) == []
    missing = command("exec", "--name", name, "left", "true")
    assert missing.returncode == 1
    assert f"no lab {name} is up" in missing.stderr


def test_the_description_on_disk_is_what_the_owner_was_told(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"])
    description = json.loads((paths.state_path(lab.name) / paths.DESCRIPTION).read_text())
    assert description["keeper_pid"] == lab.keeper_pid
    attached = Lab.attach(lab.name)
    assert [host.pid for host in attached.hosts] == [host.pid for host in lab.hosts]
    assert attached.client.run(["hostname"]).stdout == "client\n"
