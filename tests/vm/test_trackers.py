"""The soft-dirty tracker on a kernel that has its bits, which the one below a lab may not have."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from bench.lab.lab import Lab
from tests.criu_glue.soft_dirty_scenes import SCENES
from tests.lab.inside import inside

PUPPET: Final = Path(__file__).parents[1] / "criu_glue/programs/puppet.c"
PLAY: Final = """
from tests.criu_glue.soft_dirty_scenes import play_all
answer(play_all(Path(given)))
"""


@pytest.mark.ci
def test_the_kernels_bits_say_what_was_written(machines: Lab, tmp_path: Path) -> None:
    host, program = machines.host("A"), "/root/puppet"
    subprocess.run(["gcc", "-O1", "-static", "-pthread", "-o", tmp_path / "p", PUPPET], check=True)
    shutil.copy2(tmp_path / "p", host.path(program))
    played = inside(host, PLAY, program, timeout_s=60.0 * host.patience)
    host.path(program).unlink()
    assert played == [scene.__name__ for scene in SCENES]
