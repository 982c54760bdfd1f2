"""CRIU's statistics, as its own library writes them."""

from __future__ import annotations

import pytest

from criu_glue.core.stats import (
    STATS_BYTES_MAX,
    DumpStats,
    RestoreStats,
    decode_dump_stats,
    decode_restore_stats,
)
from criu_glue.core.wire import ImageFormatError
from tests.criu_glue.checkpoint_images import image

DUMP = {
    "freezing_time": 100_123,
    "frozen_time": 345_678,
    "memdump_time": 3,
    "memwrite_time": 4,
    "pages_scanned": 2**40,
    "pages_skipped_parent": 6,
    "pages_written": 7,
    "irmap_resolve": 8,
    "pages_lazy": 9,
    "page_pipes": 10,
    "page_pipe_bufs": 11,
    "shpages_scanned": 12,
    "shpages_skipped_parent": 13,
    "shpages_written": 14,
}
RESTORE = {
    "pages_compared": 1,
    "pages_skipped_cow": 2,
    "forking_time": 3000,
    "restore_time": 44_000,
    "pages_restored": 5,
}


def test_dump() -> None:
    found = decode_dump_stats(image("STATS", [{"dump": DUMP}]))
    assert found == DumpStats(
        freezing_us=100_123,
        frozen_us=345_678,
        memdump_us=3,
        memwrite_us=4,
        pages_scanned=2**40,
        pages_skipped_parent=6,
        pages_written=7,
        pages_lazy=9,
        page_pipes=10,
        page_pipe_buffers=11,
        shared_pages_scanned=12,
        shared_pages_skipped_parent=13,
        shared_pages_written=14,
    )


def test_restore() -> None:
    assert decode_restore_stats(image("STATS", [{"restore": RESTORE}])) == RestoreStats(
        forking_us=3000, restore_us=44_000, pages_compared=1, pages_skipped_cow=2, pages_restored=5
    )


def test_what_is_optional_may_be_absent() -> None:
    needed = dict(list(DUMP.items())[:7]) | {"pages_lazy": 1}
    found = decode_dump_stats(image("STATS", [{"dump": needed}]))
    assert found.pages_written == 7
    assert found.shared_pages_written == 0


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"12345678",
        image("STATS", [{"restore": RESTORE}]),
        image("STATS", [{"dump": DUMP}])[:-3],
        image("STATS", [{"dump": DUMP}]) + bytes(STATS_BYTES_MAX),
        image("STATS", []),
    ],
)
def test_damage_is_a_typed_error(data: bytes) -> None:
    with pytest.raises(ImageFormatError):
        decode_dump_stats(data)
