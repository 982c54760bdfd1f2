"""The client that must not notice: one TCP connection, opened once, never opened again.

    python3 -m bench.probe KIND ADDRESS PORT [--rate N] [--seconds N] [--drain-s N]

Requests go out at a fixed rate without waiting for answers, so that packets are in flight whenever
the container stops. Every answer must be the exact next one. Output: the line "connected" when the
first answer has come, and at the end one line of JSON (`Report`). It ends after a line on standard
input (or its end), SIGTERM or SIGINT; then no more requests are sent and the answers still missing
are awaited for --drain-s. Exit status 0: nothing was lost, reordered, doubled or reset.

KIND is lines, redis, http or postgres; `ticks` are datagrams: what is lost of them stays lost, so
that their gap has no retransmission in it. That breaks nothing, but the report is not clean either.

It runs in a process of its own, so that nothing else delays its clock, and in the network namespace
of a client. `ProbeProcess` (bench/probe_process.py) starts and stops it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import select
import signal
import socket
import stat
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from bench.probe_accounting import (
    AnswerError,
    Answers,
    GapMeter,
    HttpAnswers,
    LineAnswers,
    PostgresAnswers,
    RedisAnswers,
    TickAnswers,
)
from bench.workloads.resp import RespError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KINDS = ("lines", "redis", "http", "postgres", "ticks")
CONNECT_S = 5.0
RATE_PER_S = 1000.0
DRAIN_S = 10.0
"""Longer than a client's retransmission timer backs off to during a downtime of some seconds."""
RECEIVE_BYTES = 64 * 1024
UNSENT_BYTES_MAX = 1024 * 1024
"""Requests that the socket did not take yet; at this limit no new ones are made."""
BURST_S = 0.1
"""A probe that itself was not scheduled makes up for at most so much of its rate."""
IDLE_S = 0.25
STDIN = 0


@dataclass(frozen=True, slots=True)
class Report:
    """What a client noticed. Gaps are times between successive answers, in ms.

    `doubled`: of those out of order; known of `ticks`. `gaps_over_100_ms`: (beginning since the
    first answer, length). `started_monotonic_s`: the first answer's time on the machine's
    CLOCK_MONOTONIC, to relate gaps to the phases of a migration.
    """

    sent: int = 0
    received: int = 0
    out_of_order: int = 0
    doubled: int = 0
    resets: int = 0
    gap_max_ms: float = 0.0
    gap_p50_ms: float = 0.0
    gap_p95_ms: float = 0.0
    gaps_over_100_ms: Sequence[tuple[float, float]] = ()
    gaps_over_100_ms_total: int = 0
    gap_histogram_ms: Sequence[tuple[float, int]] = ()
    violations: Sequence[tuple[int, int]] = field(default=())
    started_monotonic_s: float = 0.0
    duration_s: float = 0.0
    error: str = ""

    @property
    def clean(self) -> bool:
        """Nothing lost, reordered, doubled or reset, and there was something to lose."""
        return (
            self.received == self.sent > 0
            and not self.out_of_order
            and not self.resets
            and not self.error
        )


def connect_datagrams(address: str, port: int) -> socket.socket:
    """A socket that hears nobody else. Raises OSError."""
    connection = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    connection.connect((address, port))
    connection.setblocking(False)
    return connection


def connect(address: str, port: int, deadline_s: float = CONNECT_S) -> socket.socket:
    """The one connection. Raises OSError."""
    connection = socket.create_connection((address, port), timeout=deadline_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)
    return connection


