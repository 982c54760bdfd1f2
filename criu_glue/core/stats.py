"""CRIU's own measurements, from stats-dump and stats-restore.

CRIU writes them into its work directory, and only after success (criu/stats.c: write_stats).
Pure: bytes in, records out. Times are microseconds, as the names say. Source: images/stats.proto.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from criu_glue.core.wire import (
    IMG_SERVICE_MAGIC,
    WIRE_BYTES,
    WIRE_VARINT,
    ImageFormatError,
    check_magic,
    iterate_fields,
    split_entries,
)

STATS_MAGIC: Final = 0x57093306
# A dump's has 14 numbers of at most 11 bytes.
STATS_BYTES_MAX: Final = 4096

_DUMP: Final = 1
_RESTORE: Final = 2


@dataclass(frozen=True, slots=True)
class DumpStats:
    """`freezing_us`: until all tasks stood still. `frozen_us`: from then until they were let go
    or killed, holds included. `memdump_us`: reading page tables and pages. `memwrite_us`: writing
    pages. Counts are in pages; `shared_*` is shared memory, which is never lazy."""

    freezing_us: int
    frozen_us: int
    memdump_us: int
    memwrite_us: int
    pages_scanned: int
    pages_skipped_parent: int
    pages_written: int
    pages_lazy: int
    page_pipes: int
    page_pipe_buffers: int
    shared_pages_scanned: int
    shared_pages_skipped_parent: int
    shared_pages_written: int


@dataclass(frozen=True, slots=True)
class RestoreStats:
    """`forking_us`: creating the tasks. `restore_us`: all of it until they may resume."""

    forking_us: int
    restore_us: int
    pages_compared: int
    pages_skipped_cow: int
    pages_restored: int


def decode_dump_stats(data: bytes) -> DumpStats:
    """Decode `stats-dump`. Raises ImageFormatError."""
    numbers = _numbers(data, _DUMP, "stats-dump")
    fields = (1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14)
    return DumpStats(*(numbers.get(field, 0) for field in fields))


def decode_restore_stats(data: bytes) -> RestoreStats:
    """Decode `stats-restore`. Raises ImageFormatError."""
    numbers = _numbers(data, _RESTORE, "stats-restore")
    return RestoreStats(*(numbers.get(field, 0) for field in (3, 4, 1, 2, 5)))


def _numbers(data: bytes, part: int, what: str) -> dict[int, int]:
    if len(data) > STATS_BYTES_MAX:
        raise ImageFormatError(f"{what}: {len(data)} bytes are more than {STATS_BYTES_MAX}")
    check_magic(data, IMG_SERVICE_MAGIC, STATS_MAGIC, what)
    starts, ends = split_entries(data, what, entries_max=1)
    if not len(starts):
        raise ImageFormatError(f"{what}: is empty")
    for field, kind, position, size in iterate_fields(data, int(starts[0]), int(ends[0])):
        if field == part and kind == WIRE_BYTES:
            inner = iterate_fields(data, position, position + size)
            return {number: value for number, kind, value, _ in inner if kind == WIRE_VARINT}
    raise ImageFormatError(f"{what}: holds the statistics of something else")
