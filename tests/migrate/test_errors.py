"""What an error says, in which order, and what the process exits with."""

from __future__ import annotations

import pytest

from migrate import errors
from migrate.errors import (
    InvalidTransition,
    MigrateError,
    PreflightRefused,
    RestoreFailed,
    SessionRefused,
    held_on,
    runs_on,
)

FULL = RestoreFailed(
    "CRIU could not restore the container: no memory",
    host="beta",
    phase="restoring",
    container_state=runs_on("alpha"),
    remedy="free 1 GiB on beta and try again",
)


def test_an_error_is_rendered_in_the_order_that_a_reader_needs() -> None:
    assert FULL.render() == (
        "CRIU could not restore the container: no memory\n"
        "  host:      beta\n"
        "  phase:     restoring\n"
        "  container: runs on alpha\n"
        "  remedy:    free 1 GiB on beta and try again"
    )


def test_an_error_in_a_log_is_one_line() -> None:
    assert str(FULL) == (
        "CRIU could not restore the container: no memory (host beta, phase restoring);"
        " the container runs on alpha; remedy: free 1 GiB on beta and try again"
    )


def test_what_is_not_known_is_not_shown() -> None:
    error = MigrateError("it failed", phase="precopy")
    assert error.render() == "it failed\n  phase:     precopy"
    assert str(error) == "it failed (phase precopy)"
    assert str(MigrateError("it failed")) == MigrateError("it failed").render() == "it failed"


def test_what_is_known_first_is_kept() -> None:
    error = MigrateError("it failed", host="beta")
    assert error.at(host="alpha", container_state=held_on("alpha")) is error
    assert (error.host, error.container_state) == ("beta", "is held on alpha")


def test_refusals_come_with_their_remedies() -> None:
    error = SessionRefused(
        [("memory", "too little memory", "free 1 GiB"), ("name", "the name is taken", "")],
        host="beta",
        container_state=runs_on("alpha"),
    )
    assert isinstance(error, PreflightRefused)
    assert error.render() == (
        "preflight found 2 blockers\n"
        "  host:      beta\n"
        "  phase:     preflight\n"
        "  container: runs on alpha\n"
        "  - too little memory [memory]\n"
        "    remedy: free 1 GiB\n"
        "  - the name is taken [name]"
    )
    assert error.refusals[0] == ("memory", "too little memory", "free 1 GiB")
    assert "1 blocker" in str(PreflightRefused([("x", "y", "z")]))


def test_exit_codes() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, MigrateError)
    ]
    by_code = {
        code: {kind.__name__ for kind in kinds if kind.exit_code == code} for code in (1, 2, 3, 4)
    }
    assert by_code[2] == {"UsageError", "PreflightRefused", "SessionRefused", "JournalUnusable"}
    assert by_code[3] == {"InDoubt", "RollbackFailed"}
    assert by_code[4] == {"CopiesMissing"}
    assert len(by_code[1]) == len(kinds) - 7
    assert all(kind.__doc__ for kind in kinds)


@pytest.mark.parametrize("history", [(), (("new", "started"), ("preflight", "preflight_passed"))])
def test_an_invalid_transition_shows_the_way_to_it(history: tuple[tuple[str, str], ...]) -> None:
    error = InvalidTransition("source", "precopy", "dumped", history)
    assert error.history == history
    way = "new -started-> preflight -preflight_passed->" if history else "none"
    assert str(error).startswith(f"the source does not allow dumped in state precopy (way: {way})")
