"""Several copies by one command: one pre-copy for all hosts, one page store for all copies of a
host, filled from as they need it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from bench.containers import ContainerSpec
from bench.lab.host import Host
from bench.lab.lab import Lab
from tests.lab.cloning import addresses
from tests.lab.migrating import (
    Resident,
    Underway,
    begin,
    expel,
    remains,
    resident,
    running_on,
    wait_clean,
)
from tests.lab.waiting import wait_until

COPIES = 5
PATIENCE_S = 4
NAMES = [f"lamb-{number + 1}" for number in range(COPIES)]
TAKEN = "10.77.0.161"
ADDRESSES = [f"10.77.0.{number}" for number in (160, 162, 163, 164, 165)]
LAST = "10.77.0.166"
POOL = f"{ADDRESSES[0]}-{LAST}/24"
MEMORY_MIB = 32
SPEC = ContainerSpec(
    "ewe",
    "memory",
    args=("16",),
    memory_mib=MEMORY_MIB,
    address="10.77.0.158/24",
    address6=None,
)


def clone(source: Host, to: str, *options: str, count: int = COPIES, pool: str = POOL) -> Underway:
    """Starts the command for so many copies."""
    arguments = ["clone", SPEC.name, "--to", to, "--count", str(count), "--name", "lamb-{n}"]
    return Underway(source, SPEC.name, [*arguments, "--ip", pool, "--json", *options], None)


@contextlib.contextmanager
def original(lab: Lab) -> Iterator[Resident]:
    """It runs on A, a client streams; at the end there is neither it nor a copy. Somebody has an
    address of the range."""
    with addresses(lab.client, f"{TAKEN}/32"), resident(lab, SPEC) as guest:
        try:
            yield guest
        finally:
            for name in NAMES:
                expel(lab, name)


@contextlib.contextmanager
def hidden(host: Host, address: str) -> Iterator[None]:
    """That host has this address, and answers nobody who asks for it."""
    host.run(["sysctl", "-q", "net.ipv4.conf.all.arp_ignore=1"])
    host.run(["ip", "address", "add", f"{address}/32", "dev", "lo"])
    try:
        yield
    finally:
        host.run(["ip", "address", "del", f"{address}/32", "dev", "lo"])
        host.run(["sysctl", "-q", "net.ipv4.conf.all.arp_ignore=0"])


def verify(guest: Resident, name: str, address: str = "") -> None:
    (answer,) = guest.ask("VERIFY", address=address or ADDRESSES[NAMES.index(name)])
    assert answer.startswith("VERIFY ok "), answer
    assert " bad=0 " in answer


def stores(host: Host) -> tuple[int, set[str], int]:
    """How many sessions have a page store; the file systems that these are on; MiB in them."""
    script = "cd /run/migrate/sessions; stat -c %d */mem; du -sm */mem | cut -f1 | sort -u"
    lines = host.run(["sh", "-c", script]).stdout.split()
    return len(lines) - 1, set(lines[:-1]), int(lines[-1])


def test_one_transfer_brings_all_copies(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"])
    lab.start_agents()
    source, target = lab.host("A"), lab.host("B")
    with original(lab) as guest:
        few = clone(source, "B", count=2, pool=f"{TAKEN}-{ADDRESSES[1]}").finish()
        assert few.code == 2, few
        assert "2 copies need 2 IPv4 addresses, and of 2 that are given 1 are free" in few.stderr
        # What only a target knows to be taken is left for the one that nobody has yet.
        with hidden(target, ADDRESSES[0]):
            done = clone(source, "B,A").finish()
        assert done.code == 0, done.stderr or done.stdout
        assert done.report is not None
        assert [(one["name"], one["host"]) for one in done.report["copies"]] == [
            ("lamb-1", "B"),
            ("lamb-2", "A"),
            ("lamb-3", "B"),
            ("lamb-4", "A"),
            ("lamb-5", "B"),
        ]
        # Read once, and sent to each host once.
        first = done.report["copying"]["rounds"][0]
        memory_bytes = MEMORY_MIB << 20
        assert memory_bytes <= first["bytes_raw"] < 1.5 * memory_bytes
        assert 2 * memory_bytes <= first["bytes_sent"] < 2.5 * memory_bytes
        addresses_told = [one["addresses"] for one in done.report["copies"]]
        assert addresses_told == [[one] for one in (LAST, *ADDRESSES[1:])]
        assert [running_on(lab, name) for name in NAMES] == [["B"], ["A"], ["B"], ["A"], ["B"]]
        # One page store a host, whole as long as somebody may need it.
        for host, copies in ((target, 3), (source, 2)):
            count, on, mib = stores(host)
            assert (count, len(on)) == (copies, 1)
            assert mib >= MEMORY_MIB
        assert "what it needs of its memory" in target.run(["migrate", "status"]).stdout
        # Without what it has not needed it can't be moved, and it can get that.
        refused = begin(target, "lamb-3", "A").finish()
        assert refused.code == 2, refused
        assert "[memory-missing]" in refused.stderr, refused
        target.run(["migrate", "fill", "lamb-3"])
        wait_until("its session ends", lambda: stores(target)[0] == 2, deadline_s=60)
        # One that ends takes nothing from the others, though the transfer was for it.
        verify(guest, "lamb-1", LAST)
        expel(lab, "lamb-1")
        wait_until("its session ends", lambda: stores(target)[0] == 1, deadline_s=60)
        # Another agent goes on with what has not got all.
        lab.kill_agent("B")
        lab.start_agent("B")
        for name in ("lamb-3", "lamb-4", "lamb-5"):
            verify(guest, name)
        guest.verify()
        for name in NAMES:
            expel(lab, name)
        # With the last of them goes the store.
        wait_clean(target)
        wait_clean(source, SPEC.name)
        guest.wait_answers()
        client = guest.stop_probe()
        assert client.clean, client


def test_what_fails_is_left_out_and_nothing_remains_in_halves(
    new_lab: Callable[..., Lab],
) -> None:
    lab = new_lab(["A", "B", "C"])
    lab.start_agents()
    source = lab.host("A")
    with original(lab) as guest:
        for phase in ("restore", "copied"):
            killed = clone(source, "B,A", "--fill", count=3)
            killed.wait_phase(phase)
            killed.kill()
            killed.finish()
            wait_until("all is settled", lambda: settled(lab), deadline_s=60)
            whole = [name for name in NAMES if running_on(lab, name)]
            assert phase == "copied" or not whole
            for name in whole:
                verify(guest, name)
                expel(lab, name)
            wait_clean(lab.host("B"))
            wait_clean(source, SPEC.name)
        # It falls silent: no connection of it ends.
        patience = ("--link-patience", str(PATIENCE_S))
        partly = clone(source, "B,C", "--fill", *patience, count=3)
        partly.wait_phase("freeze")
        lab.set_isolated(["A", "C"], isolated=True)
        done = partly.finish()
        assert done.code == 4, done
        assert done.report is not None
        told = {one["name"]: one["error"] for one in done.report["copies"]}
        assert [name for name, error in told.items() if error is None] == ["lamb-1", "lamb-3"]
        assert told["lamb-2"]["host"] == "C"
        assert told["lamb-2"]["phase"] == "send"
        # Nobody has waited for it while the original stood still.
        assert done.report["pause_ms"] < 1000 * PATIENCE_S
        assert "1 of 3 copies were not made: lamb-2" in done.stderr
        for name in ("lamb-1", "lamb-3"):
            verify(guest, name)
        lab.set_isolated(["A", "C"], isolated=False)
        # The next agent asks at once.
        lab.kill_agent("C")
        lab.start_agent("C")
        wait_clean(lab.host("C"))
        assert running_on(lab, SPEC.name) == ["A"]
        guest.verify()
        client = guest.stop_probe()
        assert client.clean, client
    for host in lab.hosts:
        wait_clean(host)


def settled(lab: Lab) -> bool:
    """Whether no host has a session any more, of the command or of a copy."""
    return not any(
        "/sessions/" in line for host in lab.hosts for line in remains(host, SPEC.name, *NAMES)
    )
