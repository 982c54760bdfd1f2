"""`migrate cancel` and `recover`: who is told what, and whose word counts. Real journals, claims,
processes, and a peer over real TLS."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrate import oversight
from migrate.agent.custodian import Custodian
from migrate.agent.sessions import Sessions
from migrate.agent.words import Words
from migrate.claim import Claim, claimant
from migrate.core import messages as m
from migrate.errors import InDoubt, MigrateError, ProtocolError, UsageError
from migrate.journal import JournalWriter, Role
from migrate.peer import UNKNOWN
from migrate.recovery import Owner
from tests.lab.waiting import wait_until
from tests.migrate.stage import ATTEMPT, COPIED, GIVEN, MIGRATION, PEER, RECEIVED, Stage

HERE = socket.gethostname()
DEADLINE_S = 30.0
# A coordinator that, told to end, writes what it is told to write, and ends.
COORDINATOR = """
import signal, sys, time
from pathlib import Path
from migrate.claim import Claim
from migrate.journal import Journal
claim = Claim.take(Path(sys.argv[1]), "coordinator")
signal.signal(signal.SIGTERM, lambda *_: None)
print("claimed", flush=True)
signal.pause()
with Journal.open(Path(sys.argv[2])) as journal:
    for state in sys.argv[4:]:
        journal.append(sys.argv[3], "source", state, "test", at_wall_s=time.time())
claim.release()
"""


@pytest.fixture
async def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    monkeypatch.setattr(oversight, "RECOVER_PATIENCE_S", 0.0)
    stage = Stage(tmp_path)
    await stage.peer.start()
    yield stage
    await stage.peer.stop()
    stage.close()


async def recover(
    stage: Stage,
    migration_id: str | None = MIGRATION,
    *,
    owner: Owner | None = None,
    told: list[str] | None = None,
) -> list[str]:
    """What it tells; also in `told`, for one that ends with an error."""
    lines = [] if told is None else told
    await oversight.recover(stage.paths, stage.runtimes, migration_id, owner, lines.append)
    return lines


async def cancel(stage: Stage) -> str:
    return await oversight.cancel(stage.paths, stage.runtimes, MIGRATION)


# ---- recover ----


async def test_what_each_side_says_is_told_and_what_became_of_it(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    stage.peer.answers = ["running"]
    assert await recover(stage) == [
        f"{MIGRATION} web: {HERE} says committed; {PEER} says running",
        f"{MIGRATION} done: web runs on {PEER}",
    ]
    assert await recover(stage) == [f"{MIGRATION} has ended: web moved to {PEER}"]
    assert await recover(stage, None) == ["nothing is under way"]


async def test_a_container_that_went_with_its_host_is_not_said_to_run(stage: Stage) -> None:
    stage.enter(*COPIED)
    stage.runtime.known.clear()
    assert (await recover(stage))[-1] == f"{MIGRATION} aborted: web has ended on {HERE}"


# Of a peer that can be asked, and that may act upon what it knows at any moment.
@pytest.mark.parametrize("said", ["committed", "held", "aborting", "prepared"])
@pytest.mark.parametrize("owner", ["source", "target", None])
async def test_force_counts_for_nothing_where_the_target_answers(
    stage: Stage, said: str, owner: Owner | None
) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    stage.peer.answers = [said]
    with pytest.raises(InDoubt, match=f"{PEER} says {said}") as held:
        await recover(stage, owner=owner)
    assert "--force" not in held.value.remedy
    assert stage.is_held
    assert stage.is_frozen
    assert list(stage.states()) == [*GIVEN]


@pytest.mark.parametrize("owner", ["source", "target"])
async def test_the_word_of_the_target_comes_before_that_of_the_operator(
    stage: Stage, owner: Owner
) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    stage.peer.answers = ["running" if owner == "source" else "aborted"]
    await recover(stage, owner=owner)
    assert stage.states()[-1] == ("done" if owner == "source" else "aborted")


@pytest.mark.parametrize("is_away", [True, False], ids=["away", "knows-nothing"])
@pytest.mark.parametrize("owner", ["source", "target"])
async def test_force_counts_where_nobody_knows(stage: Stage, owner: Owner, is_away: bool) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    if is_away:
        await stage.peer.stop()
    with pytest.raises(InDoubt) as held:
        await recover(stage)
    assert "--force-source" in held.value.remedy
    assert "--force-target" in held.value.remedy
    await recover(stage, owner=owner)
    assert stage.states()[-1] == ("aborted" if owner == "source" else "done")
    assert stage.word() == ("abort" if owner == "source" else "commit")


async def test_one_in_doubt_does_not_hide_what_became_of_the_others(stage: Stage) -> None:
    """The target's side needs an agent of this host, and there is none."""
    stage.freeze()
    stage.enter(*COPIED)
    stage.enter(*RECEIVED, role="target")
    told: list[str] = []
    with pytest.raises(MigrateError, match="does not answer") as failed:
        await recover(stage, None, told=told)
    assert f"{MIGRATION} aborted: web runs on {HERE}" in told
    assert "start `migrate agent` here" in failed.value.remedy


