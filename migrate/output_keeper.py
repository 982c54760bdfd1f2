"""Keeps what a container writes to a pipe, where its runtime's own reader stayed on the source.

    python3 -ISE output_keeper.py FILE        reads standard input until the container ends

A pipe without a reader would kill the container's next write. Run by path and free of imports of
this project: it lives as long as the container. FILE and FILE.1 together hold the last
`KEPT_BYTES` at least, and never more than twice that.
"""

from __future__ import annotations

import os
import sys

KEPT_BYTES = 8 << 20
CHUNK_BYTES = 64 * 1024


def main(path: str) -> None:
    """Copy standard input to the file, which is turned over when it is full."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    size_bytes = os.fstat(log).st_size
    while data := os.read(0, CHUNK_BYTES):
        if size_bytes + len(data) > KEPT_BYTES:
            os.close(log)
            os.replace(path, f"{path}.1")  # noqa: PTH105  (no imports that cost memory for years)
            log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            size_bytes = 0
        try:
            size_bytes += os.write(log, data)
        except OSError:
            # A full disk must not stop the container: what does not fit is lost.
            continue


if __name__ == "__main__":
    main(sys.argv[1])
