"""The content of the Redis workload, against a server that is as simple as can be."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING

import pytest

from bench.probe_process import ProbeProcess
from bench.workloads import redis_writer
from bench.workloads.redis_data import (
    DataSet,
    RedisConnection,
    RedisWorkloadError,
    Versions,
    fill,
    key,
    main,
    verify,
)
from bench.workloads.resp import Decoder
from tests.bench.fake_server import FakeServer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

DATA = DataSet(mib=1)


class FakeRedis:
    """SET and MGET; tests/lab holds the real one to the same."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def serve(self, connection: socket.socket) -> None:
        decoder = Decoder()
        while data := connection.recv(65536):
            answers = [self.answer(request) for request in decoder.feed(data)]
            connection.sendall(b"".join(answers))

    def answer(self, request: object) -> bytes:
        assert isinstance(request, list)
        command, *words = request
        if command == b"SET":
            self.values[words[0]] = words[1]
            return b"+OK\r\n"
        if command == b"MGET":
            found = (self.values.get(word) for word in words)
            bulks = (b"$-1\r\n" if v is None else b"$%d\r\n%s\r\n" % (len(v), v) for v in found)
            return b"*%d\r\n" % len(words) + b"".join(bulks)
        return b"-ERR unknown command\r\n"


@pytest.fixture
def redis() -> FakeRedis:
    return FakeRedis()


def with_connection(redis: FakeRedis, act: Callable[[RedisConnection], None]) -> None:
    with FakeServer(redis.serve) as server, RedisConnection("127.0.0.1", server.port) as connection:
        act(connection)


def fault_of(redis: FakeRedis, versions: Versions | None = None) -> str:
    """What verify finds first, "" when all is right."""
    found: list[str] = []

    def look(connection: RedisConnection) -> None:
        verdict = verify(connection, DATA, versions)
        assert verdict.keys == DATA.keys == 256
        assert bool(verdict.bad) == bool(verdict.first_bad)
        assert verdict.ok == (not verdict.bad)
        found.append(verdict.first_bad)

    with_connection(redis, look)
    return found[0]


def test_fill_stores_all_keys_and_verify_agrees(redis: FakeRedis) -> None:
    with_connection(redis, lambda connection: fill(connection, DATA))
    assert len(redis.values) == 256
    assert {len(value) for value in redis.values.values()} == {4096}
    assert len(set(redis.values.values())) == 256
    assert fault_of(redis) == ""


def test_values_compress_as_asked() -> None:
    ratios = [len(zlib.compress(DATA.value(index, 3))) / 4096 for index in range(100)]
    assert all(ratio < 0.6 for ratio in ratios[:30])
    assert all(ratio > 0.99 for ratio in ratios[30:])


@pytest.mark.parametrize("index", [5, 95], ids=["text", "random"])
def test_every_way_to_be_wrong_is_seen(redis: FakeRedis, index: int) -> None:
    with_connection(redis, lambda connection: fill(connection, DATA))
    name = key(index)
    good = redis.values[name]
    wrong = {
        good[:-1] + bytes([good[-1] ^ 1]): "content of version 0 is wrong",
        good[:-1]: "is not a value: 4095 bytes",
        DATA.value(index + 1, 0): "content of version 0 is wrong",
        DATA.value(index, 1): "has version 1, must be 0 to 0",
        b"": "is not a value: 0 bytes",
    }
    for value, fault in wrong.items():
        redis.values[name] = value
        assert fault_of(redis).startswith(f"{name.decode()}: {fault}")
    del redis.values[name]
    assert fault_of(redis) == f"{name.decode()}: holds None"


@pytest.mark.parametrize(
    ("version", "fine"), [(2, False), (3, True), (4, True), (5, True), (6, False)]
)
def test_write_without_answer_may_have_been_done_or_not(
    redis: FakeRedis, version: int, fine: bool
) -> None:
    with_connection(redis, lambda connection: fill(connection, DATA))
    versions = Versions(DATA.keys)
    versions.acknowledged[9], versions.sent[9] = 3, 5
    redis.values[key(9)] = DATA.value(9, version)
    assert (fault_of(redis, versions) == "") == fine


def test_writer_knows_what_was_acknowledged(redis: FakeRedis, tmp_path: Path) -> None:
    with_connection(redis, lambda connection: fill(connection, DATA))
    path = tmp_path / "versions"
    with FakeServer(redis.serve) as server:
        where = ["127.0.0.1", str(server.port), "--mib=1", f"--versions={path}"]
        arguments = [*where, "--hot-keys=10", "--rate-mib-s=4"]
        with ProbeProcess("bench.workloads.redis_writer", arguments) as writer:
            writer.wait_connected()
            report = writer.stop()
    versions = Versions.load(path)
    assert report.clean, report
    assert report.received == versions.acknowledged.sum() == versions.sent.sum()
    assert versions.sent[10:].sum() == 0
    assert fault_of(redis, versions) == ""
    assert fault_of(redis).endswith("must be 0 to 0")


def test_program_verifies(
    redis: FakeRedis, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    versions = Versions(DATA.keys)
    versions.sent[3] = versions.acknowledged[3] = 1
    versions.save(tmp_path / "versions")

    def run(act: str, *options: str) -> tuple[int, dict[str, object]]:
        with FakeServer(redis.serve) as server:
            status = main([act, "127.0.0.1", str(server.port), "--mib=1", *options])
        answer: dict[str, object] = json.loads(capsys.readouterr().out)
        return status, answer

    assert run("fill") == (0, {"keys": 256, "ok": True})
    redis.values[key(3)] = DATA.value(3, 1)
    status, verdict = run("verify", f"--versions={tmp_path / 'versions'}")
    assert (status, verdict["ok"], verdict["bad"]) == (0, True, 0)
    status, verdict = run("verify")
    assert (status, verdict["ok"], verdict["bad"]) == (1, False, 1)
    assert verdict["first_bad"] == "fill:00000003: has version 1, must be 0 to 0"


def test_writer_leaves_unanswered_writes_open() -> None:
    writes = redis_writer.Writes(DATA, hot_keys=1)
    for number in range(1, 4):
        writes.request(number)
    assert writes.feed(b"+OK\r\n") == 1
    assert (writes.versions.acknowledged[0], writes.versions.sent[0]) == (1, 3)
    with pytest.raises(Exception, match="not the answer to a SET: ErrorReply"):
        writes.feed(b"-READONLY\r\n")


def test_refusal_of_redis_is_an_error(redis: FakeRedis) -> None:
    def act(connection: RedisConnection) -> None:
        with pytest.raises(RedisWorkloadError, match="ERR unknown command"):
            connection.command("FLUSHALL")

    with_connection(redis, act)


def test_broken_connection_is_an_error() -> None:
    with (
        FakeServer(lambda connection: None) as server,
        RedisConnection("127.0.0.1", server.port) as connection,
        pytest.raises(RedisWorkloadError, match=r"redis at 127\.0\.0\.1 port \d+"),
    ):
        connection.command("PING")
    with pytest.raises(RedisWorkloadError, match=r"port 1: "):
        RedisConnection("127.0.0.1", 1)
