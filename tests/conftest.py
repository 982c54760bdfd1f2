"""What all tests share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import HealthCheck, settings

# How long anything takes says something of the machine, and of what else it does.
settings.register_profile("any-machine", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")

LAB_TESTS = Path(__file__).parent / "lab"
VM_TESTS = Path(__file__).parent / "vm"
# Emulated hosts: a migration takes a minute when other work goes on beside.
VM_TIMEOUT_S = 1200


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything below tests/lab needs root and the lab; `-m 'not lab'` leaves it out.

    Where files are handed out to several processes, those that last come first, so that in the end
    no process works off a long one while the others have nothing left.
    """
    for item in items:
        if item.path.is_relative_to(LAB_TESTS):
            item.add_marker(pytest.mark.lab)
        if item.path.is_relative_to(VM_TESTS) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(VM_TIMEOUT_S))
    if hasattr(config, "workerinput"):  # it is one of pytest-xdist's
        tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.get_closest_marker("lab") is None, -tests[item.path]))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that a test runs in this process sends the log to the test's own streams, which are
    closed when the next one logs."""
    yield
    structlog.reset_defaults()
