"""The probe notices what a client would: losses, doubles, disorder, resets, silence."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.probe import Probe, Report, TickProbe, connect, connect_datagrams
from bench.probe_accounting import (
    LISTED_MAX,
    LONG_GAP_MS,
    AnswerError,
    Answers,
    GapMeter,
    HttpAnswers,
    LineAnswers,
    OrderChecker,
    PostgresAnswers,
    RedisAnswers,
    TickAnswers,
)
from bench.probe_process import ROOT, ProbeError, ProbeProcess, start_probe
from tests.bench.fake_server import FakeServer, lines
from tests.lab.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.conftest import StartWorkload

RATE_PER_S = 2000.0


# ---- accounting ----


@given(st.lists(st.integers(1, 6), max_size=8))
def test_order_is_clean_for_the_one_right_sequence_only(numbers: list[int]) -> None:
    order = OrderChecker()
    for number in numbers:
        order.check(number)
    assert order.received == len(numbers)
    assert (order.out_of_order == 0) == (numbers == list(range(1, len(numbers) + 1)))


def test_violations_tell_what_was_expected() -> None:
    order = OrderChecker()
    for number in (1, 2, 4, 5, 5, 6):
        order.check(number)
    assert order.out_of_order == 2
    assert order.violations == [(3, 4), (6, 5)]


def test_ticks_may_be_lost_but_not_late_or_doubled() -> None:
    ticks = TickAnswers()
    ticks.feed(b"3 1\n")
    ticks.feed(b"7 2\n")
    assert ticks.order.out_of_order == 0
    assert ticks.order.is_complete(7)
    assert not ticks.order.is_complete(8)
    for late in (b"7 3\n", b"5 4\n"):
        ticks.feed(late)
    assert ticks.order.violations == [(8, 7), (8, 5)]
    assert ticks.order.doubled == 1


def test_violations_are_counted_beyond_those_listed() -> None:
    order = OrderChecker()
    for _ in range(LISTED_MAX + 10):
        order.check(7)
    assert order.out_of_order == LISTED_MAX + 10
    assert len(order.violations) == LISTED_MAX


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 5)), min_size=2, max_size=50))
def test_gaps(arrivals: list[tuple[float, int]]) -> None:
    meter = GapMeter()
    at_s = 1000.0
    gaps_ms: list[float] = []
    for index, (pause_s, answers) in enumerate(arrivals):
        before_s, at_s = at_s, at_s + pause_s
        meter.arrived(at_s, answers)
        gaps_ms += [(at_s - before_s) * 1e3] * (index > 0) + [0.0] * (answers - 1)
    assert meter.max_ms == max(gaps_ms)
    assert sum(count for _, count in meter.histogram()) == len(gaps_ms)
    assert [length for _, length in meter.long_gaps] == [
        round(gap, 1) for gap in gaps_ms if gap > LONG_GAP_MS
    ]
    exact_ms = sorted(gaps_ms)[-(-len(gaps_ms) * 95 // 100) - 1]
    # Within a bucket, or the width of the first one.
    assert exact_ms * 0.999 <= meter.percentile_ms(0.95) <= max(exact_ms * 1.11, 0.02)


def test_long_gap_is_placed_by_its_beginning() -> None:
    meter = GapMeter()
    for at_s in (5.0, 5.001, 5.251, 5.252):
        meter.arrived(at_s, 1)
    assert meter.long_gaps == [(1.0, 250.0)]


def test_silence_at_the_end_is_a_gap() -> None:
    meter = GapMeter()
    meter.arrived(1.0, 1)
    meter.unanswered(3.0)
    assert meter.max_ms == 2000.0
    assert meter.long_gaps_total == 1


def test_no_answer_at_all_is_no_gap() -> None:
    meter = GapMeter()
    meter.unanswered(3.0)
    assert (meter.max_ms, meter.percentile_ms(0.5), meter.histogram()) == (0.0, 0.0, [])


def fed_in_pieces(answers: Answers, data: bytes, sizes: list[int]) -> int:
    """How many answers these bytes were, in pieces of these sizes and a last one of the rest."""
    fed = 0
    for size in [*sizes, len(data)]:
        fed += answers.feed(data[:size])
        data = data[size:]
    return fed


@given(st.integers(1, 50), st.lists(st.integers(1, 9), max_size=30))
def test_line_answers_in_any_pieces(count: int, sizes: list[int]) -> None:
    answers = LineAnswers()
    data = b"".join(b"%d %d\n" % (number, number * 3) for number in range(1, count + 1))
    assert fed_in_pieces(answers, data, sizes) == answers.order.received == count
    assert answers.order.out_of_order == 0


def test_counter_of_the_server_must_grow() -> None:
    answers = LineAnswers()
    answers.feed(b"1 10\n2 11\n3 5\n4 6\n")
    assert answers.order.out_of_order == 1


@pytest.mark.parametrize("data", [b"ERR unknown\n", b"1\n", b"1 2 3\n", b"\n", b"1" * 300])
def test_garbage_in_lines_is_refused(data: bytes) -> None:
    with pytest.raises(AnswerError):
        LineAnswers().feed(data)


def test_redis_answers() -> None:
    answers = RedisAnswers("key")
    assert answers.request(1) == answers.request(2) == b"*2\r\n$4\r\nINCR\r\n$3\r\nkey\r\n"
    assert answers.feed(b":1\r\n:2\r\n:3") == 2
    assert answers.feed(b"\r\n:5\r\n") == 2
    assert answers.order.violations == [(4, 5)]
    with pytest.raises(AnswerError, match="OOM"):
        answers.feed(b"-OOM command not allowed\r\n")


def page(number: int, status: int = 200, path: str | None = None) -> bytes:
    body = f"{number} {path or f'/{number}'}\n"
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


@given(st.integers(1, 20), st.lists(st.integers(1, 60), max_size=30))
def test_pages_in_any_pieces(count: int, sizes: list[int]) -> None:
    answers = HttpAnswers("dolly")
    assert answers.request(7).startswith(b"GET /7 HTTP/1.1\r\n")
    data = b"".join(map(page, range(1, count + 1)))
    assert fed_in_pieces(answers, data, sizes) == answers.order.received == count
    assert answers.order.out_of_order == 0


def test_a_server_that_was_set_back_gives_itself_away() -> None:
    answers = HttpAnswers("dolly")
    answers.feed(page(1) + page(2) + page(1))
    assert answers.order.violations == [(3, 1)]


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", 4 + len(body)) + body


@given(st.integers(1, 20), st.lists(st.integers(1, 60), max_size=30))
def test_postgres_answers_in_any_pieces(count: int, sizes: list[int]) -> None:
    answers = PostgresAnswers("somebody")
    assert answers.request(1).startswith(b"\0\0\0\x29\0\x03\0\0user\0somebody\0")
    assert answers.request(2) == b"Q\0\0\0\x24SELECT nextval('pg_temp.probe')\0"
    data = message(b"R", b"\0\0\0\0") + message(b"Z", b"I")
    for number in map(str, range(1, count + 1)):
        row = struct.pack("!HI", 1, len(number)) + number.encode()
        data += message(b"T", b"x" * 32) + message(b"D", row) + message(b"C", b"SELECT 1\0")
    assert fed_in_pieces(answers, data, sizes) == answers.order.received == count
    assert answers.order.out_of_order == 0


@pytest.mark.parametrize(
    "data", [message(b"E", b"SFATAL\0"), message(b"D", b"\0\1\0\0\0\1x"), b"HTTP/1.1 400 X"]
)
def test_what_is_no_number_of_postgres_is_refused(data: bytes) -> None:
    with pytest.raises(AnswerError):
        PostgresAnswers("somebody").feed(data)


@pytest.mark.parametrize(
    "data",
    [page(1, 500), page(1, path="/2"), b"x" * 5000, b"HTTP/1.1 200 OK\r\n\r\n", b"1 /1\n\r\n\r\n"],
)
def test_what_is_not_the_page_is_refused(data: bytes) -> None:
    with pytest.raises(AnswerError):
        HttpAnswers("dolly").feed(data)


# ---- the loop ----


def probe_for(server: FakeServer, *, seconds: float | None, drain_s: float = 10.0) -> Report:
    answers: Answers = LineAnswers()
    with connect("127.0.0.1", server.port) as connection:
        probe = Probe(connection, answers, rate_per_s=RATE_PER_S, drain_s=drain_s)
        return probe.run([], seconds)


def answering(edit: Callable[[int], list[int]]) -> Callable[[socket.socket], None]:
    """Serves lines; `edit` says which sequence numbers to answer in place of the one that came."""

    def serve(connection: socket.socket) -> None:
        next_line = lines(connection)
        counter = 0
        while line := next_line():
            for number in edit(int(line)):
                counter += 1
                connection.sendall(b"%d %d\n" % (number, counter))

    return serve


def test_clean_run() -> None:
    with FakeServer(answering(lambda number: [number])) as server:
        report = probe_for(server, seconds=0.2)
    assert report.clean
    assert report.sent == report.received > 100


def test_lost_answer_is_seen() -> None:
    with FakeServer(answering(lambda number: [] if number == 50 else [number])) as server:
        report = probe_for(server, seconds=0.2, drain_s=0.1)
    assert not report.clean
    assert report.received == report.sent - 1
    assert report.violations == [(50, 51)]


def test_doubled_answer_is_seen() -> None:
    with FakeServer(answering(lambda number: [number] * (1 + (number == 50)))) as server:
        report = probe_for(server, seconds=0.2)
    assert not report.clean
    assert report.violations == [(51, 50)]


def test_reordered_answers_are_seen() -> None:
    swapped = {50: [], 51: [51, 50]}
    with FakeServer(answering(lambda number: swapped.get(number, [number]))) as server:
        report = probe_for(server, seconds=0.2)
    assert not report.clean
    assert report.received == report.sent
    assert report.out_of_order == 3


def test_server_that_goes_back_in_time_is_seen() -> None:
    def serve(connection: socket.socket) -> None:
        next_line = lines(connection)
        while line := next_line():
            number = int(line)
            connection.sendall(b"%d %d\n" % (number, number - 20 * (number > 50)))

    with FakeServer(serve) as server:
        report = probe_for(server, seconds=0.2)
    assert report.received == report.sent
    assert report.out_of_order == 1


def ending(how: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """Answers twenty lines, then ends the connection."""

    def serve(connection: socket.socket) -> None:
        next_line = lines(connection)
        for number in range(1, 21):
            next_line()
            connection.sendall(b"%d %d\n" % (number, number))
        how(connection)

    return serve


def reset(connection: socket.socket) -> None:
    # Lingering for no time: close() sends RST.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@pytest.mark.parametrize("how", [reset, lambda connection: None], ids=["reset", "end"])
def test_broken_connection_ends_the_run(how: Callable[[socket.socket], None]) -> None:
    with FakeServer(ending(how)) as server:
        report = probe_for(server, seconds=None)
    assert not report.clean
    assert report.resets == 1
    assert 0 < report.received <= 20
    assert report.error


def test_connection_is_lost_once() -> None:
    """Sending fails first, then the end is read: one reset."""
    own, peer = socket.socketpair()
    own.setblocking(False)
    peer.close()
    report = Probe(own, LineAnswers(), rate_per_s=RATE_PER_S).run([])
    own.close()
    assert report.resets == 1
    assert "sending" in report.error


def test_garbage_ends_the_run() -> None:
    with FakeServer(lambda connection: connection.sendall(b"what?\n")) as server:
        report = probe_for(server, seconds=None)
    assert "what?" in report.error
    assert not report.clean


def test_stops_at_a_descriptor_and_drains() -> None:
    """The server answers nothing until it knows that the probe was told to stop."""
    stop_reader, stop_writer = os.pipe()

    def serve(connection: socket.socket) -> None:
        next_line = lines(connection)
        waiting = [int(next_line()) for _ in range(30)]
        os.write(stop_writer, b"x")
        counter = 0
        while waiting:
            number = waiting.pop(0)
            counter += 1
            connection.sendall(b"%d %d\n" % (number, counter))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting += map(int, connection.recv(65536).split())
            connection.settimeout(20)

    with FakeServer(serve) as server, connect("127.0.0.1", server.port) as connection:
        probe = Probe(connection, LineAnswers(), rate_per_s=RATE_PER_S)
        report = probe.run([stop_reader])
    os.close(stop_reader)
    os.close(stop_writer)
    assert report.received >= 30
    assert report.gap_max_ms >= 0


def test_requests_wait_for_nobody_but_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that reads nothing: the probe goes on, up to its limit."""
    monkeypatch.setattr("bench.probe.UNSENT_BYTES_MAX", 2000)
    left = socket.socketpair()
    left[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    left[0].setblocking(False)

    def clock() -> Iterator[float]:
        now_s = 0.0
        while True:
            yield now_s
            now_s += 0.01

    ticks = clock()
    probe = Probe(
        left[0], LineAnswers(), rate_per_s=RATE_PER_S, drain_s=0.0, clock=lambda: next(ticks)
    )
    report = probe.run([], seconds=5.0)
    assert report.received == 0
    # What the limit and the socket's buffer hold, not the 10000 that were due.
    assert 300 < report.sent < 3000
    for end in left:
        end.close()


LOST, DOUBLED, LAST = range(20, 60), 80, 120


def answer_datagrams(server: socket.socket, stop_writer: int) -> None:
    """Until an empty one; the probe is told to stop with the last one that matters."""
    counter = 0
    while datagram := (heard := server.recvfrom(100))[0]:
        number = int(datagram)
        for _ in range(0 if number in LOST else 1 + (number == DOUBLED)):
            counter += 1
            server.sendto(b"%d %d\n" % (number, counter), heard[1])
        if number == LAST:
            os.write(stop_writer, b"x")


def test_ticks_that_are_lost_break_nothing() -> None:
    stop_reader, stop_writer = os.pipe()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(20)
        thread = threading.Thread(target=answer_datagrams, args=(server, stop_writer))
        thread.start()
        with connect_datagrams(*server.getsockname()) as connection:
            # Slowly enough for the sockets, also when it has to catch up.
            report = TickProbe(connection, TickAnswers(), rate_per_s=500.0).run([stop_reader])
            connection.send(b"")
        thread.join()
    os.close(stop_reader)
    os.close(stop_writer)
    assert report.sent - report.received == len(LOST) - 1
    assert report.violations == [(DOUBLED + 1, DOUBLED)]
    assert (report.resets, report.error) == (0, "")


def test_ticks_to_nobody_are_lost() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        address, port = nobody.getsockname()
    with connect_datagrams(address, port) as connection:
        probe = TickProbe(connection, TickAnswers(), rate_per_s=RATE_PER_S, drain_s=0.05)
        report = probe.run([], 0.1)
    assert report.sent > 0
    assert (report.received, report.resets, report.error) == (0, 0, "")


# ---- as a process ----


def test_process_reports_a_clean_run(start_workload: StartWorkload) -> None:
    memory = start_workload("memory", "PORT", "1", "0")
    with (
        start_probe("lines", "::1", memory.port) as probe,
        start_probe("ticks", "127.0.0.1", memory.port) as ticks,
    ):
        assert probe.alive()
        answers_before = memory.ask("STATS")[0]
        reports = probe.stop(), ticks.stop()
    assert "answers=0" not in answers_before
    for report in reports:
        assert report.clean, report
        assert report.gap_p50_ms <= report.gap_p95_ms <= report.gap_max_ms


def test_process_ends_when_the_server_does(start_workload: StartWorkload) -> None:
    memory = start_workload("memory", "PORT", "1", "0")
    with start_probe("lines", "127.0.0.1", memory.port) as probe:
        memory.process.kill()
        wait_until("the probe gives up", lambda: not probe.alive())
        report = probe.stop()
    assert report.resets == 1
    assert not report.clean


def test_process_that_cannot_connect_says_why() -> None:
    with (
        ProbeProcess("bench.probe", ["lines", "127.0.0.1", "1"]) as probe,
        pytest.raises(ProbeError, match=r"did not connect.*Connection refused"),
    ):
        probe.wait_connected()


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Without a standard input to be stopped by: it ends with its time."""
    command = [sys.executable, "-m", "bench.probe", *arguments]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_program_status_tells_the_outcome(start_workload: StartWorkload) -> None:
    memory = start_workload("memory", "PORT", "1", "0")
    clean = run_program("lines", "127.0.0.1", str(memory.port), "--seconds=0.1")
    assert clean.returncode == 0
    connected, report = clean.stdout.splitlines()
    assert connected == "connected"
    assert Report(**json.loads(report)).clean
    assert run_program("redis", "127.0.0.1", str(memory.port), "--seconds=5").returncode == 1
    assert run_program("lines", "127.0.0.1", "1").returncode == 2
