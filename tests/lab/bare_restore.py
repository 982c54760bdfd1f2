"""Runs inside a lab host: CRIU takes a process tree apart and puts it together again, with its
memory going through the page store.

    python3 -m tests.lab.bare_restore dump PID WORK             one line: {"tasks": [...], ...}
    python3 -m tests.lab.bare_restore restore WORK eager        one line: {"restore_ms": x, ...}
    python3 -m tests.lab.bare_restore restore WORK lazy         that, then the pager's last state
    python3 -m tests.lab.bare_restore restore WORK lazy-killed  the same, and the pager's processes
                                                                are killed in turn during the fill
    python3 -m tests.lab.bare_restore restore WORK lazy-lost    the same, both at once

WORK is on a tmpfs: img/ mem/ work/ as on a target. The dump is held at post-dump while the frozen
tasks' memory is read; then CRIU kills them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from criu_glue import pager, pager_watch
from criu_glue.core.pagemap import PAGE_BYTES, pages_in
from criu_glue.core.stats import decode_restore_stats
from criu_glue.images import attach_page_store, lazy_ranges
from criu_glue.memory import TaskMemory
from criu_glue.page_store import PageStore
from criu_glue.pager_state import PagerState, PagerStateError, Phase
from tests.lab.waiting import wait_until

QUOTA_BYTES = 4 << 30
CHUNK_PAGES = 1024
VICTIMS = ["worker", "keeper"] * 10
CRIU = ["criu", "--manage-cgroups=ignore", "-v4"]


def copy_memory(task: int, runs: Any, store: PageStore) -> None:
    """Every page of `runs` from the frozen task into the store, zeros as holes."""
    buffer = memoryview(bytearray(CHUNK_PAGES * PAGE_BYTES))
    memory = TaskMemory(task)
    try:
        for address, pages in runs.tolist():
            for first in range(0, pages, CHUNK_PAGES):
                count = min(CHUNK_PAGES, pages - first)
                start = address + first * PAGE_BYTES
                part = np.array([[start, count]], dtype=np.uint64)
                assert memory.read(part, buffer).all(), f"unreadable at {start:#x}"
                store.write(task, start, buffer[: count * PAGE_BYTES])
    finally:
        memory.close()


def dump(pid: int, work: Path) -> dict[str, Any]:
    img, criu_work = work / "img", work / "work"
    for directory in (work, img, criu_work):
        directory.mkdir(mode=0o700)
    for fifo in ("held", "verdict"):
        os.mkfifo(work / fifo)
    hook = work / "hook"
    hook.write_text(
        "#!/bin/sh\n"
        '[ "$CRTOOLS_SCRIPT_ACTION" = post-dump ] || exit 0\n'
        f"echo held > {work}/held\nread verdict < {work}/verdict\n"
    )
    hook.chmod(0o700)
    # A page server's socket that is at its end already: CRIU needs no port, and nobody asks.
    ours, theirs = socket.socketpair()
    ours.close()
    command = [*CRIU, "dump", "--tree", str(pid), "--images-dir", str(img)]
    command += ["--work-dir", str(criu_work), "--log-file", "dump.log", "--lazy-pages"]
    command += ["--ps-socket", str(theirs.fileno()), "--action-script", str(hook)]
    with subprocess.Popen(command, pass_fds=[theirs.fileno()]) as criu:
        held = os.open(work / "held", os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(held, True)
        while not os.read(held, 16):
            assert criu.poll() is None, (criu_work / "dump.log").read_text()[-3000:]
            time.sleep(0.01)
        ranges = lazy_ranges(img)
        store = PageStore(work / "mem", quota_bytes=QUOTA_BYTES)
        for task, runs in ranges.items():
            copy_memory(task, runs, store)
        (work / "verdict").write_text("go\n")
        assert criu.wait() == 0, (criu_work / "dump.log").read_text()[-3000:]
    attach_page_store(img, store)
    store.close()
    lazy_pages = sum(pages_in(runs) for runs in ranges.values())
    return {"tasks": sorted(ranges), "lazy_pages": lazy_pages}


def restore(work: Path, way: str) -> None:
    img, criu_work = work / "img", work / f"work-{way}"
    criu_work.mkdir()
    command = [*CRIU, "restore", "--restore-detached", "--images-dir", str(img)]
    command += ["--work-dir", str(criu_work), "--log-file", "restore.log"]
    if way != "eager":
        command.append("--lazy-pages")
        subprocess.Popen(pager.command(work=criu_work, images=img, store=work / "mem"))
        wait_until("the pager listens", lambda: phase(criu_work) is Phase.LISTENING)
    started_s = time.monotonic()
    with subprocess.Popen(command) as criu:
        if way == "lazy-lost":
            # Now, since the fill lasts for some 50 ms only.
            wait_until("the tasks run", lambda: phase(criu_work) in (Phase.FILLING, Phase.DONE))
            os.killpg(PagerState.read(criu_work).group, signal.SIGKILL)
    code = criu.returncode
    taken_ms = 1e3 * (time.monotonic() - started_s)
    if code:
        log = (criu_work / "restore.log").read_text(errors="replace")
        raise SystemExit("\n".join(log.splitlines()[-60:]))
    stats = decode_restore_stats((criu_work / "stats-restore").read_bytes())
    print(json.dumps({"restore_ms": round(taken_ms, 1), "criu_us": stats.restore_us}), flush=True)
    if way == "eager":
        return
    victims = iter(VICTIMS if way == "lazy-killed" else [])
    settled = 0
    alive = pager_watch.open_alive(criu_work)
    while pager_watch.heard(alive):
        state = PagerState.read(criu_work)
        victim = state.settled_bytes > settled and next(victims, "")
        settled = state.settled_bytes
        if victim:
            kill(criu_work, victim)
        time.sleep(0.001)
    state = PagerState.read(criu_work)
    words = ("tasks", "unplaced_bytes", "faults", "missing_bytes", "workers", "keepers", "error")
    report = {word: getattr(state, word) for word in words}
    print(json.dumps({"phase": state.phase.name, **report}), flush=True)


def phase(work: Path) -> Phase | None:
    try:
        return PagerState.read(work).phase
    except PagerStateError:
        return None


def kill(work: Path, victim: str) -> None:
    """One process of the pager; returns when there is another one."""
    state = PagerState.read(work)
    count = getattr(state, f"{victim}s")
    with contextlib.suppress(ProcessLookupError):
        os.kill(getattr(state, victim), signal.SIGKILL)
    alive = pager_watch.open_alive(work)

    def is_replaced() -> bool:
        return getattr(PagerState.read(work), f"{victim}s") > count or not pager_watch.heard(alive)

    wait_until(f"the {victim} is replaced", is_replaced)
    os.close(alive)


if __name__ == "__main__":
    if sys.argv[1] == "dump":
        print(json.dumps(dump(int(sys.argv[2]), Path(sys.argv[3]))))
    else:
        restore(Path(sys.argv[2]), sys.argv[3])
