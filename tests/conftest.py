"""What all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

LAB_TESTS = Path(__file__).parent / "lab"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything below tests/lab needs root and the lab; `-m 'not lab'` leaves it out."""
    for item in items:
        if item.path.is_relative_to(LAB_TESTS):
            item.add_marker(pytest.mark.lab)
