"""A task for the pager's tests: has memory that is missing, and does things with it on command.

    python uffd_child.py ADDRESS PAGES      registers a userfaultfd on PAGES pages at ADDRESS
    stdout: {"uffd": N}                     the tester fetches it, as CRIU's restore sends it
    stdin:  [["operation", argument...], ...]   one line; stdout: [result, ...], one line

Contents are of whole pages: page number p of the store holds page_content(p).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

PAGE_BYTES = 4096
PROT_READ_WRITE = 3
MAP_PRIVATE_ANONYMOUS_FIXED_NOREPLACE = 0x100022
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_DONTNEED = 4
SYS_USERFAULTFD, O_CLOEXEC, O_NONBLOCK = 323, 0o2000000, 0o4000
UFFDIO_API, UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
FORK_REMAP_REMOVE_UNMAP = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_void_p,
]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def page_content(page: int) -> bytes:
    """The content of page number `page` of the store: never zeros."""
    return struct.pack("<QQ", page, page ^ 0xA5A5_A5A5_A5A5_A5A5) * (PAGE_BYTES // 16)


def _check(result: int | None) -> None:
    if result in (-1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _map(address: int, pages: int) -> None:
    flags = MAP_PRIVATE_ANONYMOUS_FIXED_NOREPLACE
    _check(libc.mmap(address, pages * PAGE_BYTES, PROT_READ_WRITE, flags, -1, 0))


def _page(address: int) -> bytes:
    return ctypes.string_at(address, PAGE_BYTES)


class Operations:
    """What the tester can ask for; addresses are virtual, `page` a page number of the store."""

    def __init__(self) -> None:
        self._movers: list[threading.Thread] = []

    def wrong(self, address: int, pages: int, page: int | None) -> list[int]:
        """Offsets in pages of those pages that do not hold store pages `page` on, or zeros."""
        return [
            n
            for n in range(pages)
            if _page(address + n * PAGE_BYTES)
            != (bytes(PAGE_BYTES) if page is None else page_content(page + n))
        ]

    def walk_down(self, address: int, pages: int, page: int) -> list[int]:
        """As `wrong`, from the last page to the first: every page is a fault of its own."""
        pages_down = reversed(range(pages))
        return [n for n in pages_down if self.wrong(address + n * PAGE_BYTES, 1, page + n)]

    def write(self, address: int, letter: int) -> None:
        ctypes.memset(address, letter, PAGE_BYTES)

    def holds(self, address: int, letter: int) -> bool:
        return _page(address) == bytes([letter]) * PAGE_BYTES

    def dontneed(self, address: int, pages: int) -> None:
        _check(libc.madvise(address, pages * PAGE_BYTES, MADV_DONTNEED))

    def unmap(self, address: int, pages: int) -> None:
        _check(libc.munmap(address, pages * PAGE_BYTES))

    def map(self, address: int, pages: int) -> None:
        _map(address, pages)

    def move(self, address: int, pages: int, to: int, new_pages: int, keep_old: bool) -> None:
        """mremap to a fixed place; `keep_old` leaves the old mapping there, empty."""
        flags = MREMAP_MAYMOVE | MREMAP_FIXED | (MREMAP_DONTUNMAP if keep_old else 0)
        _check(libc.mremap(address, pages * PAGE_BYTES, new_pages * PAGE_BYTES, flags, to))

    def move_in_thread(self, address: int, pages: int, to: int) -> None:
        """Begin a move that waits until the pager has heard of it."""
        mover = threading.Thread(target=self.move, args=(address, pages, to, pages, False))
        mover.start()
        self._movers.append(mover)

    def join(self) -> None:
        """Wait for the moves."""
        while self._movers:
            self._movers.pop().join()

    def grow(self, address: int, pages: int, new_pages: int) -> None:
        """mremap in place."""
        _check(libc.mremap(address, pages * PAGE_BYTES, new_pages * PAGE_BYTES, 0, None))

    def in_child(self, operations: list[list[Any]]) -> list[Any]:
        """Fork, and have the child do `operations`."""
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writer, json.dumps(perform(operations)).encode())
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            results = json.loads(pipe.read())
        os.waitpid(pid, 0)
        return results

    def fork_waiting(self, operations: list[list[Any]]) -> None:
        """Fork a child that does `operations` when told by `child_results`."""
        self._go = os.pipe()
        self._results = os.pipe()
        self._child = os.fork()
        if not self._child:
            os.read(self._go[0], 1)
            os.write(self._results[1], json.dumps(perform(operations)).encode())
            os._exit(0)

    def child_results(self) -> list[Any]:
        os.write(self._go[1], b"g")
        os.close(self._results[1])
        with os.fdopen(self._results[0], "rb") as pipe:
            results = json.loads(pipe.read())
        os.waitpid(self._child, 0)
        return results

    def hash_in_threads(self, address: int, pages: int, threads: int) -> list[str]:
        """Each thread hashes all of it, beginning somewhere else; they fault at the same time
        because hashing lets other threads run."""
        memory = (ctypes.c_char * (pages * PAGE_BYTES)).from_address(address)
        view = memoryview(memory).cast("B")
        step = 8 * PAGE_BYTES
        sums: list[list[str]] = [[] for _ in range(threads)]

        def work(mine: int) -> None:
            parts = list(range(0, len(view), step))
            first = mine * len(parts) // threads
            digests = {
                part: hashlib.blake2b(view[part : part + step]).hexdigest()
                for part in parts[first:] + parts[:first]
            }
            sums[mine] = [digests[part] for part in parts]

        workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return [hashlib.blake2b("".join(each).encode()).hexdigest() for each in sums]

    def move_while_others_read(
        self, address: int, pages: int, to: int, page: int, moves: int
    ) -> list[int]:
        """One thread moves memory to and fro; another reads, at either place, what it finds there.
        Returns the pages that held something else than their content at the end."""
        stop = threading.Event()
        pipe = os.pipe()

        def read() -> None:
            n = 0
            while not stop.is_set():
                for place in (address, to):
                    # write(2) of unmapped memory fails with EFAULT where a load would be a crash.
                    os_write(pipe[1], place + n % pages * PAGE_BYTES)
                n += 7

        def os_write(fd: int, place: int) -> None:
            if libc.write(fd, ctypes.c_void_p(place), PAGE_BYTES) == PAGE_BYTES:
                os.read(pipe[0], PAGE_BYTES)

        reader = threading.Thread(target=read)
        reader.start()
        for n in range(moves):
            self.move(*((address, pages, to) if n % 2 == 0 else (to, pages, address)), pages, False)
        stop.set()
        reader.join()
        return self.wrong(address if moves % 2 == 0 else to, pages, page)

    def touch_ms(self, address: int, pages: int, step: int) -> list[float]:
        """Milliseconds that each page's first touch took."""
        taken = []
        for n in range(0, pages, step):
            started = time.perf_counter()
            ctypes.string_at(address + n * PAGE_BYTES, 1)
            taken.append(1e3 * (time.perf_counter() - started))
        return taken

    def resident(self, address: int, pages: int) -> int:
        """How many of the pages are there."""
        with Path("/proc/self/pagemap").open("rb") as file:
            file.seek(address // PAGE_BYTES * 8)
            entries = struct.unpack(f"<{pages}Q", file.read(pages * 8))
        return sum(entry >> 63 for entry in entries)


OPERATIONS = Operations()


def perform(operations: list[list[Any]]) -> list[Any]:
    return [getattr(OPERATIONS, name)(*arguments) for name, *arguments in operations]


def main() -> None:
    address, pages = int(sys.argv[1], 0), int(sys.argv[2])
    _map(address, pages)
    uffd = libc.syscall(SYS_USERFAULTFD, O_CLOEXEC | O_NONBLOCK)
    _check(uffd)
    api = (ctypes.c_uint64 * 3)(0xAA, FORK_REMAP_REMOVE_UNMAP, 0)
    _check(libc.ioctl(uffd, ctypes.c_ulong(UFFDIO_API), api))
    register = (ctypes.c_uint64 * 4)(address, pages * PAGE_BYTES, 1, 0)
    _check(libc.ioctl(uffd, ctypes.c_ulong(UFFDIO_REGISTER), register))
    print(json.dumps({"uffd": uffd}), flush=True)
    sys.stdin.readline()
    os.close(uffd)
    print(json.dumps("closed"), flush=True)
    for line in sys.stdin:
        print(json.dumps(perform(json.loads(line))), flush=True)


assert mmap.PAGESIZE == PAGE_BYTES
if __name__ == "__main__":
    main()
