"""What is planned can be told before it is done."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.compare.cases import MATRIX, QUICK

RUNS = 5
WHOLE_S_MAX = 2400
QUICK_S_MAX = 300


def test_the_matrix_and_the_quick_one_keep_to_their_time() -> None:
    assert sum(one.expected_s(RUNS) for one in MATRIX if not one.optional) < WHOLE_S_MAX
    assert sum(one.expected_s(1) for one in QUICK) < QUICK_S_MAX


def test_of_a_case_that_is_asked_for_in_part_a_part_is_expected() -> None:
    (whole, *_) = MATRIX
    assert whole.only(re.compile("nobody")) is None
    part = whole.only(re.compile(r"16M .*migrate$"))
    assert part is not None
    assert [one.name for one in part.systems] == ["migrate"]
    assert part.round_s == whole.round_s / len(whole.systems)
    assert whole.only(re.compile("")) == whole


def test_a_pattern_that_nothing_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results.jsonl"
    assert main(["--only", "nobody", "--out", str(results)]) == 2
    said = capsys.readouterr().err
    assert "nothing has 'nobody' in it" in said
    assert "memory 16M 50M/s unshaped migrate\n" in said
    with pytest.raises(SystemExit) as ended:
        main(["--only", "(", "--out", str(results)])
    assert ended.value.code == 2
    assert "no regular expression" in capsys.readouterr().err
    assert not results.exists()
