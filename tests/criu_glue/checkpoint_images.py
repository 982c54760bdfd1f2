"""Writes the images of a task as a checkpoint has them, with CRIU's own library."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import pytest

from criu_glue.core.pagemap import PAGE_BYTES

images = pytest.importorskip("pycriu").images

ANONYMOUS = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
_REGULAR_ANONYMOUS = 0x201


def image(magic: str, entries: list[dict[str, Any]]) -> bytes:
    """An image file of CRIU."""
    out = io.BytesIO()
    with warnings.catch_warnings():
        # pycriu asks protobuf 6 in a way that is going away; it knows the new one too.
        warnings.filterwarnings("ignore", "label", DeprecationWarning)
        images.dump({"magic": magic, "entries": entries}, out)
    return out.getvalue()


def pagemap_records(entries: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """[(address, pages, flags)] as every CRIU reads them."""
    return [
        {
            "vaddr": address,
            "compat_nr_pages": min(pages, 2**32 - 1),
            "flags": flags,
            "nr_pages": pages,
        }
        for address, pages, flags in entries
    ]


def pagemap_image(entries: list[tuple[int, int, int]], pages_id: int = 1) -> bytes:
    """pagemap-<task>.img"""
    return image("PAGEMAP", [{"pages_id": pages_id}, *pagemap_records(entries)])


def vma(
    start: int,
    end: int,
    flags: int = ANONYMOUS,
    status: int = _REGULAR_ANONYMOUS,
    madv: int | None = None,
) -> dict[str, Any]:
    """One mapping of an mm image."""
    entry = {"start": start, "end": end, "pgoff": 0, "shmid": 2**40, "prot": 3}
    entry |= {"flags": flags, "status": status, "fd": -1}
    return entry if madv is None else {**entry, "madv": madv, "fdflags": 1}


def mm_image(vmas: list[dict[str, Any]]) -> bytes:
    """mm-<task>.img"""
    names = "start_code end_code start_data end_data start_stack start_brk brk"
    names += " arg_start arg_end env_start env_end"
    entry: dict[str, Any] = {f"mm_{name}": 0x7FFF_1234_5000 for name in names.split()}
    entry |= {"exe_file_id": 3, "mm_saved_auxv": [2**63, 1, 2]}
    return image("MM", [entry | ({"vmas": vmas} if vmas else {})])


def write_task(
    directory: Path, task: int, entries: list[tuple[int, int, int]], vmas: list[tuple[int, int]]
) -> None:
    """A task's pagemap and mm; `vmas` as (address, pages)."""
    (directory / f"pagemap-{task}.img").write_bytes(pagemap_image(entries))
    mappings = [vma(start, start + pages * PAGE_BYTES) for start, pages in vmas]
    (directory / f"mm-{task}.img").write_bytes(mm_image(mappings))
