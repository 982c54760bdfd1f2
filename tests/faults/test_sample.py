"""A part of the campaign, always the same: whoever is killed, the container runs exactly once, and
nothing is lost. All of it: `scripts/test --faults all`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.faults.campaign import attempt
from tests.faults.courses import COURSES
from tests.faults.points import Point, generate, sample
from tests.faults.scene import Scene

pytestmark = pytest.mark.lab


class Scenes:
    """One scene for all points, and another one where a point has failed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._scene: Scene | None = None

    def get(self) -> Scene:
        if self._scene is None:
            self._scene = self._stack.enter_context(Scene())
        return self._scene

    def spoil(self) -> None:
        """What there is is not used again."""
        self._scene = None
        self._stack.close()


@pytest.fixture(scope="module")
def scenes() -> Iterator[Scenes]:
    found = Scenes()
    yield found
    found.spoil()


@pytest.mark.parametrize("point", sample(generate(COURSES)), ids=str)
def test_point(point: Point, scenes: Scenes, tmp_path: Path) -> None:
    outcome = attempt(scenes.get(), point, tmp_path)
    if not outcome.passed:
        scenes.spoil()
        pytest.fail((tmp_path / f"{point}.txt").read_text())
