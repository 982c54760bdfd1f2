"""Migrations that fail on the target or in CRIU: the container runs on, the target keeps nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from bench.lab.lab import Lab
from tests.lab.invariants import (
    FAST,
    IDLE,
    SLOW,
    assert_moves,
    assert_undone,
    explained,
    failure_lab,
    migration_id,
    threatened,
    wait_frozen,
    wait_round,
    wait_session,
)
from tests.lab.migrating import begin, migrate, running_on
from tests.lab.waiting import wait_until


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


# ---- the target's agent dies ----


def test_the_agent_dies_while_memory_is_copied(lab: Lab) -> None:
    with threatened(lab, "f-copy") as under:
        lab.set_rate("A", SLOW)
        underway = begin(lab.host("A"), under.name, "B", "--json")
        wait_round(underway)
        lab.kill_agent("B")
        told = explained(underway.finish())
        assert (told.host, told.phase, told.container) == ("B", "precopy", "runs on A")
        # What the dead agent has left goes when the next one starts.
        lab.start_agent("B")
        assert_undone(under)
        assert_moves(under)


def test_the_agent_dies_when_the_restore_is_prepared(lab: Lab) -> None:
    with threatened(lab, "f-prep") as under:
        underway = begin(lab.host("A"), under.name, "B", "--json")
        underway.wait_phase("prepare")
        # The last round is under way then, with the target's runtime at its gate.
        lab.set_rate("A", SLOW)
        wait_session(lab.host("B"), migration_id(underway), "prepared")
        lab.kill_agent("B")
        told = explained(underway.finish())
        assert (told.host, told.container) == ("B", "runs on A")
        lab.start_agent("B")
        assert_undone(under)
        assert_moves(under)


def test_the_agent_dies_while_the_container_is_frozen(lab: Lab) -> None:
    with threatened(lab, "f-frozen", args=IDLE) as under:
        underway = begin(lab.host("A"), under.name, "B", "--json")
        wait_frozen(under, underway)
        lab.kill_agent("B")
        told = explained(underway.finish())
        lab.set_rate("A", FAST)
        assert (told.host, told.container) == ("B", "runs on A")
        assert told.phase in ("frozen", "sending_final")
        lab.start_agent("B")
        assert_undone(under)
        assert_moves(under)


# ---- CRIU fails ----


@pytest.mark.parametrize("fault", ["1", "5"], ids=["dump-early", "parasite-connect"])
def test_the_dump_fails(lab: Lab, fault: str) -> None:
    """By CRIU's own fault injection (criu/include/fault-injection.h)."""
    with threatened(lab, f"f-dump-{fault}") as under:
        failed = migrate(
            lab.host("A"), under.name, "B", "--json", env={"CRIU_FAULT": fault}
        )
        told = explained(failed)
        assert (told.host, told.phase, told.container) == ("A", "dump", "runs on A")
        assert_undone(under)
        assert_moves(under)


def test_the_restore_fails(lab: Lab) -> None:
    """After all tasks were restored, before the hold (FI_POST_RESTORE)."""
    with threatened(lab, "f-restore") as under:
        lab.kill_agent("B")
        lab.start_agent("B", env={"CRIU_FAULT": "6"})
        told = explained(migrate(lab.host("A"), under.name, "B", "--json"))
        assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
        assert_undone(under)
        lab.kill_agent("B")
        lab.start_agent("B")
        assert_moves(under)


def test_a_program_is_another_one_on_the_target(lab: Lab) -> None:
    """Same size, same time, so that rsync sees nothing: CRIU compares the build-id."""
    with threatened(lab, "f-build") as under:
        underway = begin(lab.host("A"), under.name, "B", "--json")
        program = f"/var/lib/migrate/containers/{under.name}/rootfs/bin/memory"
        underway.wait_phase("rootfs")
        spoil = (
            "f=$1; touch -r $f /tmp/time; at=$(grep -obUaP 'GNU\\x00' $f | head -n 1 | cut -d: -f 1); "
            "printf XXXX | dd of=$f bs=1 seek=$((at + 8)) conv=notrunc status=none; "
            "touch -r /tmp/time $f; rm /tmp/time"
        )
        lab.host("B").run(["sh", "-c", spoil, "spoil", program])
        told = explained(underway.finish())
        assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
        assert "bin/memory" in told.error
        assert_undone(under)
        assert_moves(under)


@pytest.mark.parametrize("spoil", ["truncate -s 0", "dd if=/dev/zero bs=8 count=1 conv=notrunc of="])
def test_an_image_is_spoilt_on_the_target(lab: Lab, spoil: str) -> None:
    name = "f-image-" + ("size" if "truncate" in spoil else "magic")
    with threatened(lab, name[:13], args=IDLE) as under:
        underway = begin(lab.host("A"), under.name, "B", "--json")
        wait_frozen(under, underway)
        image = f"/run/migrate/sessions/{migration_id(underway)}.target/img/pstree.img"
        target = lab.host("B")
        wait_until("an image", lambda: target.path(image).exists())
        separator = "" if spoil.endswith("=") else " "
        target.run(["sh", "-c", f"{spoil}{separator}{image}"])
        lab.set_rate("A", FAST)
        told = explained(underway.finish())
        assert (told.host, told.container) == ("B", "runs on A")
        assert_undone(under)
        assert_moves(under)


# ---- the user stops it ----


def test_ctrl_c_while_memory_is_copied(lab: Lab) -> None:
    with threatened(lab, "f-int-copy") as under:
        lab.set_rate("A", SLOW)
        underway = begin(lab.host("A"), under.name, "B", "--json")
        wait_round(underway)
        underway.interrupt()
        told = explained(underway.finish())
        assert told.error == "the migration was cancelled"
        assert (told.host, told.phase, told.container) == ("A", "precopy", "runs on A")
        assert_undone(under)
        assert_moves(under)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_container_is_frozen(lab: Lab, number: signal.Signals) -> None:
    with threatened(lab, f"f-{number.name.lower()}", args=IDLE) as under:
        underway = begin(lab.host("A"), under.name, "B", "--json")
        wait_frozen(under, underway)
        underway.interrupt(number)
        lab.set_rate("A", FAST)
        told = explained(underway.finish())
        assert told.error == "the migration was cancelled"
        assert (told.host, told.container) == ("A", "runs on A")
        assert_undone(under)
        assert_moves(under)
        assert running_on(lab, under.name) == ["B"]
