"""Dumps a container of this host again and again, and kills CRIU at a chosen step of each dump.

    python3 -m tests.lab.dump_killer NAME        inside a lab host, with the host's own Python

    standard input    the number of a step, a line each; 0: nobody is killed. With a word behind
                      it only steps after one of that name count: "2 ptrace CONT"
    standard output   a line of JSON for each: {"steps": how many came, "last": what the last was,
                      "killed": bool, "error": why the dump failed, "undo": why the undo failed}

The source's half of a migration, as the coordinator drives it (`migrate/freezing.py`): runtime,
guard, freeze, dump, and then everything is undone. A step is a system call by which CRIU acts on
its tasks: ptrace(2), wait4(2), messages to its parasite. It is caught at its entry by a seccomp
filter that asks this process (seccomp_unotify(2)), so that the kill comes at exactly that place,
and the tasks have had the time to come to wherever the step before has sent them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

from criu_glue.errors import CriuGlueError
from criu_glue.kernel import pidfd_getfd
from migrate import network_capture
from migrate.config import HostPaths
from migrate.errors import MigrateError
from migrate.freezing import Freezing
from migrate.runtimes.runc import Runc

STEPS: Final = {101: "ptrace", 61: "wait4", 44: "sendto", 45: "recvfrom", 47: "recvmsg"}
"""x86-64's numbers."""
# In this time a task that the step before has set going comes to its next stop.
SETTLE_S: Final = 0.003
_PTRACE: Final = 101
_REQUESTS: Final = {
    2: "PEEKDATA",
    5: "POKEDATA",
    6: "POKEUSER",
    7: "CONT",
    17: "DETACH",
    24: "SYSCALL",
    0x4200: "SETOPTIONS",
    0x4202: "GETSIGINFO",
    0x4204: "GETREGSET",
    0x4205: "SETREGSET",
    0x4206: "SEIZE",
    0x4207: "INTERRUPT",
    0x4209: "PEEKSIGINFO",
    0x420A: "GETSIGMASK",
    0x420B: "SETSIGMASK",
    0x420F: "GET_RSEQ_CONFIGURATION",
}

# linux/seccomp.h: struct seccomp_notif (80 bytes: id, pid, flags, nr, arch, ip, six arguments),
# struct seccomp_notif_resp (24: id, val, error, flags).
_NOTIFY_RECV: Final = 0xC0502100
_NOTIFY_SEND: Final = 0xC0182101
_CONTINUE: Final = 1

# In front of CRIU in PATH: a dump is filtered, everything else is not touched. The filter's
# listener is fetched by this process, which then writes to the FIFO.
_WRAPPER: Final = """\
#!/usr/bin/python3 -ISE
import ctypes, os, socket, struct, sys
def is_dump():
    if len(sys.argv) < 3 or sys.argv[1] != "swrk":
        return False
    peer = socket.socket(fileno=int(sys.argv[2]))
    request = peer.recv(2, socket.MSG_PEEK)
    peer.detach()
    return request == b"\\x08\\x01"
if is_dump():
    numbers = {numbers}
    # BPF: load the number; equal to one of these: ask (SECCOMP_RET_USER_NOTIF); else: allow.
    lines = [(0x20, 0, 0, 0)]
    lines += [(0x15, len(numbers) - at, 0, n) for at, n in enumerate(numbers)]
    lines += [(0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FC00000)]
    code = b"".join(struct.pack("HBBI", *line) for line in lines)
    body = ctypes.create_string_buffer(code)
    at = ctypes.addressof(body)
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(lines), at))
    libc = ctypes.CDLL(None, use_errno=True)
    listener = libc.syscall(317, 1, 1 << 3, program)
    if listener < 0:
        sys.exit(f"seccomp: {{os.strerror(ctypes.get_errno())}}")
    with open({told!r}, "w") as told:
        told.write(f"{{os.getpid()}} {{listener}}\\n")
    with open({go!r}) as go:
        go.read()
    os.close(listener)
os.execv("/usr/sbin/criu", ["criu", *sys.argv[1:]])
"""


