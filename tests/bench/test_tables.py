"""What is made of measured lines: nothing is left out, nothing made up."""

from __future__ import annotations

import msgspec
import pytest

from bench.compare.cost import Cost
from bench.compare.run import Conditions, Row
from bench.compare.tables import ResultsError, Spread, predictions, read, render

HERE = Conditions("2026-01-02", "6.18", 2, 1000, 0.5, {"criu": "4.2.1"})


def row(number: int, gap_ms: float, **changes: object) -> Row:
    done = Row("ours", "memory", 16, 50, "unshaped", number, "done", "", gap_ms, 1000.0, 20.0)
    return msgspec.structs.replace(done, **changes)


def lines(*structs: msgspec.Struct) -> list[bytes]:
    return [msgspec.json.encode(one) + b"\n" for one in structs]


def test_the_spread_of_five() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(5, 3.0, 5.0, 1.0, 5.0)
    assert Spread.of([7.0]) == Spread(1, 7.0, 7.0, 7.0, 7.0)
    assert Spread.of([float(value) for value in range(1, 101)]).p95 == 95.0


def test_what_failed_is_in_the_table_and_not_in_the_figures() -> None:
    rows = [
        row(1, 100.0, udp_gap_ms=80.0, udp_lost=0, udp_late=6, still_ms=70.0),
        row(2, 300.0, udp_gap_ms=200.0, udp_lost=2, udp_late=10, still_ms=170.0),
        row(3, 9000.0, outcome="lost", why="2 | 3"),
        row(4, 200.0),
    ]
    other = [row(1, 0.0, system="theirs", outcome="impossible", why="no bits", client_gap_ms=None)]
    text = render(read(lines(HERE, *rows, *other)))
    assert "## memory, 16 MiB, 50 MiB/s written, link unshaped" in text
    figures = "3 | 200 | 300 | 100 | 300 | 140 | 1 | 8 | 120 | 1.0 | 20"
    assert f"| ours | {figures} | 1 lost: 2 / 3 |" in text
    assert "| theirs | 0 | | | | | | | | | | | 1 impossible: no bits |" in text
    assert "Linux 6.18, 2 cores" in text
    assert "No move had a prediction." in text


def test_parts_and_predictions() -> None:
    rows = [
        row(
            number,
            50.0,
            parts_ms={"dump": 10.0 * number, "restore": 5.0},
            facts={"predicted_downtime_ms": predicted, "downtime_ms": 100.0},
        )
        for number, predicted in enumerate((80.0, 120.0, 126.0), 1)
    ]
    assert predictions(rows) == [(80.0, 100.0), (120.0, 100.0), (126.0, 100.0)]
    text = render(read(lines(HERE, *rows)))
    assert "**ours**: dump 20, restore 5 ms" in text
    assert "Of 3 moves with pre-copy, the downtime of 2 was within 25 %" in text
    assert ": ours | 3 | 2 | 120 | 100 |" in text


def test_costs_are_medians_of_each_host() -> None:
    rows = [
        row(
            number, 50.0, costs={"A": Cost(number, 10.0, 0.0), "B": Cost(0.25, 20.0, 30.0 * number)}
        )
        for number in (1, 2, 4)
    ]
    assert "ours | 3 | 2.0 | 10 | 0 | 0.2 | 20 | 60 |" in render(read(lines(HERE, *rows)))


def test_fills_are_medians_of_those_that_had_faults() -> None:
    waited = {"fill_ms": 600.0, "faults": 40, "fault_p50_us": 90, "fault_p99_us": 1500}
    rows = [row(1, 50.0, facts=waited), row(2, 50.0, facts=waited | {"fault_p99_us": 0})]
    assert "ours | 1 | 600 | 40 | 0.09 | 1.50 |" in render(read(lines(HERE, *rows)))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "nothing was measured"),
        (lines(HERE), "nothing was measured"),
        ([*lines(HERE), b"{}\n"], "line 2"),
        ([b"no json\n"], "line 1"),
    ],
)
def test_a_file_that_is_none_of_results(content: list[bytes], said: str) -> None:
    with pytest.raises(ResultsError, match=said):
        read(content)
