"""Which tracker is chosen. What the kernel can is played; the trackers' own tests ask it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from criu_glue.trackers import soft_dirty, write_protect
from migrate import config, tracking
from migrate.errors import MigrateError
from migrate.options import Options

MEMORY_BYTES = 1 << 30
ROOM_BYTES = MEMORY_BYTES + config.SESSION_RESERVE_BYTES
FACTS = cast("Any", SimpleNamespace(memory_bytes=MEMORY_BYTES))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What it lacks for each tracker (None: nothing), and the memory that is free."""
    lacks: dict[str, Any] = {"write-protect": None, "soft-dirty": None, "free": ROOM_BYTES}
    monkeypatch.setattr(write_protect, "supported", lambda: lacks["write-protect"])
    monkeypatch.setattr(soft_dirty, "supported", lambda: lacks["soft-dirty"])
    monkeypatch.setattr(tracking, "free_memory_bytes", lambda: lacks["free"])
    return lacks


def choose(tracker: Any) -> tracking.Choice:
    return tracking.choose(Options("web", "B", tracker=tracker), FACTS, "A")


def test_the_first_that_works_is_taken(kernel: dict[str, Any]) -> None:
    assert (choose("auto").name, choose("auto").warning) == ("write-protect", "")
    kernel["write-protect"] = "too old"
    choice = choose("auto")
    assert (choice.name, choice.warning, choice.stills) == ("soft-dirty", "", True)
    assert "write-protect does not work here (too old)" in choice.reason
    kernel["soft-dirty"] = "too new"
    choice = choose("auto")
    assert (choice.name, choice.stills) == ("none", False)
    assert "(too old), nor does soft-dirty (too new)" in choice.warning
    assert "stands still" in choice.warning


def test_what_may_harm_is_said(kernel: dict[str, Any]) -> None:
    assert "killed in that moment" in choose("predump").warning
    assert choose("soft-dirty").warning == ""


@pytest.mark.parametrize(
    ("name", "needs"),
    [("write-protect",) * 2, ("soft-dirty",) * 2, ("predump", "soft-dirty")],
)
def test_what_is_asked_for_is_taken_or_refused(
    kernel: dict[str, Any], name: str, needs: str
) -> None:
    assert (choose(name).name, choose(name).reason) == (name, "it was asked for")
    kernel[needs] = "it can't"
    with pytest.raises(MigrateError, match="it can't") as refused:
        choose(name)
    assert (refused.value.host, "--tracker auto" in refused.value.remedy) == ("A", True)


def test_a_first_round_needs_room(kernel: dict[str, Any]) -> None:
    kernel["free"] = ROOM_BYTES - 1
    with pytest.raises(MigrateError, match="1280 MiB of memory"):
        choose("predump")
    assert choose("soft-dirty").name == "soft-dirty"


def test_none_asks_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for tracker in (write_protect, soft_dirty):
        monkeypatch.setattr(tracker, "supported", lambda: pytest.fail("asked"))
    assert choose("none").name == "none"
    assert "no tracker is wanted" in choose("none").warning
