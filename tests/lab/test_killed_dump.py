"""CRIU is killed in the midst of its dump, at chosen steps: the container runs on as if nothing had
been. `tests/faults/dump_kills.py` does the same at every step."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.probe_process import PYTHON_INSIDE
from tests.lab.invariants import picture
from tests.lab.migrating import Resident, resident, running_on, wait_clean
from tests.lab.trees import check_tree
from tests.lab.waiting import wait_until

# The filter by which CRIU is caught keeps it from suspending that of a container (ptrace(2),
# PTRACE_O_SUSPEND_SECCOMP), so these have none.
MEMORY: Final = ContainerSpec("kd-memory", "memory", memory_mib=8, seccomp=False)
TREE: Final = ContainerSpec("kd-tree", "tree", address="10.77.0.51/24", seccomp=False)

# After which step, and which of its kind: threads seized; code overwritten; signals blocked;
# registers set; running to its trap; the parasite at work; the trap of another thread.
STEPS_OF_ONE: Final = (
    "3 ptrace SEIZE",
    "2 ptrace POKEDATA",
    "1 ptrace SETSIGMASK",
    "1 ptrace SETREGSET",
    "1 ptrace CONT",
    "6 sendto",
    "9 ptrace CONT",
)
# In a process that is no init a trap that CRIU has not heard of is deadly: the 13th and so on.
STEPS_OF_MANY: Final = ("20 ptrace SEIZE", "13 ptrace CONT", "20 sendto", "26 ptrace CONT")


@contextlib.contextmanager
def killer(host: Host, name: str) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Has a container of the host dumped, and CRIU killed: see `dump_killer.py`."""
    command = ["python3", "-m", "tests.lab.dump_killer", name]
    with host.popen(
        command, env=PYTHON_INSIDE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def kill(step: str) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(f"{step}\n")
            answer: dict[str, Any] = json.loads(process.stdout.readline() or "{}")
            assert answer, "the killer has ended"
            return answer

        yield kill


def injected(host: Host, name: str) -> str:
    """Whatever of CRIU is still mapped in tasks of the container."""
    pids = f"$(cat /sys/fs/cgroup/dolly/{name}/cgroup.procs)"
    script = f"for pid in {pids}; do grep CRIU /proc/$pid/maps /proc/$pid/task/*/comm; done"
    return host.run(["sh", "-c", script], check=False).stdout


def verify(guest: Resident) -> None:
    """All of its memory, or all that a tree of processes does, is right."""
    if guest.spec.workload == "tree":
        check_tree(guest)
    else:
        guest.verify()
        guest.wait_answers()


@pytest.fixture(scope="module")
def source() -> Iterator[Lab]:
    with Lab(["A"]) as lab:
        yield lab
        wait_clean(lab.host("A"))


@pytest.mark.parametrize(
    ("spec", "steps"),
    [(MEMORY, STEPS_OF_ONE), (TREE, STEPS_OF_MANY)],
    ids=["one-process", "many-processes"],
)
def test_it_runs_on(source: Lab, spec: ContainerSpec, steps: tuple[str, ...]) -> None:
    host = source.host("A")
    is_memory = spec.workload == "memory"
    with resident(source, spec, probe=is_memory) as guest, killer(host, guest.name) as kill:
        # The tree forks all the time.
        before = picture(host, guest.name) if is_memory else None
        for step in steps:
            answer = kill(step)
            assert answer["killed"], f"no step {step}: {answer}"
            assert (bool(answer["error"]), answer["undo"]) == (True, ""), f"{step}: {answer}"
            assert running_on(source, guest.name) == ["A"], step
            verify(guest)
            assert injected(host, guest.name) == "", step
        assert kill("0")["error"] == "", "no later dump succeeds"
        verify(guest)
        if is_memory:
            # The connections that verified it have to be closed first.
            wait_until("it is as before", lambda: picture(host, guest.name) == before)
            assert guest.stop_probe().clean
