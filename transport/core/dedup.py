"""What the target holds of each task's memory, so that a page it already has does not travel again.

Pure, and without locks: callers on several threads take one of their own around each method.

Address space is kept account of in chunks of 2 MiB (512 pages). A chunk gets a slot when its first
page is offered; slots index two tables::

    slots[task][chunk] -> slot
                           |
          delivered        |            digests (the first `digest_slots` slots only)
          (slots, 64) u8   |            (digest_slots, 512) u64
          +-------------+  |            +-------------------------------------------+
          | 512 bits    |<-+----------->| hash of the content delivered last, or 0  |
          +-------------+               +-------------------------------------------+

The digests take 8 bytes a page and are bounded: pages of chunks beyond the bound always count as
changed. The bits take 64 times less and are never given up, since a page that the target never got
must be known.

A page is in one of three states:

- digest 0, bit clear: never delivered;
- digest 0, bit set: delivered, content at the target not known (it travels if offered);
- digest not 0: the target holds the content of that digest.

`offer` sets the digests of all pages that are going to travel to 0, and only `commit`, called when
the target has acknowledged them, sets them. So whatever happens to a frame in between (sent twice,
lost, applied without its acknowledgement having arrived), no page can be taken for unchanged on the
strength of it.

Digests are xxh3-64 with a seed that the container cannot know; two different contents of one page
are taken for the same with a probability of 2**-64 for each comparison.
"""

from __future__ import annotations

from itertools import pairwise, repeat
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from transport.core.batches import batches, gathered, page_addresses
from transport.core.frames import PAGE_BYTES
from transport.core.tables import RunKind
from transport.errors import TableFullError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

    Addresses = npt.NDArray[np.uint64]
    Digests = npt.NDArray[np.uint64]
    Places = npt.NDArray[np.int64]

CHUNK_PAGES = 512
DIGEST_BYTES = 8
TABLE_BYTES = 64 << 20
"""Default bound of the digests: 8 Mi pages, 32 GiB of memory."""
SLOTS_MAX = 1 << 21
"""Chunks in all: 4 TiB of touched address space, for 128 MiB of bits."""
UNCHANGED = 0
"""The third outcome of `offer`, besides RunKind.DATA and RunKind.ZERO."""

_CHUNK_BITS = 9
_PAGE_BITS = 12
_PAGE_SHIFT = np.uint64(_PAGE_BITS)
_CHUNK_SHIFT = np.uint64(_PAGE_BITS + _CHUNK_BITS)
_WITHIN_CHUNK = np.uint64(CHUNK_PAGES - 1)
_BIT = np.left_shift(1, np.arange(8)).astype(np.uint8)
_FIRST_SLOTS = 64
_LOOKUP_PAGES = 1 << 20
"""Pages looked up at once by `never_delivered`: bounds its memory to a few times 8 MiB."""
_ALL_DELIVERED = np.uint8(0xFF)


