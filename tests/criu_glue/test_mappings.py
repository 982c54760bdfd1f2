"""What /proc says of tasks: literal texts, and real processes."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from criu_glue import mappings
from criu_glue.errors import CriuGlueError, LimitExceededError, TaskGoneError
from criu_glue.mappings import (
    Mapping,
    Task,
    cgroup_pids,
    parse_maps,
    private_anonymous,
    vpid,
)
from tests.criu_glue.puppets import ARENA, PAGE, READ_WRITE, Puppet, Stage, state, status, until

# Rows without a name end in a space, as the kernel writes them.
MAPS = b"""\
00400000-00401000 r-xp 00000000 fe:00 260131                             /usr/bin/my (odd) name
00401000-00402000 rw-p 00001000 fe:00 260131                             /usr/bin/my (odd) name
00402000-00403000 rw-p 00000000 00:00 0@
01000000-01021000 rw-p 00000000 00:00 0                                  [heap]
7f0000000000-7f0000001000 ---p 00000000 00:00 0@
7f0000001000-7f0000801000 rw-p 00000000 00:00 0                          [anon: glibc: malloc arena]
7f0000801000-7f0000a01000 rw-p 00000000 00:0f 4711                       /anon_hugepage (deleted)
7f0000a01000-7f0000a02000 rw-s 00000000 00:01 1025                       /dev/zero (deleted)
7f0000a02000-7f0000a03000 rw-p 00000000 00:05 5                          /dev/zero
7f0000a03000-7f0000a04000 rw-s 00000000 00:0e 9                          /[aio] (deleted)
7f0000a04000-7f0000a05000 r--s 00000000 00:00 0                          [anon_shmem:x]
7f0000b00000-7f0000b01000 rw-p 00000000 00:00 0                          [stack:1234]
7f0000c00000-7f0000c04000 r--p 00000000 00:00 0                          [vvar]
7f0000c04000-7f0000c06000 r--p 00000000 00:00 0                          [vvar_vclock]
7f0000c06000-7f0000c08000 r-xp 00000000 00:00 0                          [vdso]
7ffd97715000-7ffd97736000 rw-p 00000000 00:00 0                          [stack]
7fffffffe000-7ffffffff000 --xp 00000000 00:00 0                          [uprobes]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
""".replace(b"@", b" ")


def test_what_is_private_and_anonymous() -> None:
    assert private_anonymous(MAPS) == [
        (0x402000, 0x403000),
        (0x1000000, 0x1021000),
        (0x7F0000000000, 0x7F0000001000),
        (0x7F0000001000, 0x7F0000801000),
        (0x7F0000B00000, 0x7F0000B01000),
        (0x7FFD97715000, 0x7FFD97736000),
    ]


def test_all_rows() -> None:
    rows = parse_maps(MAPS)
    assert len(rows) == len(MAPS.splitlines())
    assert rows[0] == Mapping(0x400000, 0x401000, "r-x", "/usr/bin/my (odd) name")
    assert rows[2] == Mapping(0x402000, 0x403000, "rw-", "")
    assert rows[-1] == Mapping(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, "--x", "[vsyscall]")


def test_rows_that_overlap_since_mappings_were_merged_meanwhile() -> None:
    maps = (
        b"1000-3000 rw-p 00000000 00:00 0 \n"
        b"1000-5000 rw-p 00000000 00:00 0 \n"
        b"4000-5000 rw-p 00000000 00:00 0 \n"
        b"6000-7000 rw-p 00000000 00:00 0 \n"
    )
    assert private_anonymous(maps) == [(0x1000, 0x3000), (0x3000, 0x5000), (0x6000, 0x7000)]


def test_too_many_mappings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mappings, "MAPPINGS_MAX", 5)
    with pytest.raises(LimitExceededError):
        private_anonymous(MAPS)


def test_a_real_maps_file_of_many_reads(puppet: Puppet) -> None:
    for i in range(300):
        puppet.do("map", ARENA + 2 * i * PAGE, 1, READ_WRITE)
    task = Task(puppet.pid)
    found = private_anonymous(task.read("maps"))
    assert {(ARENA + 2 * i * PAGE, ARENA + (2 * i + 1) * PAGE) for i in range(300)} <= set(found)
    task.close()


def test_a_task(puppet: Puppet) -> None:
    task = Task(puppet.pid)
    assert task.alive()
    assert task.threads() == [puppet.pid]
    assert task.living_thread() == puppet.pid
    assert task.vpid() == vpid(puppet.pid) == puppet.pid
    assert task.status("State")[0] in "RS"
    with pytest.raises(CriuGlueError, match="no field"):
        task.status("Nonsense")
    task.close()
    task.close()


def test_memory_at_an_address(puppet: Puppet) -> None:
    puppet.do("map", ARENA, 2, READ_WRITE)
    puppet.do("write", ARENA, 1, 0x4142434445464748)
    task = Task(puppet.pid)
    assert task.open_and_read_at("mem", ARENA, 8) == b"HGFEDCBA"
    assert task.open_and_read_at("mem", 0x1000, 8) == b""
    task.close()


def test_a_task_that_exits(stage: Stage, puppet: Puppet) -> None:
    task = Task(puppet.pid)
    puppet.send("exit")
    until(lambda: state(puppet.pid) == "Z")
    assert task.alive()
    with pytest.raises(TaskGoneError):
        task.living_thread()
    stage.child.wait()
    assert not task.alive()
    for look in (task.threads, task.living_thread, task.vpid):
        with pytest.raises(TaskGoneError):
            look()
    with pytest.raises(TaskGoneError):
        task.open("maps")
    task.close()
    with pytest.raises(TaskGoneError):
        Task(puppet.pid)
    with pytest.raises(TaskGoneError):
        vpid(puppet.pid)


def test_threads_and_a_main_thread_that_exits(puppet: Puppet) -> None:
    task = Task(puppet.pid)
    puppet.send("forsake")
    until(lambda: state(puppet.pid) == "Z")
    main, second = task.threads()
    assert main == puppet.pid
    assert task.living_thread() == second
    assert task.thread_state(main) == "Z"
    assert task.thread_state(second) in "RS"
    task.close()


def test_the_number_in_a_pid_namespace(stage: Stage) -> None:
    puppet = stage.start("unshare", "--pid", "--fork", "--kill-child")
    assert vpid(puppet.pid) == 1


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    """A directory laid out like a cgroup v2 subtree."""
    for name, pids in {"": "3\n", "a": "", "a/b": "11\n7\n", "c": "5\n"}.items():
        (tmp_path / "g" / name).mkdir(exist_ok=True, parents=True)
        (tmp_path / "g" / name / "cgroup.procs").write_text(pids)
    return tmp_path / "g"


def test_pids_of_a_subtree_of_control_groups(groups: Path) -> None:
    assert cgroup_pids(groups) == [3, 5, 7, 11]


def test_a_group_that_vanishes(groups: Path) -> None:
    (groups / "a" / "b" / "cgroup.procs").unlink()
    assert cgroup_pids(groups) == [3, 5]


def test_no_such_group(tmp_path: Path) -> None:
    with pytest.raises(CriuGlueError):
        cgroup_pids(tmp_path / "none")


def test_processes_of_another_namespace(groups: Path) -> None:
    (groups / "c" / "cgroup.procs").write_text("0\n")
    with pytest.raises(CriuGlueError, match="namespace"):
        cgroup_pids(groups)


@pytest.mark.parametrize("limit", ["TASKS_MAX", "CGROUPS_MAX"])
def test_too_many(groups: Path, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(mappings, limit, 3)
    with pytest.raises(LimitExceededError):
        cgroup_pids(groups)


def test_a_real_control_group() -> None:
    """Processes of a group below are processes of the group."""
    root = next(
        Path(line.split()[1])
        for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
        if line.split()[2] == "cgroup2"
    )
    group = root / f"dolly-test-mappings-{os.getpid()}"
    (group / "below").mkdir(parents=True)
    with subprocess.Popen(["sleep", "100"]) as child:
        try:
            (group / "below" / "cgroup.procs").write_text(str(child.pid))
            assert cgroup_pids(group) == [child.pid]
        finally:
            child.kill()
            child.wait()
            until(lambda: not (group / "below" / "cgroup.procs").read_text())
            (group / "below").rmdir()
            group.rmdir()


def test_pids_that_change_all_the_time_do_not_hurt() -> None:
    """Looking at a task from another thread while it exits ends in TaskGoneError at worst."""
    failures: list[BaseException] = []
    running: list[subprocess.Popen[bytes]] = []

    def look() -> None:
        while not done.is_set():
            for child in running:
                try:
                    task = Task(child.pid)
                except TaskGoneError:
                    continue
                try:
                    task.living_thread()
                    private_anonymous(task.read("maps"))
                except TaskGoneError:
                    pass
                except BaseException as error:  # noqa: BLE001  shown by the test's thread
                    failures.append(error)
                finally:
                    task.close()

    done = threading.Event()
    looker = threading.Thread(target=look)
    looker.start()
    for _ in range(50):
        with subprocess.Popen(["true"]) as child:
            running.append(child)
        running.clear()
    done.set()
    looker.join()
    assert failures == []
    assert status(os.getpid())["TracerPid"] == "0"
