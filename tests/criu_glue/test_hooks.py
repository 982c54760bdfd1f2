"""Gate, hook and FIFOs with real processes; CRIU is played by a program that acts as CRIU does."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import psutil
import pytest

from criu_glue.errors import CriuGlueError
from criu_glue.hooks import (
    PAGE_SERVER_FD,
    CriuHold,
    HoldPlan,
    abort_from_outside,
    criu_pid,
    has_seen,
    is_held,
    is_let_go,
    is_refused,
)
from migrate.processes import running
from tests.lab.waiting import wait_until

VERSION, DUMP, RESTORE = b"\x08\x0a", b"\x08\x01", b"\x08\x02"
DEADLINE_S = 20.0
# Reads the whole request, says what it was given, and runs the action script as system() does:
# `ACTIONS` are run in turn, the first that fails ends it.
CRIU = """\
#!{python} -ISE
import os, socket, subprocess, sys
connection = socket.socket(fileno=int(sys.argv[2]))
request = connection.recv(64)
try:
    page_server = socket.socket(fileno=os.dup({page_server})).recv(1)
except OSError:
    page_server = None
connection.send(repr((sys.argv[1:], request, page_server)).encode())
lines = open(os.environ["CRIU_CONFIG_FILE"]).read().splitlines()
script = [line for line in lines if line.startswith("action-script ")][0].split(" ", 1)[1]
for action in os.environ.get("ACTIONS", "").split():
    environment = dict(os.environ, CRTOOLS_SCRIPT_ACTION=action)
    if subprocess.call([script], env=environment) != 0:
        sys.exit(1)
"""


class Runtime:
    """What a runtime does: starts the first `criu` of its PATH on a socket, and sends a request."""

    def __init__(self, hold: CriuHold, request: bytes, actions: Sequence[str] = ()) -> None:
        if request == DUMP:
            actions = ["pre-dump", *actions]
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(DEADLINE_S)
        self._theirs = theirs
        self.number = str(theirs.fileno())
        self._request = request
        self._environment = hold.environment({**os.environ, "ACTIONS": " ".join(actions)})

    async def start(self, *before: str) -> asyncio.subprocess.Process:
        self.socket.send(self._request)
        with self._theirs:
            self.process = await asyncio.create_subprocess_exec(
                *(*before, "env", "criu", "swrk", self.number),
                env=self._environment,
                pass_fds=(self._theirs.fileno(),),
                start_new_session=True,
            )
        return self.process

    def heard(self) -> str:
        """What CRIU said that it was given."""
        return self.socket.recv(4096).decode()

    async def end(self) -> int:
        async with asyncio.timeout(DEADLINE_S):
            code = await self.process.wait()
        self.socket.close()
        return code


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For the hold, of a name that no shell may split; `criu` is the one above."""
    programs = tmp_path / "programs"
    programs.mkdir()
    criu = programs / "criu"
    criu.write_text(CRIU.format(python=sys.executable, page_server=PAGE_SERVER_FD))
    criu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path / "a session's $work"


def prepare(directory: Path, *at_unlock: tuple[str, ...], dump: bool = True) -> CriuHold:
    hold_at: Literal["post-dump", "post-restore"] = "post-dump" if dump else "post-restore"
    return CriuHold.prepare(directory, HoldPlan(hold_at, ("manage-cgroups ignore",), at_unlock))


async def test_without_criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(CriuGlueError, match="not installed"):
        prepare(tmp_path / "hold")


