"""What one thread of a sender does: read pages, drop what the target has, compress, send.

A worker owns a stream, an encoder and the buffers of its frames; it shares the account of what the
target holds with the other workers, under a lock. It does not know rounds beyond the number in its
frames.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from transport.core.batches import page_addresses
from transport.core.connection import WINDOW_BYTES
from transport.core.frames import (
    FRAME_PAGES_MAX,
    FRAME_RAW_BYTES_MAX,
    PAGE_BYTES,
    PREFIX_BYTES_MAX,
    Codec,
    FrameHeader,
    FrameType,
    encode_prefix,
)
from transport.core.tables import RunKind, encode_file, encode_runs
from transport.core.transcript import Pieces, piece_digest
from transport.errors import SourceFailedError
from transport.stream import Delivery, OutFrame

if TYPE_CHECKING:
    from pathlib import Path

    from transport.codec import Encoder
    from transport.core.dedup import PageHashes
    from transport.fan import Fan

Runs: TypeAlias = npt.NDArray[np.uint64]
ReadPages: TypeAlias = Callable[[int, Runs, memoryview], npt.NDArray[np.bool_]]
"""(task, runs, out) -> mask: page i of the runs is at out[i * PAGE_BYTES:], unless mask[i] is False
since it has vanished. All of a sender's threads call it at once: it should copy without the GIL."""

BUFFERS_MAX = WINDOW_BYTES // (PREFIX_BYTES_MAX + FRAME_RAW_BYTES_MAX) + 1
"""A window full of uncompressed frames, and the one being filled."""

