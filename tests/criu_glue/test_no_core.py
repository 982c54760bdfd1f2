"""No core dump of what has seen secrets, with processes that are killed as by a fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

FAULT = """\
import ctypes, os, resource, signal
PR_GET_DUMPABLE = 3
resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))
if {forbids}:
    from criu_glue.no_core import forbid_cores
    forbid_cores()
dumpable = ctypes.CDLL(None).prctl(PR_GET_DUMPABLE)
print(dumpable, *resource.getrlimit(resource.RLIMIT_CORE), flush=True)
os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.mark.parametrize("forbids", [True, False])
def test_a_fault_leaves_no_core(tmp_path: Path, forbids: bool) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text()
    ended = subprocess.run(
        [sys.executable, "-c", FAULT.format(forbids=forbids)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == -signal.SIGSEGV
    # The hard limit stays, for CRIU to give to others.
    limit = 1 << 20
    assert ended.stdout == (f"0 0 {limit}\n" if forbids else f"1 {limit} {limit}\n")
    if "/" not in pattern and not pattern.startswith("|"):
        assert any(tmp_path.iterdir()) is not forbids


def test_those_that_it_starts_keep_the_limit() -> None:
    script = (
        "from criu_glue.no_core import forbid_cores; import os; forbid_cores();"
        "os.execvp('sh', ['sh', '-c', 'ulimit -S -c'])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    said = subprocess.run(
        [sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True, check=True
    )
    assert said.stdout.strip() == "0"
