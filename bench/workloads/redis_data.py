"""What a Redis workload holds: content derived from the key, loaded fast, read back and compared.

    python3 -m bench.workloads.redis_data fill ADDRESS PORT [--mib N] [--text PERCENT]
    python3 -m bench.workloads.redis_data verify ADDRESS PORT [the same] [--versions FILE]

Each prints one line of JSON; exit status 0 when all is right.

A value is its header and then bytes that follow from the header::

    "<index: 8 digits> <version: 10 digits> " + SHAKE-128(header)   or its hexadecimal digits

so a value that is missing, torn, stale or another key's is seen. The given percentage of the keys
holds hexadecimal digits (compressible to a half), the others do not compress at all.
`redis_writer` rewrites keys with growing versions and says which were acknowledged.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from bench.workloads.resp import Decoder, ErrorReply, Reply, RespError, encode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import TracebackType

    import numpy.typing as npt

MIB = 1024 * 1024
HEADER_BYTES = 20
BATCH_KEYS = 64
"""256 KiB of values at 4 KiB: enough to keep the link busy, little to hold."""
BATCHES_AHEAD = 4
STALL_S = 60.0
"""No answer for so long ends the work; far longer than the downtime of any migration."""


class RedisWorkloadError(Exception):
    """Redis could not be reached, broke the connection, or refused a command."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """Which keys there are and what they hold."""

    mib: int = 256
    value_bytes: int = 4096
    text_percent: int = 30

    def __post_init__(self) -> None:
        if self.value_bytes <= HEADER_BYTES or not 0 <= self.text_percent <= 100 or self.mib < 1:
            raise ValueError(f"not a data set: {self}")

    @property
    def keys(self) -> int:
        return self.mib * MIB // self.value_bytes

    def value(self, index: int, version: int) -> bytes:
        header = b"%08d %010d " % (index, version)
        rest_bytes = self.value_bytes - HEADER_BYTES
        stream = hashlib.shake_128(header)
        if index % 100 < self.text_percent:
            return header + stream.hexdigest((rest_bytes + 1) // 2)[:rest_bytes].encode()
        return header + stream.digest(rest_bytes)


def key(index: int) -> bytes:
    return b"fill:%08d" % index


class Versions:
    """Per key: the last version that Redis acknowledged, and the last one that was sent to it."""

    def __init__(self, keys: int) -> None:
        self.acknowledged: npt.NDArray[np.uint32] = np.zeros(keys, dtype=np.uint32)
        self.sent: npt.NDArray[np.uint32] = np.zeros(keys, dtype=np.uint32)

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, acknowledged=self.acknowledged, sent=self.sent)

    @classmethod
    def load(cls, path: Path) -> Versions:
        with np.load(path, allow_pickle=False) as saved:
            versions = cls(0)
            versions.acknowledged, versions.sent = saved["acknowledged"], saved["sent"]
        return versions


@dataclass(frozen=True, slots=True)
class Verdict:
    """`bad` counts keys whose value is wrong in any way; the first of them is described."""

    keys: int
    bytes_read: int
    bad: int
    first_bad: str

    @property
    def ok(self) -> bool:
        return not self.bad


class RedisConnection:
    """A blocking connection for bulk work. Raises RedisWorkloadError from every method."""

    def __init__(self, address: str, port: int, stall_s: float = STALL_S) -> None:
        self._where = f"redis at {address} port {port}"
        self._decoder = Decoder()
        self._replies: list[Reply] = []
        try:
            self._socket = socket.create_connection((address, port), timeout=stall_s)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise RedisWorkloadError(f"{self._where}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, requests: Iterable[bytes]) -> None:
        try:
            self._socket.sendall(b"".join(requests))
        except OSError as error:
            raise RedisWorkloadError(f"{self._where}: {error}") from error

    def replies(self, count: int) -> list[Reply]:
        """Waits for so many replies; an error reply is raised."""
        try:
            while len(self._replies) < count:
                data = self._socket.recv(256 * 1024)
                if not data:
                    raise RedisWorkloadError(f"{self._where} closed the connection")
                self._replies += self._decoder.feed(data)
        except (OSError, RespError) as error:
            raise RedisWorkloadError(f"{self._where}: {error}") from error
        taken, self._replies = self._replies[:count], self._replies[count:]
        for reply in taken:
            if isinstance(reply, ErrorReply):
                raise RedisWorkloadError(f"{self._where}: {reply.message}")
        return taken

    def command(self, *words: bytes | str | int) -> Reply:
        """One request and its reply."""
        self.send([encode(*words)])
        return self.replies(1)[0]


def fill(connection: RedisConnection, data: DataSet) -> None:
    """Stores version 0 of every key, pipelined."""
    waiting: list[int] = []
    for batch in _batches(data.keys):
        connection.send(encode("SET", key(i), data.value(i, 0)) for i in batch)
        waiting.append(len(batch))
        if len(waiting) > BATCHES_AHEAD:
            connection.replies(waiting.pop(0))
    connection.replies(sum(waiting))


def verify(connection: RedisConnection, data: DataSet, versions: Versions | None = None) -> Verdict:
    """Reads every key and compares every byte. Without versions, all must be version 0."""
    versions = versions or Versions(data.keys)
    bytes_read = bad = 0
    first_bad = ""
    for batch in _batches(data.keys):
        values = connection.command("MGET", *(key(i) for i in batch))
        if not isinstance(values, list) or len(values) != len(batch):
            raise RedisWorkloadError(f"MGET of {len(batch)} keys answered {values!r:.80}")
        for index, value in zip(batch, values, strict=True):
            fault = _fault(data, versions, index, value)
            bytes_read += len(value) if isinstance(value, bytes) else 0
            if fault:
                bad += 1
                first_bad = first_bad or f"{key(index).decode()}: {fault}"
    return Verdict(data.keys, bytes_read, bad, first_bad)


def _fault(data: DataSet, versions: Versions, index: int, value: Reply) -> str:
    """What is wrong with a value, or "". A write that was sent may have been done or not."""
    if not isinstance(value, bytes):
        return f"holds {value!r:.80}"
    number = value[9:19]
    if len(value) != data.value_bytes or not number.isdigit():
        return f"is not a value: {len(value)} bytes, {value[:24]!r}"
    version = int(number)
    low, high = int(versions.acknowledged[index]), int(versions.sent[index])
    if not low <= version <= high:
        return f"has version {version}, must be {low} to {high}"
    return "" if value == data.value(index, version) else f"content of version {version} is wrong"


def _batches(keys: int) -> Iterator[range]:
    for begin in range(0, keys, BATCH_KEYS):
        yield range(begin, min(begin + BATCH_KEYS, keys))


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that name a data set, the same for every program that uses one."""
    defaults = DataSet()
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("--mib", type=int, default=defaults.mib)
    parser.add_argument("--value-bytes", type=int, default=defaults.value_bytes)
    parser.add_argument("--text", type=int, default=defaults.text_percent, metavar="PERCENT")


def data_from(options: argparse.Namespace) -> DataSet:
    return DataSet(options.mib, options.value_bytes, options.text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.workloads.redis_data")
    parser.add_argument("act", choices=("fill", "verify"))
    add_data_arguments(parser)
    parser.add_argument("--versions", type=Path, help="what redis_writer saved")
    options = parser.parse_args(arguments)
    data = data_from(options)
    try:
        with RedisConnection(options.address, options.port) as connection:
            if options.act == "fill":
                fill(connection, data)
                print(json.dumps({"keys": data.keys, "ok": True}))
                return 0
            versions = Versions.load(options.versions) if options.versions else None
            verdict = verify(connection, data, versions)
    except RedisWorkloadError as error:
        print(json.dumps({"ok": False, "error": str(error)}))
        return 1
    print(json.dumps(asdict(verdict) | {"ok": verdict.ok}))
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
