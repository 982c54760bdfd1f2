"""Programs in C that the tests of this package watch from outside."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.criu_glue.puppets import Puppet, Stage

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).parent / "programs"


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with each program of programs/*.c, compiled."""
    directory = tmp_path_factory.mktemp("programs")
    for source in SOURCES.glob("*.c"):
        command = ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
        subprocess.run([*command, "-o", directory / source.stem, source], check=True)
    return directory


@pytest.fixture
def stage(programs: Path, tmp_path: Path) -> Iterator[Stage]:
    """Where puppets are started; all are gone afterwards."""
    with Stage(programs / "puppet", tmp_path / "socket") as made:
        yield made


@pytest.fixture
def puppet(stage: Stage) -> Puppet:
    """A running puppet."""
    return stage.start()
