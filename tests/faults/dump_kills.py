"""Kills CRIU at every step of its dump, one dump after the other: for a change of `custody`.

    python3 -m tests.faults.dump_kills [--every N] [--first K] [memory | tree]

A step is a system call by which CRIU acts on its tasks (`tests/lab/dump_killer.py`): some 300 for
`memory` (one process), 2000 for `tree` (eight, with four threads each). Two to five seconds each.
After each the container is verified. Ends with 1 at the first that has harmed it.
"""

from __future__ import annotations

import argparse
import sys

from bench.containers import ContainerError
from bench.lab.errors import LabError
from bench.lab.lab import Lab
from bench.probe_process import ProbeError
from tests.lab.migrating import resident, running_on
from tests.lab.test_killed_dump import MEMORY, TREE, injected, killer, verify

SPECS = {"memory": MEMORY, "tree": TREE}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=[*SPECS], nargs="?", default="memory")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    options = parser.parse_args()
    with Lab(["A"]) as lab:
        return sweep(lab, options.kind, options.first, options.every)


def sweep(lab: Lab, kind: str, first: int, every: int) -> int:
    """0 when the container has outlived a kill at each of these steps."""
    host, step = lab.host("A"), first
    with (
        resident(lab, SPECS[kind], probe=kind == "memory") as guest,
        killer(host, guest.name) as kill,
    ):
        while True:
            answer = kill(str(step))
            if not answer["killed"]:
                break
            try:
                assert answer["undo"] == "", answer["undo"]
                assert running_on(lab, guest.name) == ["A"], "it does not execute"
                assert injected(host, guest.name) == "", "something of CRIU is left in it"
                verify(guest)
            except (AssertionError, ContainerError, LabError, ProbeError) as error:
                print(f"{step} {answer['last']}: HARMED: {error} ({answer})", flush=True)
                return 1
            print(f"{step} {answer['last']}: ok", flush=True)
            step += every
        is_clean = kind != "memory" or guest.stop_probe().clean
    print(f"{answer['steps']} steps; the client: {'ok' if is_clean else 'HARMED'}")
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