class Steps(threading.Thread):
    """Lets CRIU take its steps; kills it at the one that is asked for."""

    def __init__(self, directory: Path, kill_at: int, after: str) -> None:
        super().__init__(daemon=True)
        self._told, self._go = directory / "told", directory / "go"
        self._left, self._after = kill_at, after
        self.count = 0
        self.last = ""
        self.killed = False
        self.ended = False
        for fifo in (self._told, self._go):
            os.mkfifo(fifo)
        text = _WRAPPER.format(numbers=sorted(STEPS), told=str(self._told), go=str(self._go))
        (directory / "criu").write_text(text)
        (directory / "criu").chmod(0o755)

    def run(self) -> None:
        pid, fd = map(int, self._told.read_text().split())
        if self.ended:
            return
        pidfd = os.pidfd_open(pid)
        listener = pidfd_getfd(pidfd, fd)
        self._go.write_text("go")
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        try:
            while True:
                # POLLHUP: nobody has the filter any more (seccomp_unotify(2)).
                if any(events & ~select.POLLIN for _, events in poller.poll(1000)):
                    return
                with contextlib.suppress(FileNotFoundError):
                    self._answer(listener, pid)
        finally:
            os.close(listener)
            os.close(pidfd)

    def _answer(self, listener: int, criu: int) -> None:
        asked = bytearray(80)
        fcntl.ioctl(listener, _NOTIFY_RECV, asked)
        words = memoryview(asked).cast("Q").tolist()
        pid = words[1] & 0xFFFF_FFFF
        if pid == criu and not self.killed:
            self.count += 1
            self._left -= not self._after or self.last == self._after
            self.last = _name(words[2] & 0xFFFF_FFFF, words[4])
            if self._left == 0:
                time.sleep(SETTLE_S)
                self.killed = True
                os.kill(criu, signal.SIGKILL)
                return
        answer = (ctypes.c_uint64 * 3)(words[0], 0, _CONTINUE << 32)
        fcntl.ioctl(listener, _NOTIFY_SEND, bytes(answer))


def _name(number: int, request: int) -> str:
    name = STEPS[number]
    return f"{name} {_REQUESTS.get(request, hex(request))}" if number == _PTRACE else name


async def dump(name: str, order: str, number: int) -> dict[str, object]:
    """One dump that is undone, or ends with CRIU."""
    runtime = Runc()
    container = runtime.inspect(name)
    assert container.netns is not None
    network = network_capture.capture(container.netns).identity
    base = Path(tempfile.mkdtemp(prefix="dump-killer-", dir="/run"))
    kill_at, _, after = order.strip().partition(" ")
    # No step is that far away.
    steps = Steps(base, int(kill_at) or 1 << 30, after)
    steps.start()
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{base}:{path}"
    session = base / "session"
    session.mkdir()
    freezing = Freezing(container, runtime, network, session, "A")
    error = undo = ""
    times: dict[str, int] = {}
    try:
        await freezing.prepare(f"killed-{number}", HostPaths(), parent=None)
        times |= await freezing.freeze()
        await freezing.start_dump()
        times["gate"] = time.monotonic_ns() // 1000
        times["dumped"] = await freezing.dumped()
    except (MigrateError, CriuGlueError) as failed:
        error = str(failed)
    finally:
        os.environ["PATH"] = path
    try:
        await freezing.undo()
    except MigrateError as failed:
        undo = str(failed)
    if steps.is_alive() and not steps.count:
        # No dump has come so far that it was filtered.
        steps.ended = True
        (base / "told").write_text("0 0")
    await asyncio.to_thread(steps.join)
    shutil.rmtree(base)
    return {
        "steps": steps.count,
        "last": steps.last,
        "killed": steps.killed,
        "error": error,
        "undo": undo,
        "dump_us": times.get("dumped", 0) - times.get("gate", 0),
        "custody_us": times.get("gate", 0) - times.get("frozen", 0),
    }


def main() -> None:
    """Until the input ends."""
    for number, line in enumerate(sys.stdin):
        print(json.dumps(asyncio.run(dump(sys.argv[1], line, number))), flush=True)


if __name__ == "__main__":
    main()
