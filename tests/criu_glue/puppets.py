"""Puppets: processes (programs/puppet.c) that change their memory on command, for tests that then
look at them from outside."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from criu_glue import ptrace_requests as request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

PAGE = 4096
# A range of addresses where neither the loader nor malloc puts anything.
ARENA = 0x1000_0000_0000
NONE, READ, READ_WRITE = 0, 1, 3
SYS_READ = 0
ANSWER_DEADLINE_S = 20.0


def until(condition: Callable[[], object], deadline_s: float = 10.0) -> None:
    """Poll a condition; fail when it does not come true."""
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "the condition did not come true"
        time.sleep(0.001)


def proc(pid: int, name: str) -> str:
    """The text of /proc/PID/NAME."""
    return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")


def state(pid: int) -> str:
    """The state letter of a thread in /proc."""
    return proc(pid, "stat").rpartition(")")[2].split()[0]


def blocked_in(pid: int) -> int:
    """The number of the system call that a process waits in; -1: it runs."""
    words = proc(pid, "syscall").split()
    return int(words[0]) if words[0] != "running" else -1


def status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    return dict(line.split(":\t", 1) for line in proc(pid, "status").splitlines())


def descriptors(pid: int) -> set[str]:
    """The numbers of a process's open files."""
    return {path.name for path in Path(f"/proc/{pid}/fd").iterdir()}


@contextlib.contextmanager
def traced_by_another(pid: int) -> Iterator[None]:
    """As under a debugger."""
    begun, end = threading.Event(), threading.Event()

    def trace() -> None:
        request.ptrace(request.SEIZE, pid)
        begun.set()
        end.wait()
        # The end of this thread releases the process.

    tracer = threading.Thread(target=trace)
    tracer.start()
    begun.wait()
    try:
        yield
    finally:
        end.set()
        tracer.join()
        until(lambda: status(pid)["TracerPid"] == "0")


class Puppet:
    """One process and the connection to it."""

    def __init__(self, pid: int, connection: socket.socket, stage: Stage) -> None:
        self.pid = pid
        self._connection = connection
        self._stage = stage
        self._lines = connection.makefile("r")

    def send(self, name: str, *numbers: int) -> None:
        """A command without waiting for its answer."""
        self._connection.sendall((" ".join([name, *(f"{n:x}" for n in numbers)]) + "\n").encode())

    def answer(self) -> int:
        line = self._lines.readline()
        assert line, "the puppet has died"
        if line[0] == "!":
            return -int(line[1:])
        return int(line, 16)

    def do(self, name: str, *numbers: int) -> int:
        """A command's answer, which must not be an error."""
        self.send(name, *numbers)
        value = self.answer()
        assert value >= 0, f"{name}: {os.strerror(-value)}"
        return value

    def settle(self) -> None:
        """Wait until it waits for the next command. An answer comes while it is still on its way
        there, writing to its stack."""
        until(lambda: blocked_in(self.pid) == SYS_READ and state(self.pid) == "S")

    def fork(self) -> Puppet:
        """A child with a connection of its own."""
        pid = self.do("fork")
        child = self._stage.accept()
        assert child.pid == pid
        return child

    def exec(self) -> None:
        """Replace the program by itself: a new memory in the same process."""
        assert self.do("exec") == 0

    def close(self) -> None:
        self._lines.close()
        self._connection.close()


class Stage:
    """Starts puppets and ends them."""

    def __init__(self, program: Path, socket_path: Path) -> None:
        self._program = program
        self._path = socket_path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(socket_path))
        self._listener.listen()
        self._listener.settimeout(ANSWER_DEADLINE_S)
        self._children: list[subprocess.Popen[bytes]] = []
        self.puppets: list[Puppet] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for puppet in self.puppets:
            puppet.close()
        for child in self._children:
            child.kill()
            # Puppets that were forked live in its process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        self._listener.close()
        self._path.unlink()

    def start(self, *prefix: str) -> Puppet:
        """A new process, its command line preceded by `prefix`."""
        self._children.append(
            subprocess.Popen([*prefix, str(self._program), str(self._path)], process_group=0)
        )
        return self.accept()

    def accept(self) -> Puppet:
        connection, _ = self._listener.accept()
        connection.settimeout(ANSWER_DEADLINE_S)
        size = struct.calcsize("3i")
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        puppet = Puppet(struct.unpack("3i", credentials)[0], connection, self)
        self.puppets.append(puppet)
        return puppet

    @property
    def child(self) -> subprocess.Popen[bytes]:
        """The process that was started last."""
        return self._children[-1]


def pages_in(runs: npt.NDArray[np.uint64], start: int, pages: int) -> list[int]:
    """Which of the pages from `start` on are in the runs, as numbers from 0."""
    found = [
        (address - start) // PAGE + offset
        for address, count in runs.tolist()
        for offset in range(count)
        if start <= address + offset * PAGE < start + pages * PAGE
    ]
    assert found == sorted(set(found)), "runs overlap or are not sorted"
    return found


def present_pages(pid: int) -> dict[int, bytes]:
    """Address and content of every private anonymous page of a process, read independently of the
    code under test: /proc/PID/maps, /proc/PID/pagemap (present or swapped) and /proc/PID/mem."""
    content: dict[int, bytes] = {}
    with (
        Path(f"/proc/{pid}/pagemap").open("rb") as pagemap,
        Path(f"/proc/{pid}/mem").open("rb", buffering=0) as mem,
    ):
        for line in proc(pid, "maps").splitlines():
            fields = line.split(maxsplit=5)
            name = fields[5].strip() if len(fields) > 5 else ""
            if fields[1][3] != "p" or fields[4] != "0" or name.startswith(("[v", "[uprobes")):
                continue
            start, end = (int(text, 16) for text in fields[0].split("-"))
            pagemap.seek(start // PAGE * 8)
            entries = np.frombuffer(pagemap.read((end - start) // PAGE * 8), dtype=np.uint64)
            for index in np.flatnonzero(entries >> np.uint64(62)).tolist():
                address = start + index * PAGE
                mem.seek(address)
                content[address] = mem.read(PAGE)
    return content