_BODY_AT = -(-PREFIX_BYTES_MAX // PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Progress:
    """What a sender has done so far, or in one round.

    `pages`: sent with content; `zero_pages`: sent as a mark; `unchanged_pages`: not sent since the
    target holds them; `vanished_pages`: no longer there when they were to be read. `bytes_raw`:
    content of pages and files before compression; `bytes_sent`: written to the streams, headers and
    repetitions included, TLS's own excluded. `reopened`: connections replaced after a break.
    """

    pages: int = 0
    zero_pages: int = 0
    unchanged_pages: int = 0
    vanished_pages: int = 0
    bytes_raw: int = 0
    bytes_sent: int = 0
    reopened: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Progress) -> Progress:
        return Progress(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


@dataclass(slots=True)
class _Counts:
    """What one worker counts itself, for `Progress`."""

    pages: int = 0
    zero_pages: int = 0
    unchanged_pages: int = 0
    vanished_pages: int = 0
    bytes_raw: int = 0


@dataclass(frozen=True, slots=True)
class PageJob:
    """At most FRAME_PAGES_MAX pages of one task."""

    task: int
    runs: Runs


@dataclass(frozen=True, slots=True)
class FileJob:
    """At most FRAME_RAW_BYTES_MAX bytes of a file."""

    name: str
    path: Path
    offset: int
    size_bytes: int


Job: TypeAlias = PageJob | FileJob


@dataclass(slots=True)
class Ledger:
    """What all workers share, with its lock: the account of the target's pages, and of files."""

    hashes: PageHashes
    pieces: Pieces = field(default_factory=Pieces)
    lock: threading.Lock = field(default_factory=threading.Lock)


class FrameBuffer:
    """Room for the largest frame, prefix beside body: uncompressed, it is one write."""

    def __init__(self) -> None:
        # Private and page-aligned, and the kernel takes it back when it is dropped.
        memory = mmap.mmap(
            -1, _BODY_AT + FRAME_RAW_BYTES_MAX, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self._view = memoryview(memory)
        self.body = self._view[_BODY_AT:]
        self.pages = [
            self.body[at : at + PAGE_BYTES] for at in range(0, FRAME_RAW_BYTES_MAX, PAGE_BYTES)
        ]
        self._array = np.frombuffer(self.body, dtype=np.uint64).reshape(FRAME_PAGES_MAX, -1)

    def keep(self, positions: npt.NDArray[np.intp]) -> memoryview:
        """Move the pages at `positions` (ascending) to the front; returns them."""
        count = len(positions)
        if count and int(positions[-1]) != count - 1:
            self._array[:count] = self._array[positions]
        return self.body[: count * PAGE_BYTES]

    def framed(self, prefix: bytes, body_bytes: int) -> memoryview:
        """The frame of `prefix` and the first bytes of the body, in one piece."""
        begin = _BODY_AT - len(prefix)
        self._view[begin:_BODY_AT] = prefix
        return self._view[begin : _BODY_AT + body_bytes]


class Worker:
    """One thread's part of a sender. Others may call `progress` only."""

    def __init__(
        self,
        make_stream: Callable[[Callable[[OutFrame], None]], Fan],
        *,
        read: ReadPages,
        ledger: Ledger,
        encoder: Encoder,
    ) -> None:
        self.stream = make_stream(self._applied)
        self._read = read
        self._ledger = ledger
        self._encoder = encoder
        self._free: list[FrameBuffer] = []
        self._made = 0
        self._counts = _Counts()

    @property
    def progress(self) -> Progress:
        """While the worker works, fields may be a frame apart from each other."""
        counts, stream = self._counts, self.stream
        return Progress(
            pages=counts.pages,
            zero_pages=counts.zero_pages,
            unchanged_pages=counts.unchanged_pages,
            vanished_pages=counts.vanished_pages,
            bytes_raw=counts.bytes_raw,
            bytes_sent=stream.bytes_sent,
            reopened=stream.reopened,
        )

    def carry(self, number: int, job: Job) -> None:
        """Put the job's frame on the way, if anything in it needs to travel."""
        if isinstance(job, PageJob):
            self._carry_pages(number, job)
        else:
            self._carry_file(number, job)

    def _carry_pages(self, number: int, job: PageJob) -> None:
        buffer = self._buffer()
        addresses = page_addresses(job.runs)
        count = len(addresses)
        try:
            present = self._read(job.task, job.runs, buffer.body[: count * PAGE_BYTES])
        except Exception as error:
            raise SourceFailedError(
                f"the memory of task {job.task} cannot be read: {error}"
            ) from error
        digests = self._ledger.hashes.digest(buffer.pages, count)
        positions = np.flatnonzero(present)
        if len(positions) < count:
            addresses, digests = addresses[positions], digests[positions]
        if len(positions) == 0:
            self._counts.vanished_pages += count
            self._free.append(buffer)
            return
        with self._ledger.lock:
            kinds, places = self._ledger.hashes.offer(job.task, addresses, digests)
        travelling = np.flatnonzero(kinds)
        body = buffer.keep(positions[kinds == RunKind.DATA])
        pages = len(body) // PAGE_BYTES
        counts = self._counts
        counts.pages += pages
        counts.zero_pages += len(travelling) - pages
        counts.unchanged_pages += len(kinds) - len(travelling)
        counts.vanished_pages += count - len(positions)
        counts.bytes_raw += len(body)
        if len(travelling) == 0:
            self._free.append(buffer)
            return
        if len(travelling) < len(kinds):
            addresses, kinds = addresses[travelling], kinds[travelling]
            places, digests = places[travelling], digests[travelling]
        table = encode_runs(addresses, kinds)
        delivery = Delivery(places, digests)
        self._send(FrameType.PAGES, number, job.task, table, buffer, body, delivery)

    def _carry_file(self, number: int, job: FileJob) -> None:
        buffer = self._buffer()
        body = buffer.body[: job.size_bytes]
        try:
            descriptor = os.open(job.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                count = os.preadv(descriptor, [body], job.offset) if body else 0
            finally:
                os.close(descriptor)
        except OSError as error:
            raise SourceFailedError(f"{job.path} cannot be read: {error}") from error
        if count != job.size_bytes:
            raise SourceFailedError(f"{job.path} became shorter while it was being sent")
        self._counts.bytes_raw += count
        digest = piece_digest(body)
        with self._ledger.lock:
            self._ledger.pieces.add(job.name, job.offset, count, digest)
        table = encode_file(job.name, job.offset)
        self._send(FrameType.FILE, number, 0, table, buffer, body, None, piece=digest)

    def _send(
        self,
        kind: FrameType,
        number: int,
        task: int,
        table: bytes,
        buffer: FrameBuffer,
        body: memoryview,
        delivery: Delivery | None,
        *,
        piece: bytes = b"",
    ) -> None:
        codec, encoded = self._encoder.encode(body) if body else (Codec.RAW, body)
        sequence = self.stream.next_sequence()
        header = FrameHeader(
            kind, codec, number, sequence, task, len(table), len(body), len(encoded)
        )
        prefix = encode_prefix(header, table, encoded)
        if codec == Codec.RAW and body:
            whole = buffer.framed(prefix, len(body))
            frame = OutFrame(sequence, (whole,), prefix, body, piece, delivery, buffer)
        else:
            parts = (prefix, encoded) if body else (prefix,)
            frame = OutFrame(sequence, parts, prefix, encoded, piece, delivery)
            self._free.append(buffer)
        self._encoder.sent(frame.kept_bytes, self.stream.send(frame))

    def _buffer(self) -> FrameBuffer:
        while not self._free:
            if self._made < BUFFERS_MAX:
                self._made += 1
                return FrameBuffer()
            self.stream.await_answer()
        return self._free.pop()

    def _applied(self, frame: OutFrame) -> None:
        if frame.delivery is not None:
            delivery = frame.delivery
            with self._ledger.lock:
                self._ledger.hashes.commit(delivery.places, delivery.digests)
        if isinstance(frame.buffer, FrameBuffer):
            self._free.append(frame.buffer)
