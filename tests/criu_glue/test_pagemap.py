"""Pagemap and mm images: our codec against CRIU's own Python library, and damaged files."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from criu_glue.core.pagemap import (
    ADDRESS_END,
    PAGE_BYTES,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Pagemap,
    decode_pagemap,
    encode_pagemap,
    join_runs,
    pages_in,
    whole_space_pagemap,
)
from criu_glue.core.vmas import decode_mappings
from criu_glue.core.wire import ImageFormatError
from tests.criu_glue.checkpoint_images import ANONYMOUS, image, mm_image, pagemap_image, vma

MAP_PRIVATE, MAP_LOCKED, MAP_HUGETLB = 0x02, 0x2000, 0x40000
REGULAR, ANON_PRIVATE, VDSO, GUARD = 1, 1 << 9, 1 << 3, 1 << 16
WIPEONFORK = 1 << 18


@st.composite
def page_entries(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """[(address, pages, flags)], sorted and disjoint; gaps and sizes small and huge."""
    size = st.one_of(st.integers(1, 8), st.integers(1, 1 << 40))
    entries, page = [], draw(st.one_of(st.just(0), size))
    for _ in range(draw(st.integers(0, 40))):
        pages = draw(size)
        if (page + pages) * PAGE_BYTES > ADDRESS_END:
            break
        entries.append((page * PAGE_BYTES, pages, draw(st.integers(1, 7))))
        page += pages + draw(st.one_of(st.just(0), size))
    return entries


def as_array(entries: list[tuple[int, int, int]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array(entries, dtype=np.uint64).reshape(-1, 3)


@given(page_entries(), st.integers(1, 2**32 - 1))
@settings(max_examples=200)
def test_codec_agrees_with_criu_byte_for_byte(
    entries: list[tuple[int, int, int]], pages_id: int
) -> None:
    theirs = pagemap_image(entries, pages_id)
    ours = encode_pagemap(Pagemap(pages_id, as_array(entries)))
    assert ours == theirs
    decoded = decode_pagemap(theirs)
    assert decoded.pages_id == pages_id
    assert decoded.entries.tolist() == [list(entry) for entry in entries]


def test_entries_of_older_criu_are_understood() -> None:
    data = image(
        "PAGEMAP",
        [
            {"pages_id": 7},
            {"vaddr": 0x1000, "compat_nr_pages": 2},
            {"vaddr": 0x4000, "compat_nr_pages": 3, "in_parent": True},
            {"vaddr": 0x8000, "compat_nr_pages": 1, "flags": PE_LAZY},
        ],
    )
    assert decode_pagemap(data).entries.tolist() == [
        [0x1000, 2, PE_PRESENT],
        [0x4000, 3, PE_PARENT],
        [0x8000, 1, PE_LAZY],
    ]


def test_entries_of_new_criu_are_understood() -> None:
    data = image(
        "PAGEMAP",
        [
            {"pages_id": 7},
            {"vaddr": 0x1000, "compat_nr_pages": 0, "flags": PE_LAZY, "nr_pages": 2**33},
        ],
    )
    assert decode_pagemap(data).entries.tolist() == [[0x1000, 2**33, PE_LAZY]]


@pytest.mark.parametrize("highest", [0, 1 << 47, (1 << 47) + PAGE_BYTES, ADDRESS_END])
def test_the_whole_space_has_no_gap(highest: int) -> None:
    """Gaps would shift the offsets behind them; an older CRIU counts pages in an int."""
    decoded = decode_pagemap(encode_pagemap(whole_space_pagemap(12, highest)))
    assert decoded.pages_id == 12
    address, pages, flags = decoded.entries.T
    assert address[0] == 0
    assert np.array_equal(address[1:], (address + pages * np.uint64(PAGE_BYTES))[:-1])
    assert address[-1] + pages[-1] * np.uint64(PAGE_BYTES) >= max(highest, 1 << 47)
    assert (pages < 2**31).all()
    assert (flags == PE_LAZY | PE_PRESENT).all()


@pytest.mark.parametrize(
    "entries",
    [
        [(0x1000, 2, 4), (0x2000, 1, 4)],
        [(0x3000, 1, 4), (0x1000, 1, 4)],
        [(0x1001, 1, 4)],
        [(0x1000, 0, 4)],
        [(0x1000, 1, 8)],
        [(ADDRESS_END, 1, 4)],
        [(ADDRESS_END - PAGE_BYTES, 2, 4)],
        [(0x1000, 2**63, 4)],
        [(0x1000, 2**52 + 1, 4)],
    ],
)
def test_impossible_entries_are_refused(entries: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ImageFormatError):
        decode_pagemap(pagemap_image(entries))


@given(page_entries(), st.data())
@settings(max_examples=150)
def test_damage_is_refused_or_harmless(
    entries: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    good = bytearray(encode_pagemap(Pagemap(1, as_array(entries))))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(good[: data.draw(st.integers(0, len(good)))])
    with contextlib.suppress(ImageFormatError):
        decode_pagemap(damaged)


def test_unknown_fields_are_refused() -> None:
    good = encode_pagemap(Pagemap(1, as_array([(0x1000, 1, 4)])))
    message = good[-9:]
    assert good.count(message) == 1
    # Field 6, a number, after the five that are known.
    longer = good[: -len(message) - 4] + bytes([len(message) + 2, 0, 0, 0]) + message + b"\x30\x01"
    with pytest.raises(ImageFormatError):
        decode_pagemap(longer)


def test_a_long_entry_is_read_in_full() -> None:
    """An entry of 256 bytes or more leaves the fast way of finding entries; here it is refused
    for what it holds, not for its size."""
    good = encode_pagemap(Pagemap(1, as_array([(0x1000, 1, 4)])))
    with pytest.raises(ImageFormatError, match="repeats"):
        decode_pagemap(good + (300).to_bytes(4, "little") + b"\x20\x01" * 150)


def test_a_hundred_thousand_entries_decode_and_encode() -> None:
    address = np.arange(100_000, dtype=np.uint64) * 8192 + 0x7F00_0000_0000
    entries = np.column_stack((address, np.ones_like(address), np.full_like(address, PE_LAZY)))
    started = time.perf_counter()
    decoded = decode_pagemap(encode_pagemap(Pagemap(1, entries)))
    print(f"100,000 entries there and back: {1e3 * (time.perf_counter() - started):.1f} ms")
    assert np.array_equal(decoded.entries, entries)


@given(page_entries())
@settings(max_examples=100)
def test_joined_runs_are_the_same_pages_and_none_touch(
    entries: list[tuple[int, int, int]],
) -> None:
    runs = as_array(entries)[:, :2]
    joined = join_runs(runs)
    assert pages_in(joined) == pages_in(runs)
    ends = joined[:, 0] + joined[:, 1] * np.uint64(PAGE_BYTES)
    assert (joined[1:, 0] > ends[:-1]).all()
    assert set(joined[:, 0].tolist()) <= set(runs[:, 0].tolist())


def test_runs_select_by_flags() -> None:
    pagemap = Pagemap(
        1,
        as_array([(0x1000, 1, 2), (0x2000, 2, 3), (0x4000, 1, 6), (0x5000, 1, 4), (0x6000, 1, 1)]),
    )
    lazy = pagemap.runs(having=PE_LAZY, lacking=PE_PRESENT)
    assert lazy.tolist() == [[0x1000, 3]]
    assert pagemap.runs(lacking=PE_PRESENT).tolist() == [[0x1000, 3], [0x6000, 1]]


# -- mappings --


def test_mappings_say_what_can_be_lazy() -> None:
    found = decode_mappings(
        mm_image(
            [
                vma(0x1000, 0x3000, ANONYMOUS, REGULAR | ANON_PRIVATE),
                vma(0x3000, 0x4000, MAP_PRIVATE, REGULAR),
                vma(0x4000, 0x5000, ANONYMOUS | MAP_LOCKED, REGULAR | ANON_PRIVATE),
                vma(0x6000, 0x7000, ANONYMOUS, REGULAR | ANON_PRIVATE, WIPEONFORK),
                vma(0x20_0000, 0x40_0000, ANONYMOUS | MAP_HUGETLB, REGULAR | ANON_PRIVATE),
                vma(0x7FFF_0000_0000, 0x7FFF_0000_2000, ANONYMOUS, REGULAR | VDSO),
                vma(2**64 - 0xA00000, 2**64 - 0x9FF000, 0, 1 << 2),
                vma(0x1000, 0x2000, 0, GUARD),
            ]
        )
    )
    assert found.start.tolist() == [0x1000, 0x3000, 0x4000, 0x6000, 0x20_0000, 0x7FFF_0000_0000]
    assert found.can_be_lazy.tolist() == [True, False, False, True, False, False]
    assert found.wiped_on_fork.tolist() == [False, False, False, True, False, False]


def test_entries_are_cut_at_the_edges_of_mappings() -> None:
    mappings = decode_mappings(
        mm_image(
            [
                vma(0x1000, 0x3000, ANONYMOUS, REGULAR),
                vma(0x3000, 0x4000, ANONYMOUS, REGULAR),
                vma(0x6000, 0x9000, ANONYMOUS, REGULAR),
            ]
        )
    )
    entries = as_array([(0x1000, 3, 2), (0x6000, 3, 3), (0xA000, 1, 4)])
    assert mappings.split(entries).tolist() == [
        [0x1000, 2, 2],
        [0x3000, 1, 2],
        [0x6000, 3, 3],
        [0xA000, 1, 4],
    ]
    wide = as_array([(0, 16, 1)])
    assert mappings.split(wide)[:, :2].tolist() == [
        [0, 1],
        [0x1000, 2],
        [0x3000, 1],
        [0x4000, 2],
        [0x6000, 3],
        [0x9000, 7],
    ]


@given(page_entries(), st.sets(st.integers(0, 60), max_size=20))
@settings(max_examples=150)
def test_cutting_changes_no_page(entries: list[tuple[int, int, int]], pages: set[int]) -> None:
    edges = sorted(pages)
    mappings = decode_mappings(
        mm_image(
            [
                vma(start * PAGE_BYTES, end * PAGE_BYTES, ANONYMOUS, REGULAR)
                for start, end in zip(edges[::2], edges[1::2], strict=False)
            ]
        )
    )
    cut = mappings.split(as_array(entries))
    assert pages_in(cut[:, :2]) == pages_in(as_array(entries)[:, :2])
    starts = set(cut[:, 0].tolist())
    ends = cut[:, 0] + cut[:, 1] * np.uint64(PAGE_BYTES)
    for edge in (*mappings.start.tolist(), *mappings.end.tolist()):
        inside = (cut[:, 0] < edge) & (edge < ends)
        assert not inside.any()
    assert {entry[0] for entry in entries} <= starts
    by_flags: dict[int, int] = {}
    for _, count, flags in entries:
        by_flags[flags] = by_flags.get(flags, 0) + count
    for _, count, flags in cut.tolist():
        by_flags[flags] -= count
    assert not any(by_flags.values())


@pytest.mark.parametrize(
    "vmas",
    [
        [vma(0x1000, 0x1000, ANONYMOUS, REGULAR)],
        [vma(0x1000, 0x1800, ANONYMOUS, REGULAR)],
        [vma(0x1000, 0x3000, ANONYMOUS, REGULAR), vma(0x2000, 0x4000, ANONYMOUS, REGULAR)],
    ],
)
def test_impossible_mappings_are_refused(vmas: list[dict[str, Any]]) -> None:
    with pytest.raises(ImageFormatError):
        decode_mappings(mm_image(vmas))


@given(st.data())
@settings(max_examples=150)
def test_a_damaged_mm_image_is_refused_or_harmless(data: st.DataObject) -> None:
    good = bytearray(mm_image([vma(0x1000, 0x3000, ANONYMOUS, REGULAR, 1)] * 1))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ImageFormatError):
        decode_mappings(bytes(good[: data.draw(st.integers(0, len(good)))]))
