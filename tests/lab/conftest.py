"""Lab hosts for tests. A lab that can't be started is a failure, never a skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from bench.lab.lab import Lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    """Hosts A and B and a client, shared by a file's tests: leave nothing running in them.

    Not by all files: which tests were in a lab before must not depend on how the files fall to
    the processes that run them. A test that lets a host crash, cuts links or changes agents takes
    a lab of its own (`new_lab`): it costs a quarter of a second.
    """
    with Lab(["A", "B"]) as shared:
        yield shared


@pytest.fixture(scope="module")
def agents(lab: Lab) -> Lab:
    """The shared lab, with `migrate agent` running on A and B."""
    lab.start_agents()
    return lab


@pytest.fixture
def new_lab() -> Iterator[Callable[..., Lab]]:
    """Starts labs of this test's own, ended with it: `new_lab(["A", "B"], rate="100mbit")`."""
    with ExitStack() as stack:

        def start(*args: Any, **kwargs: Any) -> Lab:
            return stack.enter_context(Lab(*args, **kwargs))

        yield start
