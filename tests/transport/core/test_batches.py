"""Cutting page runs: nothing lost, nothing twice, in order, however runs and batches lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.core.batches import batches, checked_runs, gathered, page_addresses
from transport.core.frames import PAGE_BYTES
from transport.core.tables import ADDRESS_END

RUNS = st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), max_size=20)  # [(gap, pages)]


def built(gaps: list[tuple[int, int]]) -> np.ndarray:
    runs, page = [], 0
    for gap, pages in gaps:
        page += gap
        runs.append((page * PAGE_BYTES, pages))
        page += pages
    return np.array(runs, dtype=np.uint64).reshape(-1, 2)


def listed(runs: np.ndarray) -> list[int]:
    return [address + at * PAGE_BYTES for address, pages in runs.tolist() for at in range(pages)]


@given(RUNS, st.integers(1, 64))
def test_batches_hold_every_page_once_and_in_order(
    gaps: list[tuple[int, int]], pages_max: int
) -> None:
    runs = built(gaps)
    before = runs.copy()
    pieces = list(batches(runs, pages_max))
    assert [page for piece in pieces for page in listed(piece)] == listed(runs)
    assert all(int(piece[:, 1].sum()) == pages_max for piece in pieces[:-1])
    assert all(0 < int(piece[:, 1].sum()) <= pages_max for piece in pieces[-1:])
    assert all(int(piece[:, 1].min()) > 0 for piece in pieces)
    assert (runs == before).all()


@given(RUNS.filter(bool))
def test_page_addresses_and_gathered_are_inverse(gaps: list[tuple[int, int]]) -> None:
    runs = built(gaps)
    addresses = page_addresses(runs)
    assert addresses.tolist() == listed(runs)
    merged = gathered(addresses)
    assert listed(merged) == listed(runs)
    assert len(merged) == 1 + sum(gap > 0 for gap, _ in gaps[1:])


def test_no_runs() -> None:
    empty = np.empty((0, 2), dtype=np.uint64)
    assert list(batches(checked_runs(empty), 256)) == []
    assert gathered(np.empty(0, dtype=np.uint64)).shape == (0, 2)


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param([[1, 1]], id="not-aligned"),
        pytest.param([[0, 0]], id="no-pages"),
        pytest.param([[8192, 1], [0, 1]], id="out-of-order"),
        pytest.param([[0, 2], [4096, 1]], id="overlapping"),
        pytest.param([[ADDRESS_END, 1]], id="beyond"),
        pytest.param([[ADDRESS_END - 4096, 2]], id="out-of-user-space"),
        pytest.param([[0, 2**64 - 1]], id="overflowing"),
        pytest.param([0, 1], id="flat"),
        pytest.param([[0, 1, 1]], id="three-columns"),
    ],
)
def test_runs_that_are_refused(runs: list[object]) -> None:
    with pytest.raises(ValueError, match="run"):
        checked_runs(np.array(runs, dtype=np.uint64))
