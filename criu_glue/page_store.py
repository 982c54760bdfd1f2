"""The page store: on the target, the memory of a container's tasks as plain files.

    DIRECTORY/pages-<task>.img      offset == virtual address, sparse, on tmpfs

A tmpfs file may be as long as 2^63 and its holes cost nothing, so a file needs no table of
regions. Rounds overwrite in place, a zero page is a hole, and the space taken is one copy of the
container however many rounds there are. CRIU reads the files as the pages of a parent image
(see images.py), the pager reads them with the class here. Knows nothing of pagemaps or of the
network, but takes addresses and sizes as coming from a peer: everything is checked.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from criu_glue.core.pagemap import ADDRESS_END
from criu_glue.errors import CriuGlueError, LimitExceededError
from criu_glue.kernel import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Tasks of one container. Each has a file descriptor here, and a process on the target has
# room for some thousands.
TASKS_MAX: Final = 4096
# Linux: PID_MAX_LIMIT, the largest pid a task can have.
TASK_NUMBER_MAX: Final = 4 << 20
# More than any frame of the transport; a longer buffer is a mistake of the caller.
WRITE_BYTES_MAX: Final = 64 << 20

_STAT_BLOCK_BYTES: Final = 512  # stat(2): unit of st_blocks
_FILE_NAME: Final = re.compile(r"pages-([1-9][0-9]{0,6})\.img")

_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def punch_hole(fd: int, offset: int, bytes_: int) -> None:
    """fallocate(2): give the memory or disk of a part of a file back; it then reads as zeros.
    Cheap where there is a hole already. Raises OSError."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    if _libc.fallocate(fd, mode, offset, bytes_) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def open_directory(directory: Path, within: int | None) -> int:
    """A descriptor of `directory`, made with mode 0700 if need be; or another one of `within`,
    which may be one that only names it (O_PATH). Raises OSError."""
    if within is None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = directory if within is None else "."
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=within)


def is_pages_name(name: str) -> bool:
    """Whether a file of a page store can be called so."""
    return _FILE_NAME.fullmatch(name) is not None


class PageStoreError(CriuGlueError):
    """The page store cannot hold, find or give what was asked."""


class PageStoreFullError(PageStoreError):
    """The container's memory is larger than what was reserved for it, or than what is free."""


def pages_file_name(task: int) -> str:
    """Name of a task's file; also its `pages_id`, so that CRIU finds it by the same number."""
    return f"pages-{task}.img"


