"""What is planned can be told before it is done."""

from __future__ import annotations

import re

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
