"""What a probe makes of the answers: their order, and the gaps between them. Pure.

Some wire formats are known. In each the n-th answer on a connection must carry exactly n::

    lines (bench/workloads/line_server.h)   "17\\n"               ->  "17 90210\\n"
    ticks (the same in datagrams)           one may be lost; late or twice is out of order
    redis                                   INCR probe:<unique>   ->  ":17\\r\\n"
    http (nginx, bench/workloads/web.py)    GET /17 HTTP/1.1      ->  200, body "17 /17\\n"
    postgres                                nextval of a sequence ->  17

The second number of the first format counts the answers of the whole server; it must grow. A server
that was restarted, or that went back to an earlier state, gives itself away there.

Memory stays bounded however long a probe runs: gaps are counted in buckets, only the first
LISTED_MAX long gaps and violations are kept one by one.
"""

from __future__ import annotations

import math
import re
import struct
from typing import Protocol

from bench.workloads.resp import Decoder, encode

LONG_GAP_MS = 100.0
"""Gaps above this are listed one by one: far above a scheduler's hiccup, below a retransmission."""
LISTED_MAX = 1000
TICKS_MAX = 10_000_000
"""Datagrams of one probe, a byte each: hours."""
LINE_BYTES_MAX = 256
HEAD_BYTES_MAX = 4096
"""Ten times what both servers send."""
CONTENT_LENGTH = re.compile(rb"^content-length: *([0-9]{1,9})\r?$", re.IGNORECASE | re.MULTILINE)
BUCKET_LOW_MS = 0.01
BUCKET_GROWTH = 1.1
"""Each bucket ends 10 % above its beginning: the error bound of a reported percentile."""
BUCKETS = 200
"""0.01 ms × 1.1**200 is half an hour; everything longer is counted in the last one."""


class AnswerError(Exception):
    """The server sent something that is no answer; the stream cannot be followed any further."""


class OrderChecker:
    """Every number must be its predecessor plus one, beginning with one."""

    def __init__(self) -> None:
        self.received = 0
        self.out_of_order = 0
        self.doubled = 0
        self.violations: list[tuple[int, int]] = []
        self._next = 1

    def check(self, number: int) -> None:
        """Counts an answer. After a violation the order is taken up from the number that came."""
        self.received += 1
        if number != self._next:
            self.violate(number)
        self._next = number + 1

    def violate(self, number: int) -> None:
        self.out_of_order += 1
        if len(self.violations) < LISTED_MAX:
            self.violations.append((self._next, number))

    def is_complete(self, sent: int) -> bool:
        """Whether no answer to so many requests is to be waited for."""
        return self.received >= sent


class LossyOrder(OrderChecker):
    """Every number must be greater than its predecessor; those that are not come late or again."""

    def __init__(self) -> None:
        super().__init__()
        self._seen = bytearray()

    def check(self, number: int) -> None:
        self.received += 1
        if number >= TICKS_MAX:
            raise AnswerError(f"nobody asked for {number}")
        self._seen.extend(bytes(max(0, number + 1 - len(self._seen))))
        self.doubled += self._seen[number]
        self._seen[number] = 1
        if number < self._next:
            self.violate(number)
        self._next = max(self._next, number + 1)

    def is_complete(self, sent: int) -> bool:
        """Whether the last one is answered: what is missing before it is lost."""
        return self._next > sent


class Answers(Protocol):
    """One wire format."""

    order: OrderChecker

    def request(self, number: int) -> bytes: ...

    def feed(self, data: bytes) -> int:
        """Checks the answers that these bytes complete and returns how many. Raises AnswerError."""


class LineAnswers:
    """The line protocol of bench/workloads/line_server.h."""

    def __init__(self) -> None:
        self.order: OrderChecker = OrderChecker()
        self._rest = b""
        self._counter = 0

    def request(self, number: int) -> bytes:
        return b"%d\n" % number

    def feed(self, data: bytes) -> int:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            raise AnswerError(f"an answer longer than {LINE_BYTES_MAX} bytes: {self._rest[:40]!r}")
        for line in lines:
            try:
                number, counter = map(int, line.split(b" "))
            except ValueError:
                raise AnswerError(f"not an answer: {line[:40]!r}") from None
            self.order.check(number)
            if counter <= self._counter:
                self.order.violate(number)
            self._counter = counter
        return len(lines)


class TickAnswers(LineAnswers):
    """The same in datagrams."""

    def __init__(self) -> None:
        super().__init__()
        self.order = LossyOrder()


class RedisAnswers:
    """INCR of a key that only this probe uses."""

    def __init__(self, key: str) -> None:
        self.order = OrderChecker()
        self._request = encode("INCR", key)
        self._decoder = Decoder()

    def request(self, number: int) -> bytes:
        del number  # the server counts
        return self._request

    def feed(self, data: bytes) -> int:
        replies = self._decoder.feed(data)
        for reply in replies:
            if not isinstance(reply, int):
                raise AnswerError(f"not an answer to INCR: {reply!r:.80}")
            self.order.check(reply)
        return len(replies)


