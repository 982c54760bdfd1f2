"""What other tools say of a load becomes answers in bins, or an error."""

from __future__ import annotations

import pytest

from bench.load import BIN_MS, BINS_MAX
from bench.load_tools import wrk_load

SAID = "Running 1m test\n  1 threads and 8 connections\n  Requests/sec: 9\n"


def test_answers_of_all_threads_in_the_bins_since_the_first() -> None:
    load = wrk_load(f"{SAID}0:0 100:7 101:5 104:9 0:0 101:1 bad 0\n")
    assert (load.started_monotonic_s, load.bin_ms) == (100 * BIN_MS / 1000, BIN_MS)
    assert (list(load.answers), load.error) == ([7, 6, 0, 0, 9], "")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("unable to connect to 10.77.0.50:8080 Connection refused\n", "Connection refused"),
        (f"{SAID}0:0 100:7 bad 2\n", "2 connections or answers were bad"),
        (f"{SAID}bad 0\n", "there was no answer"),
        (f"{SAID}5:1 {BINS_MAX + 5}:1 bad 0\n", "answers of 600 s"),
    ],
)
def test_what_is_no_load(said: str, error: str) -> None:
    assert error in wrk_load(said).error
