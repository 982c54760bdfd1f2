"""What of the time that sending takes is the link's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.transport.link_rig import OUTSIDE

PROJECT = Path(__file__).parents[2]


def shares(address: str, slow_s: float, *rate: str) -> tuple[float, float]:
    """(seconds that sending took, seconds of the link)"""
    program = ["-m", "tests.transport.link_rig", address, str(slow_s), *rate]
    done = subprocess.run(
        [sys.executable, *program],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    said = json.loads(done.stdout)
    return said["elapsed_s"], said["took_s"]


def test_a_slow_link_is_what_takes_the_time() -> None:
    elapsed_s, took_s = shares(OUTSIDE, 0.0, "40mbit")
    # Of 64 Mbit some are still under way at the end.
    assert elapsed_s > 0.5
    assert took_s > 0.7 * elapsed_s


def test_a_receiver_that_does_not_read_is_not_the_link() -> None:
    elapsed_s, took_s = shares(OUTSIDE, 0.3)
    assert elapsed_s > 0.5
    assert took_s < 0.3 * elapsed_s


def test_the_link_behind_a_tunnel_is_not_seen() -> None:
    elapsed_s, took_s = shares("127.0.0.1", 0.3)
    assert elapsed_s > 0.5
    assert took_s == pytest.approx(elapsed_s, rel=0.1)
