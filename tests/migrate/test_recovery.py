"""The source's machine driven from outside: a real journal, real FIFOs, a peer over real TLS."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrate import recovery
from migrate.claim import Claim
from migrate.core import messages as m
from migrate.core.states import SourceState as S
from migrate.errors import InDoubt, MigrateError
from migrate.journal import Journal, JournalWriter, Migration
from migrate.recovery import Owner, recover_claimed, recover_orphans, sweep
from tests.migrate.stage import ATTEMPT, COPIED, GIVEN, MIGRATION, PEER, Stage

HOST = socket.gethostname()
ASK = m.Ask(MIGRATION, ATTEMPT)
COMMIT = m.Commit(MIGRATION, ATTEMPT)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    stage = Stage(tmp_path)
    await stage.peer.start()
    yield stage
    await stage.peer.stop()
    stage.close()


async def recover(stage: Stage, *, owner: Owner | None = None, patience_s: float = 0.0) -> S:
    journal = JournalWriter(stage.paths.journal)
    try:
        return await recover_claimed(
            stage.migration,
            journal,
            stage.runtimes,
            stage.paths,
            patience_s=patience_s,
            owner=owner,
        )
    finally:
        journal.close()


def assert_untouched(stage: Stage) -> None:
    """It is frozen and held as before, and the journal says nothing new."""
    assert stage.is_held
    assert stage.is_frozen
    assert stage.states()[-1] == "committed"
    assert stage.session.exists()


def assert_given_back(stage: Stage) -> None:
    assert stage.word() == "abort"
    assert not stage.is_frozen
    assert stage.states()[-2:] == ["rolling_back", "aborted"]
    assert stage.runtime.known == {"web"}
    assert not stage.session.exists()


def assert_let_die(stage: Stage) -> None:
    assert stage.word() == "commit"
    assert stage.states()[-2:] == ["releasing", "done"]
    assert stage.runtime.known == set()
    assert not stage.session.exists()


# ---- not committed ----


@pytest.mark.parametrize("states", [("precopy",), COPIED, (*COPIED, "rolling_back")])
async def test_what_was_not_committed_is_undone(stage: Stage, states: tuple[str, ...]) -> None:
    stage.freeze()
    stage.enter(*states)
    assert await recover(stage) is S.ABORTED
    assert_given_back(stage)
    (abort,) = stage.peer.heard
    assert isinstance(abort, m.Abort)
    assert (abort.migration_id, abort.attempt) == (MIGRATION, ATTEMPT)


async def test_a_target_that_is_away_does_not_keep_it_from_being_undone(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*COPIED)
    await stage.peer.stop()
    assert await recover(stage) is S.ABORTED
    assert_given_back(stage)


async def test_what_had_just_begun_is_closed(stage: Stage) -> None:
    """Nothing was touched, and no target heard of it."""
    stage.enter()
    assert await recover(stage) is S.ABORTED
    assert stage.states() == ["aborted"]
    assert stage.peer.heard == []


async def test_it_is_undone_on_a_host_that_was_started_anew(stage: Stage) -> None:
    """The session's directory went with the host, and so did the container."""
    stage.freeze()
    stage.enter(*COPIED)
    recovery.wipe(stage.session)
    assert await recover(stage) is S.ABORTED
    assert stage.is_held
    assert stage.is_frozen


async def test_a_container_that_was_slowed_runs_freely_again(stage: Stage) -> None:
    """Its coordinator was killed, and so was what slowed it."""
    stage.session.mkdir(parents=True)
    stage.cgroup.mkdir()
    (stage.cgroup / "cgroup.freeze").write_text("1")
    stage.enter("precopy", brake={"cgroup": str(stage.cgroup), "words": ["0.5"]})
    assert await recover(stage) is S.ABORTED
    assert not stage.is_frozen


async def test_a_limit_of_a_container_that_was_slowed_is_put_back(stage: Stage) -> None:
    """Also when it was frozen since, and CRIU held it."""
    stage.freeze()
    limit = stage.cgroup / "cpu.max"
    limit.write_text("1000 100000\n")
    words = ["50000 100000", "1000 100000"]
    brake = {"cgroup": str(stage.cgroup), "cpu_max": "max 100000", "words": words}
    stage.enter(*COPIED, brake=brake)
    assert await recover(stage) is S.ABORTED
    assert_given_back(stage)
    assert limit.read_text() == "max 100000"


async def test_a_host_that_was_started_anew_has_no_limit_to_put_back(stage: Stage) -> None:
    stage.freeze()
    limit = stage.cgroup / "cpu.max"
    limit.write_text("1000 100000")
    brake = {"cgroup": str(stage.cgroup), "cpu_max": "max 100000", "words": ["1000 100000"]}
    stage.enter("precopy", brake=brake)
    stage.lose_power()
    assert await recover(stage) is S.ABORTED
    assert limit.read_text() == "1000 100000"


# ---- committed: the target decides ----


