"""What other tools say of a load becomes answers in bins, or an error."""

from __future__ import annotations

import pytest

from bench.load import BIN_MS, BINS_MAX
from bench.load_tools import pgbench_load, wrk_load

SAID = "Running 1m test\n  1 threads and 8 connections\n  Requests/sec: 9\n"


def test_answers_of_all_threads_in_the_bins_since_the_first() -> None:
    load = wrk_load(f"{SAID}0:0 100:7 101:5 104:9 0:0 101:1 bad 0\n")
    assert (load.started_monotonic_s, load.bin_ms) == (100 * BIN_MS / 1000, BIN_MS)
    assert (list(load.answers), load.error) == ([7, 6, 0, 0, 9], "")


def test_transactions_by_the_wall_clock_come_into_bins_of_the_other() -> None:
    log = "0 1 900 0 1700000000 5000\n1 1 900 0 1700000000 9000\n0 2 800 0 1700000000 31000\n"
    load = pgbench_load("number of clients: 8", log, -1_699_999_000.0)
    assert load.started_monotonic_s == 1000.0
    assert (list(load.answers), load.error) == ([2, 0, 0, 1], "")
    assert "aborted" in pgbench_load("client 3 aborted in command 5", log, 0.0).error


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
