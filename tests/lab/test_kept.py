"""A checkpoint is kept on disk and started later; a changed, stale or another's one is not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.migrating import Migration, Underway, expel, resident, running_on, wait_clean

KEPT = "/var/lib/kept"
NAMES = ("lamb-1", "lamb-2")
ADDRESSES = ("10.77.0.161", "10.77.0.162")


def clone(host: Host, *words: str) -> Underway:
    """Starts `migrate clone WORDS`."""
    return Underway(host, "kept", ["clone", *words, "--json"], None)


@contextlib.contextmanager
def kept(host: Host, *words: str) -> Iterator[Migration]:
    """What `migrate clone … --save` makes; removed at the end."""
    try:
        done = clone(host, *words, "--save", KEPT).finish()
        assert done.code == 0, done.stderr or done.stdout
        yield done
    finally:
        host.run(["rm", "-rf", KEPT])


def start_refused(host: Host, target: str) -> str:
    """What is said of a checkpoint that is not started there."""
    done = clone(host, "--from", KEPT, "--to", target, "--ip", ADDRESSES[0]).finish()
    assert done.code != 0
    return done.stderr


def test_a_checkpoint_is_kept_and_started(agents: Lab) -> None:
    spec = ContainerSpec("c-kept", "memory", address="10.77.0.160/24", address6=None)
    source = agents.host("A")
    with resident(agents, spec) as guest:
        killed = clone(source, spec.name, "--save", KEPT)
        killed.wait_phase("freeze")
        killed.kill()
        killed.finish()
        wait_clean(source, spec.name)
        assert "cannot be read" in start_refused(source, "A")
        source.run(["rm", "-rf", KEPT])
        with kept(source, spec.name, "--days", "0.000001"):
            assert "the manifest expired" in start_refused(source, "A")
        with kept(source, spec.name):
            assert f"copied to {KEPT} as {spec.name}" in source.run(["migrate", "status"]).stdout
            said = source.run(["migrate", "verify", KEPT]).stdout
            assert "for A alone" in said
            assert "signed by A: verified" in said
            assert "for A alone, not for B" in start_refused(source, "B")
            source.run(["sh", "-c", f"echo >> {KEPT}/rootfs/bin/memory"])
            assert "is not what was saved" in start_refused(source, "A")
        with kept(source, spec.name, "--for", "fleet") as saved:
            assert saved.report is not None
            assert saved.report["pause_ms"] > 0
            guest.wait_answers()
            assert guest.stop_probe().clean
            # It may be gone, and its checkpoint is started as often as one likes.
            expel(agents, spec.name)
            given = [word for one in ADDRESSES for word in ("--ip", one)]
            started = clone(source, "--from", KEPT, "--to", "A,B", "--name", "lamb-{n}", *given)
            done = started.finish()
            assert done.code == 0, done.stderr or done.stdout
            for name, address, where in zip(NAMES, ADDRESSES, "AB", strict=True):
                assert running_on(agents, name) == [where]
                (answer,) = guest.ask("VERIFY", address=address)
                assert answer.startswith("VERIFY ok "), answer
                assert " bad=0 " in answer
                expel(agents, name)
    for host in agents.hosts:
        wait_clean(host)
