"""Programs of tests/lab/programs, which run in containers of the tests."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

PROGRAMS: Final = Path(__file__).parent / "programs"
HEADERS: Final = Path(__file__).parents[2] / "bench/workloads"
FLAGS: Final = ("-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")


def compiled(name: str, directory: Path) -> Path:
    """The static binary of programs/NAME.c, made in `directory`."""
    binary = directory / name
    command = ["gcc", *FLAGS, "-I", str(HEADERS), "-o", str(binary), str(PROGRAMS / f"{name}.c")]
    subprocess.run(command, check=True)
    return binary