class Probe:
    """Streams requests over a connected non-blocking socket until told to stop."""

    def __init__(
        self,
        connection: socket.socket,
        answers: Answers,
        *,
        rate_per_s: float = RATE_PER_S,
        drain_s: float = DRAIN_S,
        on_connected: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._answers = answers
        self._rate_per_s = rate_per_s
        self._drain_s = drain_s
        self._on_connected = on_connected
        self._clock = clock
        self._gaps = GapMeter()
        self._unsent = bytearray()
        self._sent = 0
        self._resets = 0
        self._error = ""

    def run(self, stop_fds: Sequence[int], seconds: float | None = None) -> Report:
        """Runs until one of the descriptors is readable or the time is over, then drains.

        A connection that fails ends the run at once; the report says so.
        """
        begin_s = next_send_s = self._clock()
        stop_at_s = None if seconds is None else begin_s + seconds
        drain_until_s: float | None = None
        while not self._failed():
            now_s = self._clock()
            if drain_until_s is None and stop_at_s is not None and now_s >= stop_at_s:
                drain_until_s = now_s + self._drain_s
            if drain_until_s is None:
                next_send_s = self._queue_due(now_s, next_send_s)
                wait_s = min(next_send_s - now_s, IDLE_S)
            elif self._answers.order.is_complete(self._sent) or now_s >= drain_until_s:
                break
            else:
                wait_s = min(drain_until_s - now_s, IDLE_S)
            if self._exchange(stop_fds if drain_until_s is None else (), wait_s):
                drain_until_s = self._clock() + self._drain_s
        return self._report(begin_s)

    def _failed(self) -> bool:
        return bool(self._resets or self._error)

    def _queue_due(self, now_s: float, next_send_s: float) -> float:
        """Appends the requests whose time has come; returns when the next one is due."""
        period_s = 1.0 / self._rate_per_s
        next_send_s = max(next_send_s, now_s - BURST_S)
        while next_send_s <= now_s:
            if len(self._unsent) >= UNSENT_BYTES_MAX:
                return now_s + period_s
            self._sent += 1
            self._unsent += self._answers.request(self._sent)
            next_send_s += period_s
        return next_send_s

    def _exchange(self, stop_fds: Sequence[int], wait_s: float) -> bool:
        """Sends and receives what is possible now or within the time; True: asked to stop."""
        if self._unsent:
            self._send()
        writers = [self._connection] if self._unsent else []
        own_fd = self._connection.fileno()
        readable, writable, _ = select.select([own_fd, *stop_fds], writers, [], max(wait_s, 0.0))
        if own_fd in readable:
            self._receive()
        if writable and not self._failed():
            self._send()
        return any(fd in readable for fd in stop_fds)

    def _send(self) -> None:
        try:
            del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lost(f"sending: {error!r}")

    def _receive(self) -> None:
        try:
            data = self._connection.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(f"receiving: {error!r}")
            return
        at_s = self._clock()
        if not data:
            self._lost("the server closed the connection")
            return
        first = self._gaps.first_s is None
        try:
            answered = self._answers.feed(data)
        except (AnswerError, RespError) as error:
            self._error = str(error)
            return
        self._gaps.arrived(at_s, answered)
        if first and answered:
            self._on_connected()

    def _lost(self, error: str) -> None:
        # A connection is lost once: after a failed send come the answers that arrived before, and
        # the same connection's end.
        if not self._resets:
            self._resets = 1
            self._error = error

    def _report(self, begin_s: float) -> Report:
        end_s = self._clock()
        order = self._answers.order
        if not order.is_complete(self._sent):
            self._gaps.unanswered(end_s)
        return Report(
            sent=self._sent,
            received=order.received,
            out_of_order=order.out_of_order,
            doubled=order.doubled,
            resets=self._resets,
            gap_max_ms=round(self._gaps.max_ms, 3),
            gap_p50_ms=round(self._gaps.percentile_ms(0.50), 3),
            gap_p95_ms=round(self._gaps.percentile_ms(0.95), 3),
            gaps_over_100_ms=self._gaps.long_gaps,
            gaps_over_100_ms_total=self._gaps.long_gaps_total,
            gap_histogram_ms=self._gaps.histogram(),
            violations=order.violations,
            started_monotonic_s=self._gaps.first_s or 0.0,
            duration_s=round(end_s - begin_s, 3),
            error=self._error,
        )


class TickProbe(Probe):
    """The same with a datagram for each request, whatever becomes of it."""

    def _send(self) -> None:
        for request in self._unsent.splitlines(keepends=True):
            # Refused while nobody has the port; no room in the socket.
            with contextlib.suppress(OSError):
                self._connection.send(request)
        self._unsent.clear()

    def _lost(self, error: str) -> None:
        """There is no connection that could break."""


def answers_for(kind: str) -> Answers:
    """The wire format of a workload; "lines" for all that have none of their own."""
    if kind == "lines":
        return LineAnswers()
    if kind == "postgres":
        return PostgresAnswers("postgres")
    if kind == "ticks":
        return TickAnswers()
    if kind == "http":
        return HttpAnswers("dolly")
    # A key of its own: the first answer is 1 whatever ran before on the same server.
    return RedisAnswers(f"probe:{secrets.token_hex(8)}")


def stop_descriptors() -> list[int]:
    """Descriptors that become readable when this process is told to stop: stdin and signals."""
    reader, writer = os.pipe()

    def tell(*_: object) -> None:
        os.write(writer, b"x")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)
    kind = os.fstat(STDIN).st_mode
    # /dev/null is always at its end: a probe started with it is stopped by signal or time.
    watch_stdin = stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(STDIN)
    return [reader, STDIN] if watch_stdin else [reader]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 when the client noticed nothing, 1 otherwise, 2 when it could not connect."""
    parser = argparse.ArgumentParser(prog="bench.probe", description=__doc__.split("\n\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--rate", type=float, default=RATE_PER_S, help="requests per second")
    parser.add_argument("--seconds", type=float, default=None)
    parser.add_argument("--drain-s", type=float, default=DRAIN_S)
    options = parser.parse_args(arguments)
    stop_fds = stop_descriptors()
    is_ticks = options.kind == "ticks"
    try:
        connection = (connect_datagrams if is_ticks else connect)(options.address, options.port)
    except OSError as error:
        print(json.dumps(asdict(Report(error=f"connecting: {error!r}"))), flush=True)
        return 2
    with connection:
        probe = (TickProbe if is_ticks else Probe)(
            connection,
            answers_for(options.kind),
            rate_per_s=options.rate,
            drain_s=options.drain_s,
            on_connected=lambda: print("connected", flush=True),
        )
        report = probe.run(stop_fds, options.seconds)
    print(json.dumps(asdict(report)), flush=True)
    return 0 if report.clean else 1


if __name__ == "__main__":
    sys.exit(main())
