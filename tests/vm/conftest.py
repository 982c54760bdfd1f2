"""Two virtual machines for tests: Debian's kernel, its systemd. Run by `scripts/test --vm`.

They are many times slower than lab hosts, so tests assert pages, order and survival, and start from
what an earlier test has left: agents that run, and nothing else. Only a test that ends machines has
some of its own, and then nobody else has: two of them keep this machine busy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from bench.lab.lab import Lab
from bench.vm.host import MachineHost


class Shared:
    """The machines that one test leaves to the next."""

    def __init__(self) -> None:
        self._lab: Lab | None = None
        self._running = contextlib.ExitStack()

    def lab(self) -> Lab:
        if self._lab is None:
            self._lab = self._running.enter_context(Lab(["A", "B"], machines=True))
            self._lab.start_agents()
        return self._lab

    def end(self) -> None:
        self._lab = None
        self._running.close()


@pytest.fixture(scope="session")
def shared() -> Iterator[Shared]:
    pair = Shared()
    yield pair
    pair.end()


@pytest.fixture
def machines(shared: Shared) -> Iterator[Lab]:
    """Machines A and B with `migrate agent`, and a client."""
    lab = shared.lab()
    yield lab
    assert_kernels_are_well(lab)


@pytest.fixture
def mortals(shared: Shared) -> Iterator[Lab]:
    """Machines A and B that the test may shut down, without agents, and a client."""
    shared.end()
    with Lab(["A", "B"], machines=True) as lab:
        yield lab
        assert_kernels_are_well(lab)


def assert_kernels_are_well(lab: Lab) -> None:
    """A test after which a kernel has complained has failed, whatever it asserts."""
    for host in lab.hosts:
        assert isinstance(host, MachineHost)
        assert not host.console_faults(), f"the kernel of {host.name}: {host.console_faults()}"