def modes_in(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


async def test_nobody_else_may_look_or_decide(directory: Path) -> None:
    hold = prepare(directory)
    modes = modes_in(directory)
    assert {modes[name] for name in ("events", "gate", "verdict")} == {0o600}
    assert modes["bin"] == modes["hook"] == 0o700
    lines = (directory / "criu.conf").read_text().splitlines()
    assert lines == ["manage-cgroups ignore", f"action-script {directory}/hook"]
    hold.close()


async def test_other_requests_pass_the_gate(directory: Path) -> None:
    hold = prepare(directory)
    runtime = Runtime(hold, VERSION)
    await runtime.start()
    assert runtime.heard() == repr((["swrk", runtime.number], VERSION, None))
    assert await runtime.end() == 0
    assert hold.marks_us == {}
    hold.close()


@pytest.mark.parametrize("request_kind", [DUMP, RESTORE])
async def test_the_gate_holds_until_it_is_opened(directory: Path, request_kind: bytes) -> None:
    hold = prepare(directory, dump=request_kind == DUMP)
    runtime = Runtime(hold, request_kind, ["post-resume"])
    await runtime.start()
    reached_us = await hold.wait_or_end("gate", runtime.process, DEADLINE_S)
    assert reached_us is not None
    # A dump's CRIU has begun and stands in its first hook; a restore's has not.
    assert bool(select.select([runtime.socket], [], [], 0)[0]) == (request_kind == DUMP)
    assert runtime.process.returncode is None
    assert reached_us <= hold.open_gate() <= time.monotonic_ns() // 1000
    # CRIU reads the request that was looked at; its page server is at its end.
    assert runtime.heard() == repr((["swrk", runtime.number], request_kind, b""))
    assert await runtime.end() == 0
    assert list(hold.marks_us) == ["gate", "post-resume"]
    hold.close()


async def test_criu_is_started_by_a_prefix(directory: Path) -> None:
    prefix = ("sh", "-c", 'PREFIXED=$0 exec "$@"', "with a 'quote")
    hold = CriuHold.prepare(directory, HoldPlan("post-dump", (), prefix=prefix))
    runtime = Runtime(hold, DUMP)
    await runtime.start()
    assert await hold.wait_or_end("gate", runtime.process, DEADLINE_S)
    pid = criu_pid(directory)
    assert pid is not None
    assert psutil.Process(pid).environ()["PREFIXED"] == "with a 'quote"
    hold.open_gate()
    assert await runtime.end() == 0
    hold.close()


@pytest.mark.parametrize(("request_kind", "joined"), [(DUMP, ""), (RESTORE, "0")])
async def test_what_restores_begins_in_its_tasks_cgroup(
    directory: Path, request_kind: bytes, joined: str
) -> None:
    cgroup = directory.parent
    (cgroup / "cgroup.procs").touch()
    hold_at: Literal["post-dump", "post-restore"] = "post-restore" if joined else "post-dump"
    hold = CriuHold.prepare(directory, HoldPlan(hold_at, (), join=cgroup))
    runtime = Runtime(hold, request_kind)
    await runtime.start()
    assert await hold.wait_or_end("gate", runtime.process, DEADLINE_S)
    assert (cgroup / "cgroup.procs").read_text() == joined
    hold.decide("abort")
    assert await runtime.end() == 1
    hold.close()


async def test_a_copy_stands_still_until_its_runtime_has_set_its_limits(directory: Path) -> None:
    cgroup, outside, ends = (directory.parent / name for name in ("cgroup", "outside", "ends"))
    for group in (cgroup, outside):
        group.mkdir()
    os.mkfifo(ends)
    plan = HoldPlan("post-restore", (), join=cgroup, outside=outside, judged=("sleep", "60"))
    hold = CriuHold.prepare(directory, plan)
    hold.open_gate()
    hold.judge("run")
    runtime = Runtime(hold, RESTORE, ["pre-resume", "post-resume"])
    await runtime.start("sh", "-c", '"$@"; cat "$0"', str(ends))
    assert await hold.wait_or_end("post-resume", runtime.process, DEADLINE_S)
    assert (cgroup / "cgroup.freeze").read_text() == "1\n"
    assert (outside / "cgroup.procs").exists()
    assert not has_seen(directory, "settled")
    ends.write_text("")
    assert await runtime.end() == 0
    await asyncio.to_thread(wait_until, "it is settled", partial(has_seen, directory, "settled"))
    assert (cgroup / "cgroup.freeze").read_text() == "0\n"
    hold.close()


async def test_a_gate_that_was_opened_beforehand(directory: Path) -> None:
    hold = prepare(directory)
    hold.open_gate()
    runtime = Runtime(hold, DUMP)
    await runtime.start()
    assert await runtime.end() == 0
    hold.close()


async def test_an_abort_ends_the_gate(directory: Path) -> None:
    hold = prepare(directory)
    runtime = Runtime(hold, DUMP)
    await runtime.start()
    assert await hold.wait_or_end("gate", runtime.process, DEADLINE_S)
    hold.decide("abort")
    assert await runtime.end() == 1
    hold.close()


@pytest.mark.parametrize("request_kind", [DUMP, RESTORE])
@pytest.mark.parametrize("is_waiting", [True, False])
async def test_a_gate_whose_maker_is_gone_ends(
    directory: Path, request_kind: bytes, is_waiting: bool
) -> None:
    hold = prepare(directory, dump=request_kind == DUMP)
    runtime = Runtime(hold, request_kind)
    if is_waiting:
        await runtime.start()
        assert await hold.wait_or_end("gate", runtime.process, DEADLINE_S)
    hold.close()
    if not is_waiting:
        await runtime.start()
    assert await runtime.end() == 1


@pytest.mark.parametrize(("verdict", "code"), [("commit", 0), ("abort", 1)])
@pytest.mark.parametrize("is_early", [True, False])
async def test_the_hook_waits_for_the_verdict(
    directory: Path, verdict: str, code: int, is_early: bool
) -> None:
    hold = prepare(directory)
    hold.open_gate()
    if is_early:
        hold.decide("commit" if verdict == "commit" else "abort")
    actions = ["network-lock", "post-dump", "network-unlock"]
    runtime = Runtime(hold, DUMP, actions)
    await runtime.start()
    held_us = await hold.wait_or_end("post-dump", runtime.process, DEADLINE_S)
    if not is_early:
        assert held_us is not None
        assert runtime.process.returncode is None
        assert list(hold.marks_us) == ["gate", *actions[:2]]
        assert list(hold.marks_us.values()) == sorted(hold.marks_us.values())
        hold.decide("commit" if verdict == "commit" else "abort")
    assert await runtime.end() == code
    await hold.wait_or_end("network-unlock", runtime.process, DEADLINE_S)
    assert ("network-unlock" in hold.marks_us) == (code == 0)
    hold.close()


async def test_it_holds_only_where_it_should(directory: Path) -> None:
    """A restore is not held where a dump is."""
    hold = prepare(directory, dump=False)
    hold.open_gate()
    runtime = Runtime(hold, RESTORE, ["pre-restore", "post-dump", "post-restore"])
    await runtime.start()
    assert await hold.wait_or_end("post-restore", runtime.process, DEADLINE_S)
    assert list(hold.marks_us) == ["gate", "pre-restore", "post-dump", "post-restore"]
    hold.decide("commit")
    assert await runtime.end() == 0
    hold.close()


@pytest.mark.parametrize("verdict", ["commit", "abort"])
async def test_the_port_is_plugged_after_a_commit_only(directory: Path, verdict: str) -> None:
    """CRIU unlocks the network after a failed restore as well."""
    plugged = directory.parent / "plugged in"
    hold = prepare(directory, ("touch", str(plugged)), ("true",), dump=False)
    hold.open_gate()
    actions = ["post-restore", "network-unlock"]
    runtime = Runtime(hold, RESTORE, actions if verdict == "commit" else actions[::-1])
    await runtime.start()
    assert await hold.wait_or_end("post-restore", runtime.process, DEADLINE_S)
    assert not plugged.exists()
    hold.decide("commit" if verdict == "commit" else "abort")
    await runtime.end()
    assert plugged.exists() == (verdict == "commit")
    hold.close()


async def test_a_port_that_can_not_be_plugged_is_told(directory: Path) -> None:
    hold = prepare(directory, ("true",), ("false",), dump=False)
    hold.open_gate()
    hold.decide("commit")
    runtime = Runtime(hold, RESTORE, ["post-restore", "network-unlock"])
    await runtime.start()
    assert await hold.wait_or_end("network-unlock-failed", runtime.process, DEADLINE_S)
    assert await runtime.end() == 0
    hold.close()


async def test_a_hold_outlives_whoever_made_it(directory: Path) -> None:
    hold = prepare(directory)
    hold.open_gate()
    runtime = Runtime(hold, DUMP, ["post-dump"])
    await runtime.start()
    assert await hold.wait_or_end("post-dump", runtime.process, DEADLINE_S)
    hold.close()
    assert runtime.process.returncode is None
    await asyncio.to_thread(wait_until, "the hook waits", lambda: abort_from_outside(directory))
    assert await runtime.end() == 1
    # Nobody waits any more, and nothing is left in the pipes for one that comes later.
    assert not abort_from_outside(directory)
    assert not abort_from_outside(directory / "gone")


async def test_a_hook_whose_criu_was_killed_lets_nothing_go(directory: Path) -> None:
    hold = prepare(directory, dump=False)
    hold.open_gate()
    runtime = Runtime(hold, RESTORE, ["post-restore"])
    await runtime.start()
    assert await hold.wait_or_end("post-restore", runtime.process, DEADLINE_S)
    runtime.process.kill()
    await runtime.end()
    assert is_held(directory)
    hold.decide("commit")
    await asyncio.to_thread(wait_until, "the hook ends", lambda: not hooks_of(directory))
    assert not is_let_go(directory)
    hold.close()


async def test_a_restore_whose_runtime_was_killed_is_not_let_go(directory: Path) -> None:
    hold = prepare(directory, dump=False)
    hold.open_gate()
    runtime = Runtime(hold, RESTORE, ["post-restore"])
    # The runtime is a process of its own here, and CRIU its child.
    process = await runtime.start("sh", "-c", '"$@" & wait', "sh")
    assert await hold.wait_or_end("post-restore", process, DEADLINE_S)
    assert criu_pid(directory) is not None
    process.kill()
    await runtime.end()
    hold.decide("commit")
    await asyncio.to_thread(wait_until, "CRIU ends", lambda: criu_pid(directory) is None)
    assert not is_let_go(directory)
    hold.close()


def hooks_of(directory: Path) -> list[psutil.Process]:
    return [one.process for one in running() if str(directory / "hook") in one.words]


async def test_a_runtime_that_ends_before(directory: Path) -> None:
    hold = prepare(directory)
    hold.open_gate()
    runtime = Runtime(hold, DUMP, ["network-lock"])
    await runtime.start()
    assert await hold.wait_or_end("post-dump", runtime.process, DEADLINE_S) is None
    # Its last word was heard all the same.
    assert "network-lock" in hold.marks_us
    assert await runtime.end() == 0
    hold.close()


async def test_a_deadline_that_passes(directory: Path) -> None:
    hold = prepare(directory)
    runtime = Runtime(hold, DUMP)
    await runtime.start()
    assert await hold.wait_or_end("post-dump", runtime.process, 0.05) is None
    hold.decide("abort")
    assert await runtime.end() == 1
    hold.close()


async def test_a_hook_that_is_killed_has_failed(directory: Path) -> None:
    hold = prepare(directory)
    hold.open_gate()
    runtime = Runtime(hold, DUMP, ["post-dump"])
    await runtime.start()
    assert await hold.wait_or_end("post-dump", runtime.process, DEADLINE_S)
    (hook,) = psutil.Process(runtime.process.pid).children()
    hook.kill()
    assert await runtime.end() == 1
    assert not (directory / "committed").exists()
    hold.close()


@pytest.fixture
def init(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """Plays the first task of what is restored."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        monkeypatch.setenv("CRTOOLS_INIT_PID", str(process.pid))
        yield process
        process.kill()


JUDGED_ACTIONS = ("post-restore", "network-unlock", "pre-resume", "post-resume")


def prepare_judged(directory: Path, *judge: str) -> CriuHold:
    refused = ("touch", str(directory.parent / "unplugged"))
    plan = HoldPlan("post-restore", (), judged=judge, at_refusal=(refused,))
    hold = CriuHold.prepare(directory, plan)
    hold.open_gate()
    hold.decide("commit")
    return hold


@pytest.mark.parametrize("word", ["run", "refuse"])
async def test_a_copy_waits_for_its_judge(
    directory: Path, init: subprocess.Popen[bytes], word: str
) -> None:
    hold = prepare_judged(directory, "false")
    runtime = Runtime(hold, RESTORE, JUDGED_ACTIONS)
    await runtime.start()
    assert await hold.wait_or_end("pre-resume", runtime.process, DEADLINE_S)
    assert init.poll() is None
    assert not has_seen(directory, "post-resume")
    hold.judge("run" if word == "run" else "refuse")
    assert await runtime.end() == (0 if word == "run" else 1)
    if word == "run":
        assert init.poll() is None
        assert is_let_go(directory)
    else:
        assert init.wait(DEADLINE_S) == -signal.SIGKILL
        assert is_refused(directory)
        assert not is_let_go(directory)
    assert (directory.parent / "unplugged").exists() == (word == "refuse")
    hold.close()


@pytest.mark.parametrize("word", ["run", "refuse"])
async def test_a_copy_whose_agent_is_silent_is_judged_by_another(
    directory: Path, init: subprocess.Popen[bytes], word: str
) -> None:
    say = 'echo "$0" > "$1"'
    hold = prepare_judged(directory, "sh", "-c", say, word, str(directory / "judgement"))
    runtime = Runtime(hold, RESTORE, JUDGED_ACTIONS)
    await runtime.start()
    assert await hold.wait_or_end("pre-resume", runtime.process, DEADLINE_S)
    hold.close()
    assert await runtime.end() == (0 if word == "run" else 1)
    assert is_refused(directory) == (word == "refuse")


@pytest.mark.parametrize("is_made", [True, False])
async def test_a_network_is_waited_for_as_long_as_somebody_makes_it(
    directory: Path, init: subprocess.Popen[bytes], is_made: bool
) -> None:
    hold = CriuHold.prepare(directory, HoldPlan("post-restore", (), needs_network=True))
    hold.open_gate()
    hold.decide("commit")
    runtime = Runtime(hold, RESTORE, ["setup-namespaces", "post-restore", "post-resume"])
    await runtime.start()
    assert await hold.wait_or_end("setup-namespaces", runtime.process, DEADLINE_S)
    assert hold.init_pid() == init.pid
    assert not has_seen(directory, "post-restore")
    if is_made:
        hold.network_is_made()
    else:
        hold.close()
    assert await runtime.end() == (0 if is_made else 1)
    assert has_seen(directory, "post-restore") == is_made
    hold.close()


async def test_a_network_that_nobody_will_make_is_given_up(directory: Path) -> None:
    hold = CriuHold.prepare(directory, HoldPlan("post-restore", (), needs_network=True))
    hold.close()
    environment = {**os.environ, "CRTOOLS_SCRIPT_ACTION": "setup-namespaces"}
    hook = await asyncio.create_subprocess_exec(directory / "hook", env=environment)
    assert await asyncio.wait_for(hook.wait(), DEADLINE_S) == 1


async def test_what_could_not_be_killed_was_not_refused(
    directory: Path, init: subprocess.Popen[bytes]
) -> None:
    """It may have run: nobody may say that it has not."""
    init.kill()
    init.wait()
    hold = prepare_judged(directory, "false")
    hold.judge("refuse")
    runtime = Runtime(hold, RESTORE, JUDGED_ACTIONS)
    await runtime.start()
    assert await runtime.end() == 1
    assert not is_refused(directory)
    assert is_let_go(directory)
    hold.close()


def pack(directory: Path, image: Path, environment: dict[str, str]) -> None:
    """As `criu/filesystems.c: tmpfs_dump` does."""
    how = ("--no-unquote", "--no-wildcards", "--one-file-system", "--check-links")
    kept = ("--preserve-permissions", "--sparse", "--numeric-owner")
    command = ["tar", "--create", "--gzip", *how, *kept, "--directory", str(directory), "."]
    with image.open("wb") as out:
        subprocess.run(command, stdout=out, check=True, env=environment)


def unpack(image: Path, directory: Path, environment: dict[str, str]) -> None:
    """As `criu/filesystems.c: tmpfs_restore` does."""
    how = ("--no-unquote", "--no-wildcards")
    command = ["tar", "--extract", "--gzip", *how, "--directory", str(directory)]
    with image.open("rb") as packed:
        subprocess.run(command, stdin=packed, check=True, env=environment)


@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_tmpfs_is_packed_without_gzip_and_unpacked_from_either(
    directory: Path, tmp_path: Path, is_ours: bool
) -> None:
    hold = prepare(directory)
    ours = hold.environment(os.environ)
    image, original, copy = tmp_path / "image", tmp_path / "a dir", tmp_path / "copy"
    original.mkdir()
    copy.mkdir()
    (original / "of two words").write_bytes(b"x" * 100_000)
    os.mkfifo(original / "fifo", 0o640)
    pack(original, image, ours if is_ours else dict(os.environ))
    assert image.read_bytes().startswith(b"\x1f\x8b") != is_ours
    unpack(image, copy, ours)
    assert (copy / "of two words").read_bytes() == b"x" * 100_000
    assert stat.S_IMODE((copy / "fifo").stat().st_mode) == 0o640
    hold.close()
