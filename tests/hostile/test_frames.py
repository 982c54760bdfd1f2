"""A source that is let in and then lies on its streams: what it says is written nowhere."""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path

import pytest
import zstandard

from tests.hostile.scene import Scene
from tests.transport.transfer_parts import RawClient, page_frame
from transport.core import frames
from transport.core.frames import (
    FRAME_RAW_BYTES_MAX,
    PAGE_BYTES,
    Codec,
    FrameHeader,
    FrameType,
    Status,
)
from transport.core.tables import RunKind

PAGE = b"p" * PAGE_BYTES
GROWTH_BYTES_MAX = 32 << 20
BOMB_BYTES = 256 << 20


def file_frame(name: bytes, offset: int = 0, body: bytes = b"content") -> bytes:
    """A frame of a file, right in every way but for what it says."""
    header = FrameHeader(FrameType.FILE, Codec.RAW, 1, 1, 0, 0, len(body), 0)
    return frames.encode_prefix(header, struct.pack("<Q", offset) + name, body) + body


def pages_frame(
    *runs: tuple[int, int, int], task: int = 1, body: bytes = PAGE, raw: int | None = None
) -> bytes:
    """A frame of pages; compressed, if its size before that is given."""
    codec = Codec.RAW if raw is None else Codec.ZSTD
    size = len(body) if raw is None else raw
    header = FrameHeader(FrameType.PAGES, codec, 1, 1, task, 0, size, 0)
    table = b"".join(struct.pack("<QII", *run) for run in runs)
    return frames.encode_prefix(header, table, body) + body


def bomb(claimed: int | None) -> bytes:
    """A quarter of a GiB of zeros in a few KiB, which claims to be less, or says nothing of it."""
    with_size = claimed is not None
    compressor = zstandard.ZstdCompressor(level=19, write_content_size=with_size)
    data = compressor.compress(bytes(BOMB_BYTES))
    if claimed is None:
        return data
    # RFC 8878, 3.1.1.1: of this size, four bytes behind the magic and the descriptor.
    assert zstandard.frame_content_size(data) == BOMB_BYTES
    at = data.index(struct.pack("<I", BOMB_BYTES))
    return data[:at] + struct.pack("<I", claimed) + data[at + 4 :]


WHOLE = [(at * PAGE_BYTES, 1, RunKind.DATA) for at in range(256)]
DATA, ZERO = RunKind.DATA, RunKind.ZERO
LIES = {
    "name above": file_frame(b"../escape"),
    "name absolute": file_frame(b"/escape"),
    "name of a directory": file_frame(b"mem/pages-1.img"),
    "name with NUL": file_frame(b"core-1.img\0"),
    "name hidden": file_frame(b".profile"),
    "name of no image": file_frame(b"escape"),
    "name of the parent link": file_frame(b"parent"),
    "name not ASCII": file_frame(b"core-\xff.img"),
    "name too long": file_frame(b"core-" + b"1" * 55 + b".img"),
    "name much too long": file_frame(b"c" * 4000),
    "file at 2^63": file_frame(b"core-1.img", 1 << 63),
    "file at 2^64 - 1": file_frame(b"core-1.img", (1 << 64) - 1),
    "file beyond the quota": file_frame(b"core-1.img", 1 << 43),
    "page at 2^63": pages_frame((1 << 63, 1, DATA)),
    "page at the end of 64 bits": pages_frame(((1 << 64) - PAGE_BYTES, 1, DATA)),
    "page of the kernel": pages_frame((1 << 57, 1, DATA)),
    "page not aligned": pages_frame((1, 1, DATA)),
    "2^32 - 1 pages": pages_frame((0, (1 << 32) - 1, DATA)),
    "2^32 - 1 zero pages": pages_frame((0, (1 << 32) - 1, ZERO), body=b""),
    "overlapping": pages_frame((0, 1, DATA), (0, 1, DATA), body=PAGE * 2),
    "descending": pages_frame((PAGE_BYTES, 1, DATA), (0, 1, DATA), body=PAGE * 2),
    "task 0": pages_frame((0, 1, DATA), task=0),
    "task beyond all": pages_frame((0, 1, DATA), task=(1 << 22) + 1),
    "half a page": pages_frame((0, 1, DATA), body=PAGE[:2048]),
    "bomb that claims less": pages_frame(*WHOLE, body=bomb(FRAME_RAW_BYTES_MAX), raw=1 << 20),
    "bomb that claims what it is": pages_frame(*WHOLE, body=bomb(BOMB_BYTES), raw=1 << 20),
    "bomb that claims nothing": pages_frame(*WHOLE, body=bomb(None), raw=1 << 20),
    "2^32 - 1 bytes": page_frame(1, 1, PAGE)[:24] + b"\xff" * 8 + page_frame(1, 1, PAGE)[32:],
    "sequence ahead": page_frame(2, 1, PAGE),
    "bit flipped": page_frame(1, 1, PAGE)[:-1] + b"q",
}


def tree(place: Path) -> dict[str, tuple[int, ...]]:
    """All files there, and what changes when they are written to. Some are as long as memory is.

    The front's own notes of what came are left out."""
    found: dict[str, tuple[int, ...]] = {}
    for path in place.rglob("*"):
        if "kept" in path.parts:
            continue
        status = path.lstat()
        size = status.st_size if path.is_file() else 0
        found[str(path.relative_to(place))] = (status.st_ino, size, status.st_blocks)
    return found


def attack(scene: Scene, base: Path) -> None:
    context = scene.rig.identity.client_context()
    scene.check_others()
    before_bytes = scene.process.memory_info().rss
    for what, lie in LIES.items():
        ticket = scene.rig.begin()
        before, count = tree(scene.place), len(scene.lines())
        around = {path for path in base.rglob("*") if path.name != "log"}
        with RawClient(scene.ports[1], context) as client:
            assert client.greet(ticket).status == Status.ACCEPTED, what
            client.stream.sendall(lie)
            answer = client.answer()
            assert answer.status in (Status.BAD_FRAME, Status.SINK_FAILED, Status.SINK_FULL), what
            assert client.closed(), what
        assert tree(scene.place) == before, what
        assert {path for path in base.rglob("*") if path.name != "log"} == around, what
        (line,) = scene.lines()[count:]
        assert "stream ended early" in line, what
        assert "source.test" in line, what
    assert scene.process.memory_info().rss - before_bytes < GROWTH_BYTES_MAX
    scene.check_others()


async def test_lies(scene: Scene, tmp_path: Path) -> None:
    await asyncio.to_thread(attack, scene, tmp_path)


@pytest.mark.parametrize("cut", [1, 39, 40, 55, 56, 100, -1])
async def test_half_a_frame(scene: Scene, cut: int) -> None:
    """What ends within a frame is not applied; the stream goes on with the next connection."""

    def check() -> None:
        context = scene.rig.identity.client_context()
        ticket = scene.rig.begin()
        with RawClient(scene.ports[1], context) as client:
            client.greet(ticket)
            client.stream.sendall(page_frame(1, 1, PAGE)[:cut])
        with RawClient(scene.ports[1], context) as client:
            assert client.greet(ticket) == frames.Answer(Status.ACCEPTED, 0)
            client.stream.sendall(page_frame(1, 1, PAGE))
            assert client.answer() == frames.Answer(Status.APPLIED, 1)
            client.stream.sendall(page_frame(1, 1, PAGE))
            assert client.answer().status == Status.BAD_FRAME, "once more"

    await asyncio.to_thread(check)
