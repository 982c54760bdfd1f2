"""What tells a copy that it is one: its host's programs before its first instruction, a signal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.containers import ContainerSpec, pid
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.cloning import COPY, IP, cloning, failed
from tests.lab.compiling import compiled
from tests.lab.migrating import expel, resident, running_on, wait_clean

HOOKS = "/etc/migrate/clone.d"


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """programs/copied.c."""
    return compiled("copied", tmp_path_factory.mktemp("programs"))


@pytest.fixture
def hooks(agents: Lab, copied: Path) -> Iterator[Host]:
    """B, with hooks: one that tells the copy, others that fail or are not fit to be run."""
    target = agents.host("B")
    target.write_text(f"{HOOKS}/tell/10-tell", "", 0o755)
    target.path(f"{HOOKS}/tell/10-tell").write_bytes(copied.read_bytes())
    target.write_text(f"{HOOKS}/broken", "#!/bin/nothing\n", 0o755)
    target.write_text(f"{HOOKS}/anybodys", "", 0o777)
    yield target
    target.run(["rm", "-rf", HOOKS])


def status(host: Host, name: str) -> dict[str, str]:
    """Of the container's first task."""
    lines = host.read_text(f"/proc/{pid(host, name)}/status")
    return dict(re.findall(r"^(\w+):\t(.*)$", lines, re.MULTILINE))


def test_a_copy_is_told_that_it_is_one(agents: Lab, hooks: Host, copied: Path) -> None:
    spec = ContainerSpec("c-told", "memory", address="10.77.0.157/24", address6=None)
    source, name = agents.host("A"), spec.name
    with resident(agents, spec, program=copied) as guest:
        for hook, why in (("anybodys", "others than root can write it"), ("none", "no hook none")):
            with cloning(agents, name, "--hook", hook) as underway:
                refused = underway.finish()
                assert refused.code == 2, refused
                assert why in refused.stderr
        with cloning(agents, name, "--hook", "broken") as underway:
            told = failed(underway)
            assert (told.host, told.phase, told.container) == ("B", "restore", "runs on A")
            assert told.error.startswith("the hook broken ended with 125: it can't be run: "), told
            assert told.remedy
        wait_clean(hooks)
        with cloning(agents, name, "--hook", "tell", "--signal", "USR1") as underway:
            done = underway.finish()
            assert done.code == 0, done.stderr or done.stdout
        rights = status(hooks, COPY)
        (answer,) = guest.ask("TOLD", address=IP)
        assert answer == (
            f"TOLD signals=1 copy={COPY} of={name} addresses={IP} user=0 host={COPY}"
            f" CapEff={rights['CapBnd']} NoNewPrivs=1 Seccomp={rights['Seccomp']}"
        )
        assert rights["Seccomp"] == "2"
        assert guest.ask("TOLD") == ["TOLD signals=0"]
        assert (running_on(agents, name), running_on(agents, COPY)) == (["A"], ["B"])
        guest.wait_answers()
        assert guest.stop_probe().clean
        expel(agents, COPY)
    wait_clean(source)
    wait_clean(hooks)