@pytest.mark.parametrize("said", ["running", "done"])
async def test_it_runs_on_the_target(stage: Stage, said: str) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    stage.peer.answers = [said]
    assert await recover(stage) is S.DONE
    assert stage.peer.heard == [ASK]
    assert_let_die(stage)


@pytest.mark.parametrize("said", ["held", "in_doubt"])
async def test_it_is_held_on_the_target(stage: Stage, said: str) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    stage.peer.answers = [said, "running"]
    assert await recover(stage) is S.DONE
    assert stage.peer.heard == [ASK, COMMIT]
    assert_let_die(stage)


async def test_the_target_has_no_copy(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    stage.peer.answers = ["aborted"]
    assert await recover(stage) is S.ABORTED
    assert_given_back(stage)


# Of these none tells where the container will be.
@pytest.mark.parametrize(
    "said", ["unknown", "aborting", "receiving", "prepared", "committed", "held", "nonsense"]
)
async def test_a_word_that_decides_nothing_holds_everything(stage: Stage, said: str) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    stage.peer.answers = [said]
    with pytest.raises(InDoubt, match=f"localhost says {said}") as held:
        await recover(stage)
    assert held.value.container_state.startswith("is held on ")
    assert f"migrate recover {MIGRATION}" in held.value.remedy
    assert_untouched(stage)


async def test_a_target_that_is_away_is_asked_again(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recovery.DEADLINES_S, S.IN_DOUBT, 0.02)
    stage.freeze()
    stage.enter(*GIVEN)
    await stage.peer.stop()
    stage.peer.answers = ["running"]
    recovering = asyncio.create_task(recover(stage, patience_s=60.0))
    await asyncio.sleep(0)
    await stage.peer.start()
    assert await recovering is S.DONE
    assert_let_die(stage)


async def test_a_target_that_is_away_for_too_long(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    await stage.peer.stop()
    with pytest.raises(InDoubt, match="does not answer"):
        await recover(stage)
    assert_untouched(stage)


# ---- the container went down with its host ----


@pytest.fixture
def powerless(stage: Stage) -> Stage:
    stage.freeze()
    stage.enter(*COPIED)
    stage.lose_power()
    return stage


@pytest.mark.parametrize("said", ["held", "in_doubt", "running", "committed"])
async def test_the_only_copy_is_committed_to(powerless: Stage, said: str) -> None:
    """RUNNING and COMMITTED: its operator has decided so there meanwhile."""
    powerless.peer.answers = [said, "running"]
    assert await recover(powerless) is S.DONE
    assert powerless.peer.heard == [ASK, COMMIT]
    assert powerless.states()[-4:] == ["frozen", "committed", "releasing", "done"]


async def test_there_is_no_copy_either(powerless: Stage) -> None:
    powerless.peer.answers = ["aborted"]
    assert await recover(powerless) is S.ABORTED
    assert COMMIT not in powerless.peer.heard


@pytest.mark.parametrize("said", ["restoring", "unknown"])
async def test_a_copy_that_is_not_held_yet_is_waited_for(powerless: Stage, said: str) -> None:
    powerless.peer.answers = [said]
    with pytest.raises(InDoubt, match=f"went down while web was frozen.*says {said}"):
        await recover(powerless)
    assert powerless.states()[-1] == "frozen"
    assert powerless.peer.heard == [ASK]


async def test_nobody_can_be_asked_for_the_only_copy(powerless: Stage) -> None:
    await powerless.peer.stop()
    with pytest.raises(InDoubt) as caught:
        await recover(powerless)
    assert caught.value.container_state == f"does not run on {HOST}; {PEER} may hold it"
    assert powerless.states()[-1] == "frozen"
    assert await recover(powerless, owner="source") is S.ABORTED


async def test_a_container_that_is_there_was_not_lost(powerless: Stage) -> None:
    powerless.runtime.known = {"web"}
    assert await recover(powerless) is S.ABORTED
    assert ASK not in powerless.peer.heard


async def test_an_answer_about_another_migration_counts_for_nothing(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    stage.peer.answers = ["running"]
    stage.peer.subject = "m-2"
    with pytest.raises(InDoubt, match="answered State"):
        await recover(stage)
    assert_untouched(stage)


# ---- an operator's word ----


async def test_an_operator_gives_it_to_the_source(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    await stage.peer.stop()
    assert await recover(stage, owner="source") is S.ABORTED
    assert_given_back(stage)


async def test_an_operator_gives_it_to_the_target(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    await stage.peer.stop()
    assert await recover(stage, owner="target") is S.DONE
    assert_let_die(stage)


async def test_an_operator_cannot_keep_what_was_not_committed_from_being_undone(
    stage: Stage,
) -> None:
    stage.freeze()
    stage.enter(*COPIED)
    assert await recover(stage, owner="target") is S.ABORTED
    assert_given_back(stage)


# ---- being removed ----


async def test_a_release_is_finished(stage: Stage) -> None:
    stage.freeze()
    stage.enter(*GIVEN, "releasing")
    assert await recover(stage) is S.DONE
    assert_let_die(stage)
    assert stage.peer.heard == []


async def test_a_container_of_that_name_that_came_later_is_left_alone(stage: Stage) -> None:
    """This host was started anew, and somebody has made another one since."""
    stage.enter(*GIVEN, "releasing", bundle=str(stage.paths.containers / "web"))
    bundle = stage.paths.containers / "web"
    bundle.mkdir(parents=True)
    assert await recover(stage) is S.DONE
    assert stage.runtime.known == {"web"}
    assert bundle.exists()


@pytest.mark.parametrize("is_ours", [True, False])
async def test_a_bundle_that_an_agent_made_goes(
    stage: Stage, tmp_path: Path, is_ours: bool
) -> None:
    bundle = (stage.paths.containers if is_ours else tmp_path) / "web"
    bundle.mkdir(parents=True)
    stage.freeze()
    stage.enter(*GIVEN, "releasing", bundle=str(bundle))
    assert await recover(stage) is S.DONE
    assert bundle.exists() is not is_ours


# ---- what a recovery can't do ----


async def test_facts_that_make_no_sense(stage: Stage) -> None:
    stage.enter(*GIVEN, port="seven")
    with pytest.raises(MigrateError, match=f"the facts of {MIGRATION} can't be read"):
        await recover(stage)
    assert stage.states()[-1] == "committed"


async def test_a_runtime_without_a_driver(stage: Stage) -> None:
    stage.enter(*COPIED)
    journal = JournalWriter(stage.paths.journal)
    with pytest.raises(MigrateError, match="no driver for the runtime runc"):
        await recover_claimed(stage.migration, journal, {}, stage.paths, patience_s=0)
    journal.close()
    assert stage.states()[-1] == "frozen"


# ---- all orphans ----


@pytest.fixture
async def journal(stage: Stage) -> AsyncIterator[JournalWriter]:
    writer = JournalWriter(stage.paths.journal)
    yield writer
    writer.close()


async def test_what_somebody_drives_is_left_to_it(stage: Stage, journal: JournalWriter) -> None:
    stage.freeze()
    stage.enter(*COPIED)
    with Claim.take(stage.paths.claim(MIGRATION, "source"), "coordinator"):
        assert await recover_orphans(journal, stage.runtimes, stage.paths, patience_s=0) == []
        assert stage.is_held
    assert await recover_orphans(journal, stage.runtimes, stage.paths, patience_s=0) == []
    assert_given_back(stage)
    assert not stage.paths.claim(MIGRATION, "source").exists()


async def test_what_stays_is_named_and_its_claim_is_free(
    stage: Stage, journal: JournalWriter
) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    ((migration, error),) = await recover_orphans(
        journal, stage.runtimes, stage.paths, patience_s=0
    )
    assert migration.migration_id == MIGRATION
    assert isinstance(error, InDoubt)
    assert_untouched(stage)
    Claim.take(stage.paths.claim(MIGRATION, "source"), "recovery").release()


async def test_targets_of_other_containers_are_not_asked(
    stage: Stage, journal: JournalWriter
) -> None:
    stage.freeze()
    stage.enter(*GIVEN)
    left = await recover_orphans(
        journal, stage.runtimes, stage.paths, patience_s=0, container="other"
    )
    assert left == []
    assert stage.peer.heard == []
    assert_untouched(stage)


async def test_the_side_of_a_target_is_no_orphan_of_the_source(
    stage: Stage, journal: JournalWriter
) -> None:
    stage.enter("receiving", role="target")
    assert await recover_orphans(journal, stage.runtimes, stage.paths, patience_s=0) == []
    assert stage.states("target") == ["receiving"]


# ---- what is left of those that have ended ----


async def test_sweep(stage: Stage, journal: JournalWriter) -> None:
    """Directories and claims of ended migrations go; of open and of claimed ones they stay."""
    stage.enter(*COPIED)
    with Journal.open(stage.paths.journal) as opened:
        ended = Migration("m-2", "source", 8, "web", "runc", "b", 1.0)
        opened.begin(ended)
        opened.append("m-2", "source", "aborted", "test", at_wall_s=2.0)
    for name in (f"{MIGRATION}.source", "m-2.source", "m-3.target", "m-4.target"):
        (stage.paths.run / "sessions" / name / "work").mkdir(parents=True)
    claims = stage.paths.run / "claims"
    claims.mkdir()
    for name in (f"{MIGRATION}.source", "m-2.source", "m-5.source"):
        (claims / name).write_text("4711 coordinator")
    with (
        Claim.take(claims / "m-4.target", "agent"),
        Claim.take(stage.paths.agent_claim, "agent"),
    ):
        await sweep(journal, stage.paths)
        left = {path.name for path in (stage.paths.run / "sessions").iterdir()}
        assert left == {f"{MIGRATION}.source", "m-4.target"}
        left = {path.name for path in claims.iterdir()}
        assert left == {f"{MIGRATION}.source", "m-4.target", "agent"}


async def test_sweep_where_nothing_ever_was(stage: Stage, journal: JournalWriter) -> None:
    await sweep(journal, stage.paths)
