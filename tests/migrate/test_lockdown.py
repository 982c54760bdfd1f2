"""A process that has given up its rights tries to use them, as an intruder in it would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from migrate.processes import module_command

PROGRAM = Path(__file__).with_name("programs") / "locked_down.py"
USER = 65530


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    root.mkdir(mode=0o750)
    os.chown(root, 0, USER)
    (root / "given").write_text("given")
    return root


def attempt(root: Path, what: str, *more: str) -> subprocess.CompletedProcess[str]:
    """What became of one attempt: the error's name on its output, or the signal that ended it."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), str(root), str(USER), what, *more],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_goes_on_with_what_it_has(root: Path) -> None:
    done = attempt(root, "read", "/given")
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr
    assert attempt(root, "thread").stdout == "done\n"


def test_what_it_is(root: Path) -> None:
    done = attempt(root, "status")
    assert done.stdout == (
        f"uid {USER} {USER} {USER} gid {USER} {USER} {USER} groups []\n"
        "no_new_privs 1 seccomp 2 dumpable 0 core (0, 0)\ndone\n"
    ), done.stderr


@pytest.mark.parametrize(
    ("what", "more"),
    [
        ("read", ("/etc/passwd",)),
        ("read", ("/proc/self/status",)),
        ("read", ("/../etc/passwd",)),
        ("write", ("/given",)),
        ("write", ("/new",)),
        ("raise-user", ()),
    ],
)
def test_files_and_users_are_out_of_reach(root: Path, what: str, more: tuple[str, ...]) -> None:
    done = attempt(root, what, *more)
    assert done.stdout in ("ENOENT\n", "EROFS\n", "EACCES\n", "EPERM\n"), done.stderr


def test_it_can_call_nobody(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = attempt(root, "connect", str(listening.getsockname()[1]))
    assert done.stdout == "ENETUNREACH\n", done.stderr


@pytest.mark.parametrize(
    "what", ["execute", "trace", "mount", "unshare", "new-user-namespace", "keys", "x32"]
)
def test_calls_of_an_intruder_end_it(root: Path, what: str) -> None:
    done = attempt(root, what)
    assert (done.stdout, done.returncode) == ("", -signal.SIGSYS), done.stderr


def test_nobody_but_root_locks_itself_down(tmp_path: Path) -> None:
    """A front that can't give up its rights does not serve with them."""
    done = attempt(tmp_path / "missing", "read", "/given")
    assert done.returncode == 1
    assert "can't give up its rights" in done.stderr


# ---- a program that has to be root ----


def in_cell(directory: Path, script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        module_command("migrate.agent.cell", str(directory), "--", "sh", "-c", script),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_program_in_a_cell_makes_files_of_any_owner(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    label = """python3 -c 'import os; os.setxattr("file", "trusted.mine", b"1")'"""
    done = in_cell(
        inside,
        f"cd {inside} && echo x >file && chown 1234:5678 file && chmod 4755 file"
        f" && mknod null c 1 3 && {label}",
    )
    assert done.returncode == 0, done.stderr
    found = (inside / "file").stat()
    assert (found.st_uid, found.st_gid, found.st_mode & 0o7777) == (1234, 5678, 0o4755)
    assert (inside / "null").is_char_device()


def test_a_program_in_a_cell_writes_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    for path in (tmp_path / "beside", Path("/run/beside"), Path("/dev/shm/beside")):
        done = in_cell(tmp_path / "inside", f"echo x >{path}")
        assert done.returncode != 0
        assert not path.exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("mknod {0}/null c 1 3; cat {0}/null", "Permission denied"),
        ("python3 -c 'import socket; socket.socket(1).connect(\"/none\")'", "not permitted"),
        ("kill -0 1 && cat /proc/1/mem", "denied"),
        ("mount -t tmpfs none {0}", "Bad system call"),
        ("unshare --user true", "Bad system call"),
        ("ip link | grep -v lo | grep -q mtu && echo a network >&2; false", ""),
    ],
)
def test_a_program_in_a_cell_is_held_back(tmp_path: Path, script: str, words: str) -> None:
    done = in_cell(tmp_path, script.format(tmp_path))
    assert done.returncode != 0
    assert words in done.stderr
    assert "a network" not in done.stderr
