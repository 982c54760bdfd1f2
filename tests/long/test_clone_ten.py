"""Ten copies of a gigabyte on one host: together they have it once until they need it.

Asked for by name: `scripts/test tests/long`. Its lines are for README and docs/facts.md.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from typing import TYPE_CHECKING, Final

import pytest

from bench.containers import ContainerSpec
from bench.lab.lab import Lab
from bench.probe_process import run_module
from tests.lab.migrating import Underway, expel, resident, running_on, wait_clean
from tests.lab.test_clone_many import stores

if TYPE_CHECKING:
    from bench.lab.host import Host

MEMORY_MIB: Final = 1024
COPIES: Final = 10
NAMES: Final = [f"lamb-{number + 1}" for number in range(COPIES)]
ADDRESSES: Final = [f"10.77.0.{170 + number}" for number in range(COPIES)]
# What ten copies may cost besides the one memory that they share, before they write.
EXTRA_MIB_MAX: Final = 300
# It writes nothing by itself.
SPEC: Final = ContainerSpec(
    "ewe",
    "memory",
    args=("0",),
    memory_mib=MEMORY_MIB,
    address="10.77.0.158/24",
    address6=None,
)
LONG_S: Final = 300.0


def processes_mib(host: Host) -> float:
    """Of all processes of a host, what is theirs: shared pages in equal parts (PSS, proc(5))."""
    script = "cat /proc/[0-9]*/smaps_rollup 2>/dev/null"
    rollups = host.run(["sh", "-c", script], check=False).stdout
    return sum(int(kib) for kib in re.findall(r"^Pss:\s+(\d+) kB", rollups, re.MULTILINE)) / 1024


def verify(lab: Lab, address: str) -> None:
    """As `Resident.verify`. All of the memory comes by faults, some ten seconds on an idle
    machine."""
    words = (address, str(SPEC.port), "VERIFY", f"--timeout-s={LONG_S:g}")
    answer = run_module(lab.client, "bench.workloads.ask", *words, timeout_s=LONG_S)
    assert answer.startswith("VERIFY ok "), answer
    assert " bad=0 " in answer


@pytest.mark.timeout(1200)
def test_ten_copies_of_a_gigabyte_share_it() -> None:
    with Lab(["A", "B"]) as lab, contextlib.ExitStack() as stack:
        lab.start_agents()
        source, target = lab.host("A"), lab.host("B")
        guest = stack.enter_context(resident(lab, SPEC))
        for name in NAMES:
            stack.callback(expel, lab, name)
        before_mib = processes_mib(target)
        words = ["clone", SPEC.name, "--to", "B", "--count", str(COPIES), "--name", "lamb-{n}"]
        words += ["--ip", f"{ADDRESSES[0]}-{ADDRESSES[-1]}/24", "--json"]
        done = Underway(source, SPEC.name, words, None).finish(LONG_S)
        assert done.code == 0, done.stderr or done.stdout
        assert done.report is not None
        assert all(running_on(lab, name) == ["B"] for name in NAMES)

        count, on, store_mib = stores(target)
        own_mib = processes_mib(target) - before_mib
        print(
            f"{COPIES} copies of {MEMORY_MIB} MiB: the store has {store_mib} MiB, the processes"
            f" {own_mib:.0f} MiB more than before; the original stood still for"
            f" {done.report['pause_ms']:.0f} ms, all took"
            f" {done.report['copying']['total_ms'] / 1000:.1f} s; load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        assert (count, len(on)) == (COPIES, 1)
        assert store_mib >= MEMORY_MIB
        assert store_mib - MEMORY_MIB + own_mib < EXTRA_MIB_MAX

        for name, address in zip(NAMES, ADDRESSES, strict=True):
            shared_mib, begun_s = processes_mib(target), time.monotonic()
            verify(lab, address)
            # It has read all of it, and so has it for itself. The processes of the one before, some
            # 20 MiB, may end meanwhile.
            own_mib = processes_mib(target) - shared_mib
            print(f"{name}: {own_mib:.0f} MiB in {time.monotonic() - begun_s:.0f} s", flush=True)
            assert own_mib > 0.95 * MEMORY_MIB
            expel(lab, name)
        wait_clean(target)
        guest.verify()
        guest.wait_answers()
        client = guest.stop_probe()
        assert client.clean, client
