"""Waiting for a state without sleeping for it."""

from __future__ import annotations

import time
from collections.abc import Callable

POLL_S = 0.005


def wait_until(what: str, condition: Callable[[], object], *, deadline_s: float = 20.0) -> None:
    """Returns when `condition()` is true; fails the test, naming `what`, when it never is."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {deadline_s:g} s: {what}"
        time.sleep(POLL_S)
