"""What holds a container back goes with it; a copy that is held back less does not run, nor does a
container that the target's policy would not have."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from bench.containers import ContainerSpec, bundle_path, create, start
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.brake import Brake
from tests.lab.inside import inside
from tests.lab.invariants import explained, failure_lab
from tests.lab.migrating import (
    Resident,
    begin,
    expel,
    migrate,
    resident,
    running_on,
    wait_clean,
)
from tests.lab.waiting import wait_until

SPEC = ContainerSpec("cf1", "tree", address="10.77.0.88/24", address6=None)
PLAIN = ContainerSpec("cf2", "memory", address="10.77.0.89/24", address6=None, seccomp=False)
READ = """
from migrate.confinement import read
answer(read(Path("/sys/fs/cgroup/dolly") / given))
"""
# Of the images, once CRIU would read them: between them and the tasks are CRIU and the kernel.
EDIT = """
import pycriu
(path,) = Path("/run/migrate/sessions").glob("*.target/img/core-1.img")
with path.open("rb") as file:
    image = pycriu.images.load(file)
thread = image["entries"][0]["thread_core"]
match given:
    case "no_new_privs":
        thread["creds"]["no_new_privs"] = 0
    case "seccomp":
        del thread["seccomp_mode"], thread["seccomp_filter"]
    case "capabilities":
        thread["creds"]["cap_bnd"][0] |= 1 << 21
with path.open("wb") as file:
    pycriu.images.dump(image, file)
