"""Claims between real processes: one at a time, and free as soon as the owner is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrate.claim import Claim, Claimant, ClaimTakenError, Kind, claimant
from migrate.errors import MigrateError
from tests.lab.waiting import wait_until

DEADLINE_S = 60.0
# Takes a claim, starts a child, says who they are, and waits for the end of its input.
OWNER = """
import subprocess, sys
from pathlib import Path
from migrate.claim import Claim
claim = Claim.take(Path(sys.argv[1]), sys.argv[2])
child = subprocess.Popen(["sleep", "600"], close_fds=False)
print(child.pid, flush=True)
sys.stdin.read()
if sys.argv[3] == "release":
    claim.release()
    child.kill()
    child.wait()
"""
# Takes and releases a claim over and over. What only one may do at a time: make a file anew.
RIVAL = """
import os, sys
from pathlib import Path
from migrate.claim import Claim, ClaimTakenError
taken = 0
while taken < 200:
    try:
        claim = Claim.take(Path(sys.argv[1]), "recovery")
    except ClaimTakenError:
        continue
    os.close(os.open(sys.argv[2], os.O_CREAT | os.O_EXCL))
    os.unlink(sys.argv[2])
    claim.release()
    taken += 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "claims" / "m-1.source"


@contextmanager
def owner(path: Path, kind: Kind, *, end: str = "release") -> Iterator[subprocess.Popen[str]]:
    """Another process that has the claim; with a child, as a coordinator has."""
    command = [sys.executable, "-c", OWNER, str(path), kind, end]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process
        finally:
            process.kill()
            wait_until("its child is an orphan", lambda: process.poll() is not None)
            if Path(f"/proc/{child}").exists():
                os.kill(child, 9)


@pytest.mark.parametrize("kind", ["coordinator", "agent", "recovery"])
def test_who_has_it_is_known_to_others(path: Path, kind: Kind) -> None:
    assert claimant(path) is None
    with owner(path, kind) as process:
        assert claimant(path) == Claimant(process.pid, kind)
        with pytest.raises(ClaimTakenError, match=f"m-1.source .* the {kind} .* {process.pid}$"):
            Claim.take(path, "recovery")


def test_it_is_free_again_when_it_was_released(path: Path) -> None:
    with owner(path, "agent") as process:
        process.communicate("")
        assert process.returncode == 0
        assert not path.exists()
        with Claim.take(path, "recovery"):
            assert claimant(path) == Claimant(os.getpid(), "recovery")
    assert claimant(path) is None


def test_it_is_free_when_its_owner_was_killed_though_children_live(path: Path) -> None:
    with owner(path, "coordinator") as process:
        process.kill()
        process.wait()
        # The file stays, and says what is true no more.
        assert path.read_text() == f"{process.pid} coordinator"
        assert claimant(path) is None
        with Claim.take(path, "recovery"):
            assert claimant(path) == Claimant(os.getpid(), "recovery")


def test_a_file_that_was_removed_is_no_claim_any_more(path: Path) -> None:
    """Somebody cleans up by hand: whoever comes next locks a file that has the name."""
    with owner(path, "agent") as process:
        path.unlink()
        assert claimant(path) is None
        with Claim.take(path, "recovery"):
            assert claimant(path) == Claimant(os.getpid(), "recovery")
            # The former one is ended in order and takes the new one's file with it.
            process.communicate("")


def test_rivals_take_turns(path: Path, tmp_path: Path) -> None:
    """Each release removes the file that the others are about to lock."""
    command = [sys.executable, "-c", RIVAL, str(path), str(tmp_path / "alone")]
    rivals = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    said = [rival.communicate(timeout=DEADLINE_S)[1] for rival in rivals]
    assert [rival.returncode for rival in rivals] == [0] * 4, said
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "agent", "x agent", "1 2 3", "\xff" * 100])
def test_an_owner_that_has_not_said_who_it_is(path: Path, text: str) -> None:
    with Claim.take(path, "agent"):
        path.write_bytes(text.encode("latin-1"))
        assert claimant(path) == Claimant(0, "")
        with pytest.raises(ClaimTakenError, match=r"in the hands of a process$"):
            Claim.take(path, "recovery")


def test_it_can_be_released_twice(path: Path) -> None:
    first = Claim.take(path, "agent")
    first.release()
    with Claim.take(path, "recovery"):
        first.release()
        assert claimant(path) == Claimant(os.getpid(), "recovery")


def test_where_no_file_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("no directory")
    with pytest.raises(MigrateError, match="can't be claimed") as failed:
        Claim.take(tmp_path / "claims" / "m-1.source", "agent")
    assert not isinstance(failed.value, ClaimTakenError)