class PageHashes:
    """The account of one transfer. `seed`: 64 bits, secret, for the digests."""

    def __init__(
        self, seed: int, *, table_bytes: int = TABLE_BYTES, slots_max: int = SLOTS_MAX
    ) -> None:
        digest_slots = min(table_bytes // (CHUNK_PAGES * DIGEST_BYTES), slots_max)
        # Zeroed memory comes from the kernel page by page, when it is first written.
        self._digests = np.zeros(digest_slots * CHUNK_PAGES, dtype=np.uint64)
        self._delivered = np.zeros((_FIRST_SLOTS, CHUNK_PAGES // 8), dtype=np.uint8)
        self._slots: dict[int, dict[int, int]] = {}
        self._free: list[int] = []
        self._used = 0
        self._slots_max = slots_max
        self._seed = seed
        self._zero_digest = _never_zero(xxhash.xxh3_64_intdigest(bytes(PAGE_BYTES), seed))

    def digest(self, pages: Iterable[memoryview], count: int) -> Digests:
        """The digests of `count` pages of PAGE_BYTES each. Touches no table: needs no lock."""
        found = np.fromiter(
            map(xxhash.xxh3_64_intdigest, pages, repeat(self._seed, count)),
            dtype=np.uint64,
            count=count,
        )
        found[found == 0] = 1  # 0 means "not known" in the table
        return found

    def offer(
        self, task: int, addresses: Addresses, digests: Digests
    ) -> tuple[npt.NDArray[np.uint8], Places]:
        """What is to be done with each page: UNCHANGED, RunKind.ZERO or RunKind.DATA.

        `addresses` ascending, one for each digest. The pages that are not UNCHANGED count as in
        doubt from now on. The second array is what `commit` wants to know of each page. Raises
        TableFullError.
        """
        places = self._places(self._slots_of(task, addresses, make=True), addresses)
        kinds = np.full(len(addresses), RunKind.DATA, dtype=np.uint8)
        kinds[digests == self._zero_digest] = RunKind.ZERO
        held = places < len(self._digests)
        if bool(held.all()):
            kinds[self._digests[places] == digests] = UNCHANGED
            self._digests[places[kinds != UNCHANGED]] = 0
        else:
            held_places = places[held]
            same = self._digests[held_places] == digests[held]
            kinds[np.flatnonzero(held)[same]] = UNCHANGED
            self._digests[held_places[~same]] = 0
        return kinds, places

    def commit(self, places: Places, digests: Digests) -> None:
        """The target has these pages with this content. `forget` may not have come in between."""
        held = places < len(self._digests)
        self._digests[places[held]] = digests[held]
        np.bitwise_or.at(self._delivered.reshape(-1), places >> 3, _BIT[places & 7])

    def never_delivered(self, task: int, runs: Addresses) -> Addresses:
        """The pages of `runs` (page runs) that the target never got, as page runs."""
        missing = [np.empty((0, 2), dtype=np.uint64)]
        for batch in batches(runs, _LOOKUP_PAGES):
            pieces = _by_chunks(batch)
            slots = self._slots_of(task, pieces[:, 0], make=False)
            full = np.zeros(len(pieces), dtype=np.bool_)
            has_slot = slots >= 0
            full[has_slot] = (self._delivered[slots[has_slot]] == _ALL_DELIVERED).all(axis=1)
            if bool(full.all()):
                continue
            addresses = page_addresses(pieces[~full])
            repeated = np.repeat(slots[~full], pieces[~full, 1].astype(np.intp))
            places = self._places(np.maximum(repeated, 0), addresses)
            bits = self._delivered.reshape(-1)[places >> 3] & _BIT[places & 7]
            missing.append(gathered(addresses[(repeated < 0) | (bits == 0)]))
        return np.concatenate(missing)

    def forget(self, task: int) -> None:
        """The task is gone, or the target's copy is: its pages count as never delivered."""
        for slot in self._slots.pop(task, {}).values():
            self._delivered[slot] = 0
            self._digests[slot * CHUNK_PAGES : (slot + 1) * CHUNK_PAGES] = 0
            self._free.append(slot)

    def _slots_of(self, task: int, addresses: Addresses, *, make: bool) -> npt.NDArray[np.int64]:
        """The slot of each address, -1 if it has none and none was to be made."""
        chunks = addresses >> _CHUNK_SHIFT
        changes = np.flatnonzero(chunks[1:] != chunks[:-1])
        of_task = self._slots.setdefault(task, {}) if make else self._slots.get(task, {})
        begins = [0, *(changes + 1).tolist()]
        slots = np.empty(len(addresses), dtype=np.int64)
        for begin, end in pairwise((*begins, len(addresses))):
            chunk = int(chunks[begin])
            slot = of_task.get(chunk, -1)
            if slot < 0 and make:
                slot = of_task[chunk] = self._new_slot()
            slots[begin:end] = slot
        return slots

    def _new_slot(self) -> int:
        if self._free:
            return self._free.pop()
        if self._used >= self._slots_max:
            raise TableFullError(
                f"the container's memory spreads over more than {self._slots_max} chunks of 2 MiB; "
                "it cannot be copied while it runs"
            )
        if self._used == len(self._delivered):
            self._delivered = np.concatenate((self._delivered, np.zeros_like(self._delivered)))
        self._used += 1
        return self._used - 1

    @staticmethod
    def _places(slots: npt.NDArray[np.int64], addresses: Addresses) -> Places:
        """Where the pages are in the flat tables."""
        within = ((addresses >> _PAGE_SHIFT) & _WITHIN_CHUNK).view(np.int64)
        return slots * CHUNK_PAGES + within


def _never_zero(digest: int) -> int:
    return digest or 1


def _by_chunks(runs: Addresses) -> Addresses:
    """`runs` cut at the borders of chunks."""
    first = runs[:, 0] >> np.uint64(_PAGE_BITS)
    end = first + runs[:, 1]
    chunk = first >> np.uint64(_CHUNK_BITS)
    count = (((end - np.uint64(1)) >> np.uint64(_CHUNK_BITS)) - chunk + np.uint64(1)).astype(
        np.intp
    )
    within = np.arange(int(count.sum()), dtype=np.uint64)
    within -= np.repeat(np.cumsum(count) - count, count).astype(np.uint64)
    chunk_first = (np.repeat(chunk, count) + within) << np.uint64(_CHUNK_BITS)
    low = np.maximum(chunk_first, np.repeat(first, count))
    high = np.minimum(chunk_first + np.uint64(CHUNK_PAGES), np.repeat(end, count))
    return np.stack((low << np.uint64(_PAGE_BITS), high - low), axis=1)