class PageStore:
    """Memory of the tasks of one container. All methods may be called from several threads.

    `directory` is created with mode 0700 if need be; files that are there already (of an agent
    that died) are taken over. With `within`, a descriptor of it, the directory is there, and
    `directory` is only what errors call it. `quota_bytes` bounds the memory that the store takes;
    it can be exceeded by the writes under way, since only what was overwritten tells what was new.
    """

    def __init__(
        self,
        directory: Path,
        *,
        quota_bytes: int,
        tasks_max: int = TASKS_MAX,
        within: int | None = None,
    ) -> None:
        self.directory = directory
        self._quota_bytes = quota_bytes
        self._tasks_max = tasks_max
        self._condition = threading.Condition()
        self._files: dict[int, int] = {}
        self._using = 0
        self._closed = False
        # At least what the store takes: overwritten pages count again until _recount.
        self._counted_bytes = 0
        try:
            self._directory_fd = open_directory(directory, within)
        except OSError as error:
            raise PageStoreError(f"page store {directory}: {error}") from error
        try:
            with os.scandir(self._directory_fd) as entries:
                for match in filter(None, (_FILE_NAME.fullmatch(entry.name) for entry in entries)):
                    self._open(int(match[1]))
            self._counted_bytes = self._recount()
        except CriuGlueError:
            self.close()
            raise

    def tasks(self) -> list[int]:
        """Tasks that have a file, ascending."""
        with self._condition:
            return sorted(self._files)

    def path(self, task: int) -> Path:
        """Where a task's file is, or would be."""
        return self.directory / pages_file_name(task)

    def stored_bytes(self) -> int:
        """Memory that the store takes now."""
        with self._in_use(), self._condition:
            return self._recount()

    def write(self, task: int, address: int, data: bytes | bytearray | memoryview) -> None:
        """Store `data`, whole pages, at `address`; it is copied before this returns.

        Raises PageStoreFullError, and PageStoreError for an address, size or task that cannot be.
        """
        view = memoryview(data).cast("B")
        self._check(address, len(view), WRITE_BYTES_MAX)
        with self._in_use():
            fd = self._file(task)
            self._reserve(len(view))
            position = address
            while len(view):
                try:
                    written = os.pwrite(fd, view, position)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM):
                        raise PageStoreFullError(
                            f"page store {self.directory}: no memory left on its tmpfs"
                        ) from error
                    raise PageStoreError(f"page store {self.path(task)}: {error}") from error
                view = view[written:]
                position += written

    def zero(self, task: int, address: int, pages: int) -> None:
        """Make `pages` pages at `address` read as zeros and take no memory."""
        self._check(address, pages * PAGE_BYTES, ADDRESS_END)
        with self._in_use():
            fd = self._file(task)
            try:
                punch_hole(fd, address, pages * PAGE_BYTES)
            except OSError as error:
                raise PageStoreError(f"page store {self.path(task)}: {error}") from error

    def read_into(self, task: int, address: int, out: bytearray | memoryview) -> None:
        """Fill `out`, whole pages, from `address`; what was never stored reads as zeros."""
        view = memoryview(out).cast("B")
        self._check(address, len(view), ADDRESS_END)
        with self._in_use():
            fd = self._file(task)
            position = address
            while len(view):
                try:
                    count = os.preadv(fd, [view], position)
                except OSError as error:
                    raise PageStoreError(f"page store {self.path(task)}: {error}") from error
                if not count:
                    raise PageStoreError(f"page store {self.path(task)}: shorter than it was made")
                view = view[count:]
                position += count

    def next_data(self, task: int, address: int) -> int:
        """The first address at or above `address` that has content, or ADDRESS_END."""
        self._check(address, PAGE_BYTES, ADDRESS_END)
        with self._in_use():
            fd = self._file(task)
            try:
                return os.lseek(fd, address, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return ADDRESS_END
                raise PageStoreError(f"page store {self.path(task)}: {error}") from error

    def add_task(self, task: int) -> None:
        """Make sure that a task has a file, also when nothing of it was ever written."""
        with self._in_use():
            self._file(task)

    def close(self) -> None:
        """Close the files and keep them; waits for calls under way. Idempotent."""
        with self._condition:
            if self._closed:
                return
            self._closed = True
            while self._using:
                self._condition.wait()
            for fd in self._files.values():
                os.close(fd)
            os.close(self._directory_fd)

    def wipe(self) -> None:
        """Close, and delete everything in the directory and itself. Idempotent."""
        self.close()
        try:
            for entry in list(self.directory.iterdir()):
                entry.unlink()
            self.directory.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            raise PageStoreError(f"page store {self.directory}: not wiped: {error}") from error

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        """Keeps the descriptors from being closed, and their numbers from being given to another
        file, while a system call uses one."""
        with self._condition:
            if self._closed:
                raise PageStoreError(f"page store {self.directory}: is closed")
            self._using += 1
        try:
            yield
        finally:
            with self._condition:
                self._using -= 1
                self._condition.notify_all()

    def _check(self, address: int, bytes_: int, bytes_max: int) -> None:
        if not 0 < bytes_ <= bytes_max or bytes_ % PAGE_BYTES:
            raise PageStoreError(f"{bytes_} bytes are not whole pages, none, or too many")
        if address % PAGE_BYTES or not 0 <= address <= ADDRESS_END - bytes_:
            raise PageStoreError(f"no pages can be at address {address:#x}")

    def _file(self, task: int) -> int:
        # Reading a dict is atomic, and an entry never changes.
        fd = self._files.get(task)
        if fd is not None:
            return fd
        with self._condition:
            return self._open(task)

    def _open(self, task: int) -> int:
        if task in self._files:
            return self._files[task]
        if not 0 < task <= TASK_NUMBER_MAX:
            raise PageStoreError(f"{task} is not a task's number")
        if len(self._files) >= self._tasks_max:
            raise LimitExceededError(f"the container has more than {self._tasks_max} tasks")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(pages_file_name(task), flags, 0o600, dir_fd=self._directory_fd)
        except OSError as error:
            raise PageStoreError(f"page store {self.path(task)}: {error}") from error
        try:
            # CRIU and the pager read any page of it, and a read behind the end fails.
            os.ftruncate(fd, ADDRESS_END)
        except OSError as error:
            os.close(fd)
            raise PageStoreError(
                f"page store {self.path(task)}: {error}; it must be on a tmpfs"
            ) from error
        self._files[task] = fd
        return fd

    def _reserve(self, bytes_: int) -> None:
        with self._condition:
            self._counted_bytes += bytes_
            if self._counted_bytes > self._quota_bytes:
                self._counted_bytes = self._recount()
            if self._counted_bytes > self._quota_bytes:
                raise PageStoreFullError(
                    f"page store {self.directory}: {self._counted_bytes} bytes of memory arrived, "
                    f"{self._quota_bytes} were reserved"
                )

    def _recount(self) -> int:
        return sum(os.fstat(fd).st_blocks for fd in self._files.values()) * _STAT_BLOCK_BYTES
