"""What stays of a migration to a host of no fleet, as long as it has to, and no longer."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec
import pytest

from migrate import config, once
from migrate.agent.once import Listening
from migrate.errors import MigrateError
from migrate.way import DIRECT
from transport.ssh.asking import Asking

ID = "0123456789ab"
# Nobody is there, and nobody is asked: `ssh -G` alone is needed.
NOWHERE = "root@127.0.0.1:1"


@pytest.fixture
def paths(tmp_path: Path) -> config.HostPaths:
    return config.HostPaths(run=tmp_path / "run", state=tmp_path / "state")


def _leave(paths: config.HostPaths) -> Path:
    """As a command that was killed does."""
    directory = paths.once(ID).state
    directory.mkdir(parents=True)
    way = {"destination": NOWHERE, "root": "/x", "listening": Listening("B", 1, 2)}
    (directory / "way.json").write_bytes(msgspec.json.encode(way))
    return directory


def test_a_host_that_is_not_reached_leaves_nothing(paths: config.HostPaths) -> None:
    with (
        pytest.raises(MigrateError, match="no SSH connection"),
        once.OneShot(NOWHERE, ID, paths, Asking(), print),
    ):
        pytest.fail("it was not reached")
    assert not paths.once(ID).state.exists()


def test_there_is_no_way_back_but_to_hosts_of_no_fleet(paths: config.HostPaths) -> None:
    with contextlib.ExitStack() as stack:
        assert once.way_back(paths, ID, 7337, stack) == (DIRECT, paths)
        _leave(paths)
        with pytest.raises(MigrateError, match="no SSH connection"):
            once.way_back(paths, ID, 7337, stack)


def test_what_can_not_be_removed_there_stays_here(paths: config.HostPaths) -> None:
    told: list[str] = []
    directory = _leave(paths)
    once.sweep(paths, Asking(), told.append)
    assert directory.exists()
    (line,) = told
    assert line.startswith(f"{ID}: what it left on B stays: no SSH connection")


def test_what_is_under_way_is_left_alone(paths: config.HostPaths) -> None:
    told: list[str] = []
    directory = _leave(paths)
    with once._locked(directory):
        once.sweep(paths, Asking(), told.append)
    assert told == []


@pytest.mark.parametrize("content", ["", "{}", '{"destination": 5}', "\xff"])
def test_a_way_that_can_not_be_read(paths: config.HostPaths, content: str) -> None:
    (_leave(paths) / "way.json").write_text(content, encoding="latin-1")
    with pytest.raises(MigrateError, match=r"way\.json can't be read"):
        once.way_back(paths, ID, 7337, contextlib.ExitStack())