async def test_what_its_coordinator_drives_is_left_to_it(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*COPIED)
    path = stage.paths.claim(MIGRATION, "source")
    with (
        Claim.take(path, "coordinator"),
        pytest.raises(UsageError, match="is being migrated by the coordinator") as refused,
    ):
        await recover(stage)
    assert f"migrate cancel {MIGRATION}" in refused.value.remedy
    assert stage.is_held


async def test_it_waits_while_the_agent_asks(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*COPIED)
    with Claim.take(stage.paths.claim(MIGRATION, "source"), "recovery"):
        recovering = asyncio.create_task(recover(stage))
        await asyncio.wait([recovering], timeout=0.2)
        assert not recovering.done()
        assert stage.is_held
    await recovering
    assert stage.states()[-1] == "aborted"


# ---- cancel ----


async def test_cancel_without_a_coordinator(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*COPIED)
    assert await cancel(stage) == f"{MIGRATION} is undone; web runs on {HERE}"
    assert stage.word() == "abort"
    assert not stage.is_frozen


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (GIVEN, f"{MIGRATION} is committed: web belongs to {PEER}"),
        ((*GIVEN, "releasing"), f"{MIGRATION} is committed: web belongs to {PEER}"),
        ((*GIVEN, "releasing", "done"), f"{MIGRATION} has ended: web moved to {PEER}"),
        ((*COPIED, "rolling_back", "aborted"), f"{MIGRATION} has ended: web undone"),
    ],
)
async def test_it_is_too_late_to_cancel(
    stage: Stage, states: tuple[str, ...], message: str
) -> None:
    stage.freeze()
    stage.enter(*states)
    with pytest.raises(UsageError, match=message):
        await cancel(stage)
    assert stage.is_held
    assert list(stage.states()) == [*states]
    assert stage.peer.heard == []


async def test_cancel_on_the_target(stage: Stage) -> None:
    stage.enter(*RECEIVED, role="target")
    with pytest.raises(UsageError, match=f"comes from {PEER}") as refused:
        await cancel(stage)
    assert refused.value.remedy == f"run on {PEER}: migrate cancel {MIGRATION}"


def coordinator(stage: Stage, *states: str) -> subprocess.Popen[str]:
    path = stage.paths.claim(MIGRATION, "source")
    command = [
        sys.executable,
        "-c",
        COORDINATOR,
        str(path),
        str(stage.paths.journal),
        MIGRATION,
        *states,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wait_until("it has its claim", lambda: claimant(path) is not None, deadline_s=DEADLINE_S)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    return process


async def test_cancel_tells_the_coordinator(stage: Stage) -> None:
    stage.enter(*COPIED)
    with coordinator(stage, "rolling_back", "aborted") as process:
        assert await cancel(stage) == f"{MIGRATION} is undone; web runs on {HERE}"
        assert process.wait(DEADLINE_S) == 0


async def test_a_commit_that_was_faster_than_the_cancel(stage: Stage) -> None:
    stage.enter(*COPIED)
    with coordinator(stage, "committed", "releasing", "done") as process:
        with pytest.raises(MigrateError, match="was committed before") as failed:
            await cancel(stage)
        assert failed.value.container_state == f"runs on {PEER}"
        assert process.wait(DEADLINE_S) == 0


# ---- what an agent answers from its journal ----


@pytest.fixture
async def words(stage: Stage) -> AsyncIterator[Words]:
    """Of an agent that has no session, since it was started again."""
    journal = JournalWriter(stage.paths.journal)
    sessions = Sessions(stage.paths, stage.runtimes, journal, HERE)
    custodian = Custodian(journal, stage.runtimes, stage.paths)
    yield Words(sessions, journal, custodian, stage.paths)
    journal.close()


@pytest.mark.parametrize(("role", "states"), [("source", GIVEN), ("target", RECEIVED)])
async def test_a_peer_is_answered_from_the_journal(
    stage: Stage, words: Words, role: Role, states: tuple[str, ...]
) -> None:
    stage.enter(*states, role=role)
    answer = words.as_source if role == "source" else words.as_target
    right = m.Ask(MIGRATION, ATTEMPT)
    assert await answer(right, PEER) == m.State(MIGRATION, ATTEMPT, states[-1])
    # Another attempt, another peer, another migration: no evidence for anything.
    assert (await answer(m.Ask(MIGRATION, ATTEMPT - 1), PEER)).name == UNKNOWN
    assert (await answer(right, "stranger")).name == UNKNOWN
    assert (await answer(m.Ask("m-2", ATTEMPT), PEER)).name == UNKNOWN


async def test_a_target_without_a_session_obeys_nobody(stage: Stage, words: Words) -> None:
    stage.enter(*RECEIVED, role="target")
    for word in (m.Commit(MIGRATION, ATTEMPT), m.Abort(MIGRATION, ATTEMPT, "test")):
        assert (await words.as_target(word, PEER)).name == "prepared"
    assert list(stage.states("target")) == [*RECEIVED]


async def test_a_source_is_only_asked(stage: Stage, words: Words) -> None:
    stage.enter(*COPIED)
    with pytest.raises(ProtocolError, match="only asked"):
        await words.as_source(m.Commit(MIGRATION, ATTEMPT), PEER)
    assert list(stage.states()) == [*COPIED]
