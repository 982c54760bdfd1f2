"""Starts and stops a client (bench/probe.py, bench/workloads/redis_writer.py) as a process.

A client runs in a lab's client host, with that host's Python and the source mounted there, or,
without a host, on this machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench.lab.host_files import BYTECODE_INSIDE, SOURCE_INSIDE
from bench.probe import DRAIN_S, Report

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from bench.lab.host import Host


CONNECTED_S = 10.0
END_S = DRAIN_S + 10.0
"""A client drains its answers first."""
OUTPUT_BYTES_MAX = 4 * 1024 * 1024
"""A report with all its lists is far smaller."""
RUN_S = 120.0
PYTHON_INSIDE = {"PYTHONPATH": SOURCE_INSIDE, "PYTHONPYCACHEPREFIX": BYTECODE_INSIDE}
"""The source is read-only there, its byte code has a place of its own."""
ROOT = Path(__file__).resolve().parent.parent


class ProbeError(Exception):
    """A client process did not start, did not connect or did not report."""


class ProbeProcess:
    """One running client. As a context manager it is always ended."""

    def __init__(self, module: str, arguments: Sequence[str], *, host: Host | None = None) -> None:
        """Starts `python3 -m module arguments`. Raises ProbeError when that is not possible."""
        self._name = module
        self._output = b""
        try:
            self._process = _launch(["-m", module, *arguments], host)
        except OSError as error:
            raise ProbeError(f"{module} could not be started: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()

    def wait_connected(self, deadline_s: float = CONNECTED_S) -> None:
        """Returns when the first answer came. Raises ProbeError."""
        until_s = time.monotonic() + deadline_s
        while b"connected\n" not in self._output:
            if not self._read(until_s):
                raise ProbeError(f"{self._name} did not connect: {self._output[:400]!r}")

    def alive(self) -> bool:
        """False as soon as the client gave up: its connection broke."""
        return self._process.poll() is None

    def stop(self, deadline_s: float = END_S) -> Report:
        """Tells the client to stop, waits until it drained, returns what it saw."""
        return Report(**self.stop_raw(deadline_s))

    def stop_raw(self, deadline_s: float = END_S) -> dict[str, Any]:
        """The same, as the JSON object that the client printed. Raises ProbeError."""
        until_s = time.monotonic() + deadline_s
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended by itself; its report says why
            self._process.stdin.write(b"stop\n")
        while self._read(until_s):
            pass
        self.kill()
        try:
            report = json.loads(self._output.splitlines()[-1])
        except (IndexError, ValueError) as error:
            raise ProbeError(f"{self._name} gave no report: {self._output[-400:]!r}") from error
        if not isinstance(report, dict):
            raise ProbeError(f"{self._name} gave no report: {report!r:.400}")
        return report

    def kill(self) -> None:
        """Ends the process at once if it still runs. Idempotent."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _read(self, until_s: float) -> bool:
        """Reads some output; False at its end. Raises ProbeError at the deadline."""
        assert self._process.stdout is not None
        remaining_s = until_s - time.monotonic()
        if remaining_s <= 0 or not select.select([self._process.stdout], [], [], remaining_s)[0]:
            raise ProbeError(f"{self._name}: nothing heard in time, so far {self._output[-400:]!r}")
        data = os.read(self._process.stdout.fileno(), 65536)
        self._output += data
        if len(self._output) > OUTPUT_BYTES_MAX:
            raise ProbeError(f"{self._name} printed more than {OUTPUT_BYTES_MAX} bytes")
        return bool(data)


def _launch(arguments: Sequence[str], host: Host | None) -> subprocess.Popen[bytes]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "bufsize": 0}
    if host is None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, *arguments], env=environment, **pipes)
    return host.popen(["python3", *arguments], env=PYTHON_INSIDE, text=False, **pipes)


def run_module(host: Host, module: str, *arguments: str, timeout_s: float = RUN_S) -> str:
    """Runs `python3 -m module arguments` in a lab host to its end; returns what it printed.

    For bench.workloads.ask and redis_data. Raises LabCommandError, with its output, when it fails.
    """
    command = ["python3", "-m", module, *arguments]
    return host.run(command, env=PYTHON_INSIDE, timeout_s=timeout_s).stdout.strip()


def start_probe(
    kind: str, address: str, port: int, *, host: Host | None = None, rate_per_s: float = 1000.0
) -> ProbeProcess:
    """A streaming client of a workload (a kind of bench.probe), already answered once."""
    process = ProbeProcess(
        "bench.probe", [kind, address, str(port), f"--rate={rate_per_s}"], host=host
    )
    try:
        process.wait_connected()
    except ProbeError:
        process.kill()
        raise
    return process
