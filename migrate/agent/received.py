"""What arrives for one session: pages and image files, written into lent directories.

The sink of the session's data streams, in the agent's front. Its quota is the front's own; what
holds for certain is the size of the file system that the directories are on.
"""

from __future__ import annotations

import errno
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from criu_glue.errors import CriuGlueError, LimitExceededError
from criu_glue.images import ImageWriter
from criu_glue.page_store import PageStore, PageStoreFullError
from transport.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transport.inbound import Session


class Received:
    """A PageSink. `memory`, `images` and `kept` are descriptors of directories, the caller's."""

    def __init__(self, memory: int, images: int, kept: int, *, quota_bytes: int) -> None:
        """Raises OSError, CriuGlueError."""
        with ExitStack() as undo:
            self._store = PageStore(Path("mem"), quota_bytes=quota_bytes, within=memory)
            undo.callback(self._store.close)
            self._images = ImageWriter(Path("img"), quota_bytes=quota_bytes, within=images)
            undo.callback(self._images.close)
            self._ledger = Ledger(kept)
            undo.callback(self._ledger.close)
            self._undo = undo.pop_all()

    def session(self) -> Session:
        """The session's streams, as far as a front before this one has come with them."""
        return self._ledger.session()

    def write(self, task: int, address: int, data: memoryview) -> None:
        """Pages from a data stream. Raises OSError of ENOSPC when there is no room."""
        with _no_room():
            self._store.write(task, address, data)

    def zero(self, task: int, address: int, pages: int) -> None:
        """Zero pages from a data stream."""
        self._store.zero(task, address, pages)

    def write_file(self, name: str, offset: int, data: memoryview) -> None:
        """A part of an image file from a data stream. Raises OSError of ENOSPC, too."""
        with _no_room():
            self._images.write_file(name, offset, data)

    def close(self) -> None:
        """Nothing is open for writing any more. Idempotent."""
        self._undo.close()


@contextmanager
def _no_room() -> Iterator[None]:
    """A tmpfs or a quota that is full, in the words of the data streams' sinks."""
    try:
        yield
    except CriuGlueError as error:
        cause = error.__cause__
        is_full = isinstance(cause, OSError) and cause.errno == errno.ENOSPC
        if is_full or isinstance(error, (PageStoreFullError, LimitExceededError)):
            raise OSError(errno.ENOSPC, str(error)) from error
        raise