class HttpAnswers:
    """Requests that are pipelined on a connection which is kept, each for a page of its number."""

    def __init__(self, host: str) -> None:
        self.order = OrderChecker()
        self._host = host
        self._rest = b""

    def request(self, number: int) -> bytes:
        return f"GET /{number} HTTP/1.1\r\nHost: {self._host}\r\n\r\n".encode()

    def feed(self, data: bytes) -> int:
        self._rest += data
        answered = 0
        while (body := self._take()) is not None:
            number, _, path = body.partition(b" ")
            if not number.isdigit() or path != b"/%s\n" % number:
                raise AnswerError(f"not the page that was asked for: {body[:40]!r}")
            self.order.check(int(number))
            answered += 1
        return answered

    def _take(self) -> bytes | None:
        """The body of the next answer, if all of that is here."""
        head, found, rest = self._rest.partition(b"\r\n\r\n")
        if len(head) > HEAD_BYTES_MAX:
            raise AnswerError(f"a head of {len(head)} bytes: {head[:40]!r}")
        if not found:
            return None
        length = CONTENT_LENGTH.search(head)
        if not head.startswith(b"HTTP/1.1 200 ") or length is None:
            raise AnswerError(f"not an answer: {head[:80]!r}")
        size = int(length[1])
        if size > LINE_BYTES_MAX:
            raise AnswerError(f"a page of {size} bytes")
        if len(rest) < size:
            return None
        self._rest = rest[size:]
        return rest[:size]


class PostgresAnswers:
    """The next number of a sequence that lives as long as this connection, by simple queries.

    A message is a type, its length with that (u32, big-endian), and a body; the first that a client
    sends has no type. Source: PostgreSQL's documentation, "Message Formats" of protocol 3.0.
    """

    def __init__(self, user: str) -> None:
        self.order = OrderChecker()
        names = f"user\0{user}\0database\0{user}\0\0".encode()
        self._greeting = struct.pack("!II", 8 + len(names), 3 << 16) + names
        self._rest = b""

    def request(self, number: int) -> bytes:
        asked = _query("SELECT nextval('pg_temp.probe')")
        if number > 1:
            return asked
        return self._greeting + _query("CREATE TEMPORARY SEQUENCE probe") + asked

    def feed(self, data: bytes) -> int:
        self._rest += data
        answered = 0
        while (message := self._take()) is not None:
            kind, body = message
            if kind == b"E":
                raise AnswerError(f"the server says {body[:200]!r}")
            if kind == b"D":
                # One column: how many there are (u16), its length (u32), its text.
                text = body[6:]
                if not text.isdigit():
                    raise AnswerError(f"not a number: {body[:40]!r}")
                self.order.check(int(text))
                answered += 1
        return answered

    def _take(self) -> tuple[bytes, bytes] | None:
        """Type and body of the next message, if all of it is here."""
        if len(self._rest) < 5:
            return None
        end = 1 + int.from_bytes(self._rest[1:5], "big")
        if not 5 <= end <= HEAD_BYTES_MAX:
            raise AnswerError(f"a message of {end} bytes: {self._rest[:40]!r}")
        if len(self._rest) < end:
            return None
        kind, body, self._rest = self._rest[:1], self._rest[5:end], self._rest[end:]
        return kind, body


def _query(text: str) -> bytes:
    return b"Q" + struct.pack("!I", 5 + len(text)) + text.encode() + b"\0"


class GapMeter:
    """The times between successive answers."""

    def __init__(self) -> None:
        self.max_ms = 0.0
        self.long_gaps: list[tuple[float, float]] = []
        self.long_gaps_total = 0
        self._buckets = [0] * BUCKETS
        self._first_s: float | None = None
        self._last_s = 0.0

    @property
    def first_s(self) -> float | None:
        """When the first answer came, on the clock that `arrived` was told."""
        return self._first_s

    def arrived(self, at_s: float, answers: int) -> None:
        """So many answers came at once. Times must not fall."""
        if answers <= 0:
            return
        if self._first_s is None:
            self._first_s = at_s
        else:
            self._count((at_s - self._last_s) * 1e3)
        self._buckets[0] += answers - 1
        self._last_s = at_s

    def unanswered(self, at_s: float) -> None:
        """Answers are still missing at the end: the silence until now is a gap too."""
        if self._first_s is not None:
            self._count((at_s - self._last_s) * 1e3)
            self._last_s = at_s

    def _count(self, gap_ms: float) -> None:
        self.max_ms = max(self.max_ms, gap_ms)
        self._buckets[_bucket(gap_ms)] += 1
        if gap_ms > LONG_GAP_MS:
            self.long_gaps_total += 1
            if len(self.long_gaps) < LISTED_MAX:
                since_first_ms = (self._last_s - (self._first_s or 0.0)) * 1e3
                self.long_gaps.append((round(since_first_ms, 1), round(gap_ms, 1)))

    def percentile_ms(self, share: float) -> float:
        """The upper end of the bucket in which that share (0..1) of all gaps is reached."""
        wanted = math.ceil(sum(self._buckets) * share)
        reached = 0
        for index, count in enumerate(self._buckets):
            reached += count
            if count and reached >= wanted:
                return min(_bucket_end_ms(index), self.max_ms)
        return 0.0

    def histogram(self) -> list[tuple[float, int]]:
        """(upper end in ms, gaps) of every bucket that is not empty."""
        return [
            (round(_bucket_end_ms(index), 4), count)
            for index, count in enumerate(self._buckets)
            if count
        ]


def _bucket(gap_ms: float) -> int:
    if gap_ms <= BUCKET_LOW_MS:
        return 0
    return min(BUCKETS - 1, math.ceil(math.log(gap_ms / BUCKET_LOW_MS, BUCKET_GROWTH)))


def _bucket_end_ms(index: int) -> float:
    return BUCKET_LOW_MS * BUCKET_GROWTH**index
