"""The C workloads as plain processes of this machine, on loopback."""

from __future__ import annotations

import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

from bench.workloads.ask import ask

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCES = Path(__file__).resolve().parents[2] / "bench/workloads"
FLAGS = ("-O2", "-static", "-pthread", "-Wall", "-Wextra", "-Werror")
DEADLINE_S = 20.0
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Workload:
    """A running workload."""

    process: subprocess.Popen[bytes]
    port: int
    directory: Path

    def ask(self, *lines: str, address: str = "127.0.0.1") -> list[str]:
        return ask(address, self.port, lines, timeout_s=DEADLINE_S)

    def connect(self, address: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection((address, self.port), timeout=DEADLINE_S)


class StartWorkload(Protocol):
    def __call__(self, name: str, *arguments: str) -> Workload:
        """Starts a workload; PORT and DIRECTORY in its arguments are replaced."""


@pytest.fixture(scope="session")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All workloads, compiled with every warning an error."""
    directory = tmp_path_factory.mktemp("workloads")
    for source in sorted(SOURCES.glob("*.c")):
        output = directory / source.stem
        subprocess.run(["gcc", *FLAGS, "-o", output, source], check=True)
    return directory


@pytest.fixture
def start_workload(binaries: Path, tmp_path: Path) -> Iterator[StartWorkload]:
    """Starts workloads; ends them after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(name: str, *arguments: str) -> Workload:
        port = free_port()
        places = {"PORT": str(port), "DIRECTORY": str(tmp_path)}
        process = subprocess.Popen([binaries / name, *(places.get(a, a) for a in arguments)])
        started.append(process)
        until_s = time.monotonic() + DEADLINE_S
        while not listens(port):
            assert process.poll() is None, f"{name} ended with status {process.returncode}"
            assert time.monotonic() < until_s, f"{name} does not listen"
            time.sleep(POLL_S)
        return Workload(process, port, tmp_path)

    yield start
    for process in started:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """From the kernel's table: connecting would make a client (proc_net_tcp.rst: 0A is LISTEN)."""
    wanted = f":{port:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return any(row[1].endswith(wanted) and row[3] == "0A" for row in rows)
