"""CRIU's images, as far as this project reads them, and the rewriting that joins them to a page
store. They come from the source.

    first byte  0 pagemap | 1 mappings | 2 timers | 3 statistics | 4 pagemap and mappings of a task:
                two bytes of the pagemap's length, the pagemap, the mappings
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from criu_glue.core import stats
from criu_glue.core.pagemap import (
    ADDRESS_END,
    PAGE_BYTES,
    PE_LAZY,
    PE_PARENT,
    PE_PRESENT,
    Pagemap,
    decode_pagemap,
    encode_pagemap,
    pages_in,
)
from criu_glue.core.timers import rearm_timers
from criu_glue.core.vmas import decode_mappings
from criu_glue.core.wire import ImageFormatError
from criu_glue.errors import CriuGlueError
from criu_glue.images import attach_page_store, pager_ranges
from criu_glue.page_store import PageStore
from tests.criu_glue import checkpoint_images as images

MAX_BYTES = 8 << 10
IS_JSON = False
TASK = 1


def one_input(data: bytes) -> None:
    """Nothing but CriuGlueError may come of it."""
    if not data:
        return
    content = data[1:]
    with suppress(ImageFormatError):
        match data[0] % 5:
            case 0:
                _pagemap(content)
            case 1:
                decode_mappings(content)
            case 2:
                armed = rearm_timers(content)
                assert len(armed) == len(content)
                assert rearm_timers(armed) == armed
            case 3:
                for decode in (stats.decode_dump_stats, stats.decode_restore_stats):
                    with suppress(ImageFormatError):
                        decode(content)
            case _:
                _join(content)


def _pagemap(data: bytes) -> None:
    pagemap = decode_pagemap(data)
    again = decode_pagemap(encode_pagemap(pagemap))
    assert again.pages_id == pagemap.pages_id
    assert np.array_equal(again.entries, pagemap.entries)
    assert pages_in(pagemap.runs()) == int(pagemap.entries[:, 1].sum())


def _join(data: bytes) -> None:
    """What the agent does with the images of a task before CRIU and the pager see them."""
    if len(data) < 2:
        return
    (size,) = struct.unpack_from("<H", data)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_DIRECTORY)))
        (directory / "img").mkdir()
        (directory / "img" / f"pagemap-{TASK}.img").write_bytes(data[2 : 2 + size])
        (directory / "img" / f"mm-{TASK}.img").write_bytes(data[2 + size :])
        store = PageStore(directory / "mem", quota_bytes=1 << 20)
        stack.callback(store.close)
        try:
            lazy = attach_page_store(directory / "img", store)[TASK]
            assert pages_in(pager_ranges(directory / "img", TASK)) == pages_in(lazy)
        except CriuGlueError:
            return
        parent = decode_pagemap((directory / "mem" / f"pagemap-{TASK}.img").read_bytes())
        assert int(parent.entries[0, 0]) == 0
        assert store.stored_bytes() == 0


# Images are on tmpfs where they are for real.
_DIRECTORY = "/dev/shm" if os.path.ismount("/dev/shm") else None


def seeds() -> Iterator[bytes]:
    dumped = [(0x1000, 2, PE_LAZY), (0x4000, 1, PE_PRESENT), (0x7FFF_0000_0000, 9, PE_PARENT)]
    pagemap = images.pagemap_image(dumped)
    mm = images.mm_image([images.vma(0x1000, 0x3000), images.vma(0x4000, 0x6000, madv=1 << 18)])
    yield b"\0" + pagemap
    ends = np.array([[ADDRESS_END - PAGE_BYTES, 1, PE_LAZY]], dtype=np.uint64)
    yield b"\0" + encode_pagemap(Pagemap(1, ends))
    yield b"\0" + images.image("PAGEMAP", [{"pages_id": 1}, {"vaddr": 4096, "compat_nr_pages": 1}])
    yield b"\1" + mm
    timer = {"id": 1, "type": "TIMERFD", "tfd": _TIMER}
    yield b"\2" + images.image("FILES", [timer])
    dump = {"freezing_time": 1, "frozen_time": 2, "memdump_time": 3, "memwrite_time": 4}
    dump |= {"pages_scanned": 5, "pages_skipped_parent": 6, "pages_written": 7}
    dump |= {"irmap_resolve": 8, "pages_lazy": 9}
    yield b"\3" + images.image("STATS", [{"dump": dump}])
    yield b"\4" + struct.pack("<H", len(pagemap)) + pagemap + mm


_TIMER = {
    "id": 1,
    "flags": 2,
    "fown": {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0},
    "clockid": 1,
    "ticks": 3,
    "settime_flags": 0,
    "vsec": 0,
    "vnsec": 0,
    "isec": 0,
    "insec": 5,
}

DICTIONARY = (
    struct.pack("<II", 0x54564319, 0x56084025),
    struct.pack("<II", 0x54564319, 0x57492820),
    struct.pack("<II", 0x54564319, 0x56303138),
    struct.pack("<II", 0x55105940, 0x57093306),
    b"\x08\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",  # address 2**63
    b"\x28\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # 2**64 - 1 pages
    b"\x10\xff\xff\xff\xff\x0f",
    b"\x20\x02",
    b"\x72",
)
