"""A copy that was let go and did not come to run: real processes, a runtime that keeps orders."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate.agent.ending import end_unheard
from migrate.agent.restoring import RestorePlan
from tests.migrate.stage import FakeRuntime


@pytest.fixture
def plan(tmp_path: Path) -> RestorePlan:
    session = tmp_path / "m-1.target"
    (session / "work" / "hold").mkdir(parents=True)
    return RestorePlan(
        "web", tmp_path / "bundle", tmp_path, session, lazy=True, ports=(), root_group=None
    )


@pytest.fixture
def hook(plan: RestorePlan) -> Iterator[subprocess.Popen[bytes]]:
    """What CRIU was at: a program of the session, which would plug the port some time."""
    program = plan.session / "work" / "hold" / "hook"
    program.write_text("#!/bin/sh\nread -r never\n")
    program.chmod(0o700)
    with subprocess.Popen([program], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_copy_that_nobody_has_heard_of_is_ended(
    plan: RestorePlan, hook: subprocess.Popen[bytes]
) -> None:
    runtime = FakeRuntime()
    assert end_unheard(plan, runtime)  # type: ignore[arg-type]
    assert runtime.deleted == ["web"]
    assert hook.poll() is not None, "it could still plug the port"


def test_a_copy_whose_port_was_plugged_is_left_to_the_operator(plan: RestorePlan) -> None:
    (plan.session / "work" / "hold" / "seen.network-unlock").touch()
    runtime = FakeRuntime()
    assert not end_unheard(plan, runtime)  # type: ignore[arg-type]
    assert runtime.deleted == []
