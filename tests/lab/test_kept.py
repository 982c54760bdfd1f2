"""A checkpoint is kept on disk and started later; a changed, stale or another's one is not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.migrating import Migration, Underway, expel, resident, running_on, wait_clean
from tests.lab.waiting import wait_until

KEPT = "/var/lib/kept"
NAMES = ("lamb-1", "lamb-2")
ADDRESSES = ("10.77.0.161", "10.77.0.162")
SPEC = ContainerSpec("c-kept", "memory", address="10.77.0.160/24", address6=None)


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


def start_refused(host: Host, target: str, directory: str = KEPT) -> str:
    """What is said of a checkpoint that is not started there."""
    done = clone(host, "--from", directory, "--to", target, "--ip", ADDRESSES[0]).finish()
    assert done.code != 0
    return done.stderr


def begun(host: Host, directory: str = KEPT) -> dict[str, int]:
    """Directories of saves that have not ended, and how many bytes of memory are in each."""
    kept = Path(directory)
    found = host.path(kept.parent).glob(f"{kept.name}.unfinished-*")
    return {
        str(kept.with_name(one.name)): sum(
            file.stat().st_size for file in one.glob("memory/*.pages")
        )
        for one in found
    }


@contextlib.contextmanager
def disk(host: Host, mib: int) -> Iterator[str]:
    """A file system of that size."""
    directory = "/mnt/small"
    host.run(["mkdir", "-p", directory])
    host.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "small", directory])
    try:
        yield directory
    finally:
        # A save that a test has failed over may still be at work there.
        host.run(["umount", "--lazy", directory])


def test_a_disk_that_fills_up_ends_a_save(new_lab: Callable[..., Lab]) -> None:
    """In the middle of it, by somebody else: the container runs on, and nothing of it is left."""
    lab = new_lab(["A"])
    source = lab.host("A")
    spec = replace(SPEC, memory_mib=64)
    with resident(lab, spec) as guest, disk(source, 256) as directory:
        save_to = f"{directory}/kept"
        # A quarter of its memory is written at once, and the next one seconds later.
        filled = clone(source, spec.name, "--save", save_to, "--bandwidth", "4")
        wait_until("memory is written", lambda: any(begun(source, save_to).values()))
        source.run(["sh", "-c", 'cat /dev/zero >"$0/filler"', directory], check=False)
        done = filled.finish()
        assert done.code == 1, done
        assert f"{directory}/kept" in done.stderr
        assert "No space left on device" in done.stderr
        assert "container: runs on A" in done.stderr
        assert "free space there" in done.stderr
        assert [one.name for one in source.path(directory).iterdir()] == ["filler"]
        wait_clean(source, spec.name)
        guest.verify()
        guest.wait_answers()
        assert guest.stop_probe().clean


def test_a_save_that_is_killed_leaves_nothing(new_lab: Callable[..., Lab]) -> None:
    """In a round and in the freeze; the next command removes what is left, or the agent does."""
    lab = new_lab(["A"])
    source = lab.host("A")
    with resident(lab, SPEC) as guest:
        killed = clone(source, SPEC.name, "--save", KEPT, "--bandwidth", "1")
        wait_until("memory is written", lambda: any(begun(source).values()))
        killed.kill()
        killed.finish()
        (first,) = begun(source)
        assert "its save has not ended" in start_refused(source, "A", first)
        assert first in begun(source)
        killed = clone(source, SPEC.name, "--save", KEPT)
        killed.wait_phase("freeze")
        killed.kill()
        killed.finish()
        (second,) = begun(source)
        assert second != first
        lab.start_agents()
        wait_until("it is removed", lambda: not begun(source), deadline_s=60)
        assert "has no manifest" in start_refused(source, "A")
        wait_clean(source, SPEC.name)
        guest.wait_answers()
        assert guest.stop_probe().clean


def test_a_checkpoint_is_kept_and_started(agents: Lab) -> None:
    source = agents.host("A")
    with resident(agents, SPEC) as guest:
        with kept(source, SPEC.name, "--days", "0.000001"):
            assert "the manifest expired" in start_refused(source, "A")
        with kept(source, SPEC.name):
            assert f"copied to {KEPT} as {SPEC.name}" in source.run(["migrate", "status"]).stdout
            said = source.run(["migrate", "verify", KEPT]).stdout
            assert "for A alone" in said
            assert "signed by A: verified" in said
            assert "for A alone, not for B" in start_refused(source, "B")
            source.run(["sh", "-c", f"echo >> {KEPT}/rootfs/bin/memory"])
            assert "is not what was saved" in start_refused(source, "A")
        with kept(source, SPEC.name, "--for", "fleet") as saved:
            assert saved.report is not None
            assert saved.report["pause_ms"] > 0
            # Everything at first, then only what was written.
            first, *later = (one["pages"] for one in saved.report["copying"]["rounds"])
            assert later
            assert max(later) < first
            guest.wait_answers()
            assert guest.stop_probe().clean
            # It may be gone, and its checkpoint is started as often as one likes.
            expel(agents, SPEC.name)
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
