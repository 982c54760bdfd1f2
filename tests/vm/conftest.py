"""Two virtual machines for tests: Debian's kernel, its systemd. Run by `scripts/test --vm`.

They are many times slower than lab hosts, so tests assert pages, order and survival, and start from
what an earlier test has left: agents that run, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.lab.lab import Lab
from bench.vm.host import MachineHost


@pytest.fixture(scope="session")
def machines() -> Iterator[Lab]:
    """Machines A and B with `migrate agent`, and a client."""
    with Lab(["A", "B"], machines=True) as lab:
        lab.start_agents()
        yield lab


@pytest.fixture(autouse=True)
def _kernels_are_well(machines: Lab) -> Iterator[None]:
    """A test after which a kernel has complained has failed, whatever it asserts."""
    yield
    for host in machines.hosts:
        assert isinstance(host, MachineHost)
        assert not host.console_faults(), f"the kernel of {host.name}: {host.console_faults()}"
