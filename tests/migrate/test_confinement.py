"""What is read of threads that are held back, with real ones; and who judges when no agent does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from migrate import confinement
from migrate.core.confinement import Confinements, names_of, weaker
from tests.lab.waiting import wait_until

# In a pid namespace of its own and with a thread more: limits and rights taken away as asked.
TASK = """\
import ctypes, os, resource, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def prctl(*words):
    assert libc.prctl(*words) == 0
for asked in sys.argv[1:]:
    match asked:
        case "no_new_privs":
            prctl(38, 1, 0, 0, 0)
        case "filter":
            code = (ctypes.c_uint64 * 1)(0x7fff000000000006)
            class Program(ctypes.Structure):
                _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]
            prctl(22, 2, ctypes.byref(Program(1, ctypes.addressof(code))))
        case "drop":
            prctl(24, 21, 0, 0, 0)
        case "user":
            os.setgroups([7])
            os.setresgid(5, 5, 5)
            os.setresuid(4, 4, 4)
        case "files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (50, 60))
        case "oom":
            open("/proc/self/oom_score_adj", "w").write("500")
threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
print("ready", flush=True)
time.sleep(1000)
"""
Start = Callable[..., Path]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts such a task; the directory is what its cgroup would be."""
    started: list[subprocess.Popen[str]] = []
    inner: list[int] = []

    def start_one(*asked: str) -> Path:
        command = ["unshare", "--pid", "--fork"]
        task = subprocess.Popen(
            [*command, sys.executable, "-c", TASK, *asked], stdout=subprocess.PIPE, text=True
        )
        started.append(task)
        assert task.stdout is not None
        assert task.stdout.readline() == "ready\n"
        children = Path(f"/proc/{task.pid}/task/{task.pid}/children").read_text()
        inner.append(int(children))
        directory = tmp_path / str(len(started))
        directory.mkdir()
        # The other one is in no pid namespace of its own, as CRIU in a container's cgroup.
        (directory / "cgroup.procs").write_text(f"{task.pid}\n{children.strip()}\n")
        return directory

    yield start_one
    for pid in inner:
        os.kill(pid, signal.SIGKILL)
    for task in started:
        task.communicate(timeout=20)


def test_threads_are_read_by_their_own_numbers(start: Start) -> None:
    found = confinement.read(start())
    assert sorted(found.threads) == [1, 2]
    (sheet,) = found.sheets
    assert set(found.threads.values()) == {0}
    assert (sheet.seccomp, sheet.filters, sheet.no_new_privileges) == (0, 0, False)
    assert sheet.users == sheet.groups == (0, 0, 0, 0)
    assert "CAP_SYS_ADMIN" in names_of(sheet.effective)
    assert len(sheet.limits) == 16
    assert sheet.user_map.split()[:2] == ["0", "0"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("no_new_privs", "no_new_privs"),
        ("filter", "seccomp mode 0 and not 2"),
        ("drop", "more bounding capabilities: CAP_SYS_ADMIN"),
        ("user", "users (0, 0, 0, 0) and not (4, 4, 4, 4)"),
        ("files", "Max open files"),
        ("oom", "oom_score_adj 0 and not 500"),
    ],
)
def test_what_a_copy_lacks_is_seen(start: Start, asked: str, said: str) -> None:
    source, free = start(asked), start()
    assert confinement.differences(confinement.read(source), source) == []
    assert said in confinement.differences(confinement.read(source), free)[0]


def test_what_travels_is_the_same(start: Start) -> None:
    found = confinement.read(start("filter", "user"))
    encoded = msgspec.json.encode(found)
    assert weaker(msgspec.json.decode(encoded, type=Confinements), found) == []
    assert msgspec.json.decode(encoded, type=Confinements) == found


def test_a_cgroup_that_is_gone_is_no_good_copy(start: Start, tmp_path: Path) -> None:
    expected = confinement.read(start())
    assert confinement.differences(expected, tmp_path / "none") != []


def judged(expected: Path, directory: Path, hold: Path) -> str:
    """What a hook hears that waits at pre-resume with no agent."""
    hook = subprocess.Popen(
        ["sh", "-c", 'read -r word <> "$0"; echo "$word"', str(hold / "judgement")],
        stdout=subprocess.PIPE,
        text=True,
    )
    opened = Path(f"/proc/{hook.pid}/fd/0")
    wait_until("the hook waits", lambda: "judgement" in str(opened.resolve()))
    module = [sys.executable, "-P", "-m", "migrate.confinement"]
    source = {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*module, str(expected), str(directory), str(hold)]
    subprocess.run(command, check=True, env=source)
    return hook.communicate(timeout=20)[0].strip()


def test_who_judges_when_the_agent_does_not(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "judgement")
    source, free = start("filter"), start()
    expected = tmp_path / "confinement.json"
    expected.write_bytes(msgspec.json.encode(confinement.read(source)))
    assert judged(expected, source, tmp_path) == "run"
    assert judged(expected, free, tmp_path) == "refuse"
    expected.write_bytes(b"{")
    assert judged(expected, source, tmp_path) == "refuse"
    expected.unlink()
    assert judged(expected, source, tmp_path) == "refuse"