"""
POLICY = "/etc/migrate/policy.toml"
TREE_THREADS = 8 * 4  # bench/workloads/tree_core.h
Spec = dict[str, Any]


@pytest.fixture(scope="module")
def stage() -> Iterator[Lab]:
    with failure_lab() as lab:
        yield lab


@contextlib.contextmanager
def guest(lab: Lab, spec: ContainerSpec, change: Callable[[Spec], None]) -> Iterator[Resident]:
    """A container on A whose configuration is changed before it is started."""
    host = lab.host("A")
    with contextlib.ExitStack() as stack:
        stack.callback(expel, lab, spec.name)
        create(host, spec)
        rewrite(host, spec.name, change)
        start(host, spec.name)
        yield Resident(lab, spec, None)


def rewrite(host: Host, name: str, change: Callable[[Spec], None]) -> None:
    path = f"{bundle_path(name)}/config.json"
    config = json.loads(host.read_text(path))
    change(config)
    host.write_text(path, json.dumps(config))


def hold_back(config: Spec) -> None:
    """As much as can be, with numbers that nobody has by chance."""
    kept = ["CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_KILL"]
    process = config["process"]
    process["capabilities"] = dict.fromkeys(process["capabilities"], kept)
    process["capabilities"]["bounding"] = [*kept, "CAP_SETUID"]
    process["rlimits"] = [
        {"type": "RLIMIT_NOFILE", "soft": 333, "hard": 444},
        {"type": "RLIMIT_CORE", "soft": 5 << 20, "hard": 6 << 20},
    ]
    process["user"] = {"uid": 0, "gid": 0, "additionalGids": [12345]}
    process["oomScoreAdj"] = 321


def test_what_holds_a_container_back_goes_with_it(stage: Lab) -> None:
    with guest(stage, SPEC, hold_back) as moved:
        before = inside(stage.host("A"), READ, moved.name)
        assert len(before["threads"]) > 1
        first = before["sheets"][before["threads"]["1"]]
        assert (first["seccomp"], first["filters"]) == (2, 1)
        assert first["no_new_privileges"]
        assert first["more_groups"] == [12345]
        assert first["oom_score_adj"] == 321
        assert first["limits"]["Max open files"] == [333, 444]
        assert first["limits"]["Max core file size"] == [5 << 20, 6 << 20]
        assert first["bounding"] == 1 << 0 | 1 << 5 | 1 << 7 | 1 << 10
        for source, target in (("A", "B"), ("B", "A")):
            migrate(stage.host(source), moved.name, target).done  # noqa: B018  (asserts)
            after = inside(stage.host(target), READ, moved.name)
            # The workload has children that live for a moment, and all others on both hosts.
            lasting = before["threads"].keys() & after["threads"].keys()
            assert len(lasting) >= TREE_THREADS
            assert sheets(after, lasting) == sheets(before, lasting)


def sheets(seen: dict[str, Any], threads: Iterable[str]) -> dict[str, Any]:
    """By thread, what holds it back."""
    return {thread: seen["sheets"][seen["threads"][thread]] for thread in threads}


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no_new_privs", "no_new_privs is off"),
        ("seccomp", "seccomp mode 0 and not 2"),
        ("capabilities", "more bounding capabilities: CAP_SYS_ADMIN"),
    ],
)
def test_a_copy_that_is_held_back_less_never_runs(stage: Lab, kind: str, said: str) -> None:
    source, target = stage.hosts
    brake = Brake(target)
    with resident(
        stage, ContainerSpec("cf3", "memory", address="10.77.0.90/24", address6=None)
    ) as one:
        answered = one.answers()
        with brake.on("restore"):
            underway = begin(source, one.name, "B")
            brake.wait_reached(underway)
            inside(target, EDIT, kind)
        told = explained(underway.finish())
        assert "held back less than its source" in told.error
        assert said in told.error
        assert told.container == "runs on A"
        assert running_on(stage, one.name) == ["A"]
        wait_clean(target)
        # Nothing of it was answered by the copy.
        assert one.answers() > answered
        one.verify()
        assert migrate(source, one.name, "B").done
        assert running_on(stage, one.name) == ["B"]


def test_what_the_policy_of_the_target_does_not_allow(stage: Lab) -> None:
    source, target = stage.hosts
    with resident(stage, PLAIN, probe=False) as plain:
        refused = explained(migrate(source, plain.name, "B"), 2)
        assert set(refused.refusals) == {"policy-seccomp"}
        # The next session knows what the operator has changed, right or wrong.
        target.write_text(POLICY, "[receive]\nseccomp_of = true\n")
        try:
            assert set(explained(migrate(source, plain.name, "B"), 2).refusals) == {"policy"}
            target.write_text(POLICY, "[receive]\nseccomp_off = true\nfrom = ['b*']\n")
            refusals = explained(migrate(source, plain.name, "B"), 2).refusals
            assert set(refusals) == {"policy-source"}
            target.write_text(POLICY, "[receive]\nseccomp_off = true\n")
            assert migrate(source, plain.name, "B").done
        finally:
            target.run(["rm", "-f", POLICY])
        assert running_on(stage, plain.name) == ["B"]


def test_a_source_that_claims_what_its_tasks_have_not(stage: Lab) -> None:
    source, target = stage.hosts

    def claim(config: Spec) -> None:
        rules = [{"names": ["reboot"], "action": "SCMP_ACT_ERRNO"}]
        config["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}

    with resident(stage, PLAIN) as plain:
        rewrite(source, plain.name, claim)
        told = explained(migrate(source, plain.name, "B"))
        assert "has no seccomp filter" in told.error
        assert told.container == "runs on A"
        wait_clean(target)
        wait_until("it runs on A", lambda: running_on(stage, plain.name) == ["A"])
        plain.verify()
        assert plain.stop_probe().clean


def test_what_this_host_does_not_send(stage: Lab) -> None:
    source = stage.host("A")
    with resident(
        stage, ContainerSpec("cf4", "memory", address="10.77.0.91/24"), probe=False
    ) as one:
        source.write_text(POLICY, "[send]\nto = ['C']\n")
        try:
            told = explained(migrate(source, one.name, "B"), 2)
        finally:
            source.run(["rm", "-f", POLICY])
        assert set(told.refusals) == {"policy-target"}
