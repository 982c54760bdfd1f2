"""The front that most tests here attack."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.hostile.scene import Scene


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    """A front that serves; root is needed to make one."""
    if os.geteuid() != 0:
        pytest.skip("a front is made by root")
    place = Path(tempfile.mkdtemp(prefix="front-", dir="/dev/shm"))
    scene = Scene(tmp_path, place)
    await scene.start()
    yield scene
    await scene.stop()
    shutil.rmtree(place)
