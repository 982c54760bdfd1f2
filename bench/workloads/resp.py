"""The RESP2 wire format of Redis: bytes in, replies out. Knows no socket.

A request is an array of bulk strings; a reply starts with its kind::

    *2\\r\\n $3\\r\\nGET\\r\\n $1\\r\\nk\\r\\n       request
    +OK\\r\\n   -ERR text\\r\\n   :42\\r\\n         simple string, error, integer
    $3\\r\\nabc\\r\\n   $-1\\r\\n                  bulk string, null
    *2\\r\\n <reply> <reply>                  array

Source: https://redis.io/docs/latest/develop/reference/protocol-spec/. Written here rather than
taken from a client library because those hide what the probe is about: one connection that is never
reopened, and when the bytes of each answer arrived.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TypeAlias

LINE_BYTES_MAX = 64 * 1024
"""Redis' own limit on an inline line (`server.h: PROTO_INLINE_MAX_SIZE`)."""
BULK_BYTES_MAX = 64 * 1024 * 1024
"""Far above every value that the workloads store; a greater length is a broken stream."""
ARRAY_ITEMS_MAX = 1_000_000
DEPTH_MAX = 8
"""No command in use nests arrays more than twice."""
_NUMBER = re.compile(rb"[+-]?[0-9]{1,19}")


class RespError(Exception):
    """The bytes are not RESP2, or exceed a limit; the stream cannot be read any further."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """Redis answered a command with an error; the stream goes on."""

    message: str


Reply: TypeAlias = "bytes | str | int | ErrorReply | list[Reply] | None"
"""bulk string, simple string, integer, error, array, null."""


class _IncompleteError(Exception):
    """The buffer ends inside a reply."""


def encode(*words: bytes | str | int) -> bytes:
    """One request. Strings are encoded as UTF-8, numbers as decimal."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        raw = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%s\r\n" % (len(raw), raw))
    return b"".join(parts)


class Decoder:
    """Cuts a stream of bytes, in whatever pieces it arrives, into replies."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._missing = 0

    def feed(self, data: bytes | memoryview) -> list[Reply]:
        """The replies completed by these bytes, in order. Raises RespError.

        The unfinished rest is kept: at most one reply, whose size BULK_BYTES_MAX and
        ARRAY_ITEMS_MAX bound.
        """
        self._buffer += data
        self._missing -= len(data)
        replies: list[Reply] = []
        if self._missing > 0:
            return replies  # inside a long bulk string: parsing again would be quadratic
        at = 0
        while at < len(self._buffer):
            try:
                reply, at = self._parse(at, 0)
            except _IncompleteError:
                break
            replies.append(reply)
        del self._buffer[:at]
        return replies

    @property
    def pending_bytes(self) -> int:
        """Bytes of a reply that has not arrived whole."""
        return len(self._buffer)

    def _line(self, at: int) -> tuple[bytes, int]:
        end = self._buffer.find(b"\r\n", at, at + LINE_BYTES_MAX + 2)
        if end < 0:
            if len(self._buffer) - at > LINE_BYTES_MAX:
                raise RespError(f"a line longer than {LINE_BYTES_MAX} bytes")
            raise _IncompleteError
        return bytes(self._buffer[at:end]), end + 2

    def _parse(self, at: int, depth: int) -> tuple[Reply, int]:
        line, after = self._line(at)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest.decode("utf-8", "replace"), after
        if kind == b"-":
            return ErrorReply(rest.decode("utf-8", "replace")), after
        if kind == b":":
            return _number(rest), after
        if kind == b"$":
            return self._bulk(_number(rest), after)
        if kind == b"*":
            return self._array(_number(rest), after, depth)
        raise RespError(f"a reply of unknown kind {line[:32]!r}")

    def _bulk(self, length: int, at: int) -> tuple[bytes | None, int]:
        if length == -1:
            return None, at
        if not 0 <= length <= BULK_BYTES_MAX:
            raise RespError(f"a bulk string of {length} bytes")
        end = at + length
        if len(self._buffer) < end + 2:
            self._missing = end + 2 - len(self._buffer)
            raise _IncompleteError
        if self._buffer[end : end + 2] != b"\r\n":
            raise RespError("a bulk string is longer than its length says")
        return bytes(self._buffer[at:end]), end + 2

    def _array(self, items: int, at: int, depth: int) -> tuple[Reply, int]:
        if items == -1:
            return None, at
        if not 0 <= items <= ARRAY_ITEMS_MAX or depth >= DEPTH_MAX:
            raise RespError(f"an array of {items} items at depth {depth}")
        replies: list[Reply] = []
        for _ in range(items):
            reply, at = self._parse(at, depth + 1)
            replies.append(reply)
        return replies, at


def _number(digits: bytes) -> int:
    """Stricter than int(), which takes spaces and underscores too."""
    if not _NUMBER.fullmatch(digits):
        raise RespError(f"not a number: {digits[:32]!r}")
    return int(digits)
