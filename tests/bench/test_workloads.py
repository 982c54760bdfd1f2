"""memory, tree and blocker as plain processes: they answer, and they notice what is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bench.workloads.ask import WorkloadError, ask
from tests.lab.waiting import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.bench.conftest import StartWorkload, Workload

DEADLINE_S = 20.0
PAGE_BYTES = 4096
PAGES_PER_MIB = 256


# ---- memory ----


def stats(workload: Workload) -> dict[str, float]:
    answer = workload.ask("STATS")[0]
    return {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", answer)}


def stop_writer(workload: Workload) -> float:
    """Pages dirtied until the writer stood still."""
    assert workload.ask("RATE 0") == ["RATE ok 0"]
    seen = [-1.0]

    def still() -> bool:
        seen.append(stats(workload)["dirtied"])
        return seen[-1] == seen[-2]

    wait_until("the writer stops at RATE 0", still)
    return seen[-1]


def test_answers_in_order_whatever_the_pieces(start_workload: StartWorkload) -> None:
    memory = start_workload("memory", "PORT", "1", "0")
    with memory.connect() as connection, connection.makefile("rb") as stream:
        for piece in (b"1\n2", b"\n", b"3\n4\n5", b"\n\n6\n"):
            connection.sendall(piece)
        answers = [stream.readline() for _ in range(7)]
    *sequences, unknown, last = answers
    assert sequences == [b"%d %d\n" % (number, number) for number in range(1, 6)]
    assert (unknown, last) == (b"ERR unknown command\n", b"6 6\n")


def test_counter_is_the_servers_and_clients_come_by_both_families(
    start_workload: StartWorkload,
) -> None:
    memory = start_workload("memory", "PORT", "1", "0")
    with memory.connect("127.0.0.1"), memory.connect("::1"):
        assert memory.ask("1", "2", address="127.0.0.1") == ["1 1", "2 2"]
        assert memory.ask("1", address="::1") == ["1 3"]


def test_thousands_of_pipelined_lines(start_workload: StartWorkload) -> None:
    memory = start_workload("memory", "PORT", "1", "0")
    lines = [str(number) for number in range(1, 5001)]
    assert memory.ask(*lines) == [f"{line} {line}" for line in lines]


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--text", "50", "--zero", "20"),
        ("--dirty-words", "8", "--hot-mib", "1"),
        ("--dirty-words", "1", "--zero", "100", "--small-pages"),
    ],
)
def test_verify_is_ok_while_pages_change(
    start_workload: StartWorkload, options: tuple[str, ...]
) -> None:
    memory = start_workload("memory", "PORT", "4", "200", *options)
    wait_until("pages are written", lambda: stats(memory)["dirtied"] > 2 * 4 * PAGES_PER_MIB)
    assert re.fullmatch(
        r"VERIFY ok pages=1024 bad=0 words=524288 generation=\d+", memory.ask("VERIFY")[0]
    )
    dirtied = stop_writer(memory)
    assert memory.ask("VERIFY")[0].endswith(f"generation={dirtied:.0f}")


def test_verify_sees_one_wrong_bit(start_workload: StartWorkload) -> None:
    # The corrupted page is the last one, outside of the hot set: the writer does not mend it.
    memory = start_workload("memory", "PORT", "4", "20", "--hot-mib", "1")
    corrupted = memory.ask("CORRUPT")[0].removeprefix("CORRUPT ok address=")
    answer = memory.ask("VERIFY")[0]
    assert answer.startswith("VERIFY BAD pages=1024 bad=1 ")
    assert f" first={corrupted} page=1023 word=511 " in answer
    assert memory.ask("CORRUPT", "VERIFY")[1].startswith("VERIFY ok ")


def test_verify_sees_a_page_that_is_another_version(start_workload: StartWorkload) -> None:
    """As a migration would leave it that lost the last write of one page."""
    memory = start_workload("memory", "PORT", "1", "0")
    address = address_of_memory(memory, 1)
    with Path(f"/proc/{memory.process.pid}/mem").open("r+b", buffering=0) as file:
        file.seek(address)
        before = file.read(PAGE_BYTES)
        memory.ask("RATE 100")
        wait_until("pages are written", lambda: stats(memory)["dirtied"] > 16 * PAGES_PER_MIB)
        stop_writer(memory)
        file.seek(address)
        file.write(before)
    assert memory.ask("VERIFY")[0].startswith("VERIFY BAD pages=256 bad=512 ")


def test_only_the_hot_set_changes(start_workload: StartWorkload) -> None:
    memory = start_workload("memory", "PORT", "4", "0", "--hot-mib", "1")
    before = pages_of(memory, 4)
    memory.ask("RATE 100")
    wait_until("pages are written", lambda: stats(memory)["dirtied"] > 16 * PAGES_PER_MIB)
    stop_writer(memory)
    changed = (pages_of(memory, 4) != before).any(axis=1).nonzero()[0]
    assert 0 < len(changed) <= PAGES_PER_MIB
    assert changed.max() < PAGES_PER_MIB


def test_content_is_mixed_as_asked(start_workload: StartWorkload) -> None:
    memory = start_workload("memory", "PORT", "8", "0", "--text", "30", "--zero", "20")
    pages = pages_of(memory, 8)
    zero = ~pages.any(axis=1)
    text = ((pages >= 0x20) & (pages < 0x80)).all(axis=1)
    assert zero.mean() == pytest.approx(0.2, abs=0.03)
    assert text.mean() == pytest.approx(0.3, abs=0.03)


def test_survives_clients_that_vanish_or_misbehave(start_workload: StartWorkload) -> None:
    memory = start_workload("memory", "PORT", "1", "0")
    vanishing = memory.connect()
    vanishing.sendall(b"1\n" * 10000)
    # Closed with a reset while answers are on their way: the server's send fails.
    vanishing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    vanishing.close()
    with memory.connect() as endless:
        endless.sendall(b"9" * 3000)
        assert endless.recv(1) == b""
    assert memory.ask("RATE x", "RATE -1", "STATS 1") == [
        "ERR rate",
        "ERR rate",
        "ERR unknown command",
    ]
    assert memory.process.poll() is None


@pytest.mark.parametrize(
    "arguments",
    [(), ("0", "1", "1"), ("7000", "1", "1", "--text", "60", "--zero", "60"), ("x",) * 3],
)
def test_refuses_nonsense(binaries: Path, arguments: tuple[str, ...]) -> None:
    result = subprocess.run([binaries / "memory", *arguments], capture_output=True, check=False)
    assert result.returncode == 2
    assert result.stderr


def address_of_memory(workload: Workload, mib: int) -> int:
    """CORRUPT names the last word; the second one undoes it."""
    last_word = workload.ask("CORRUPT", "CORRUPT")[0].removeprefix("CORRUPT ok address=")
    return int(last_word, 16) + 8 - (mib << 20)


def pages_of(workload: Workload, mib: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The pages of the workload, one a row."""
    with Path(f"/proc/{workload.process.pid}/mem").open("rb", buffering=0) as file:
        file.seek(address_of_memory(workload, mib))
        content = file.read(mib << 20)
    return np.frombuffer(content, dtype=np.uint8).reshape(-1, PAGE_BYTES)


# ---- tree ----


@pytest.fixture
def tree(start_workload: StartWorkload) -> Iterator[Workload]:
    running = start_workload("tree", "PORT", "--dir", "DIRECTORY", "--beyond-criu", "--stopped")
    yield running
    # One that is killed leaves System V objects, and its file in /dev/shm.
    assert running.ask("QUIT") == ["QUIT ok"]
    assert running.process.wait(DEADLINE_S) == 0


def faults(tree: Workload) -> dict[str, str]:
    verdicts: dict[str, str] = json.loads(tree.ask("CHECK")[0])
    assert len(verdicts) > 30
    return {name: verdict for name, verdict in verdicts.items() if verdict != "ok"}


def counters(tree: Workload) -> dict[str, int]:
    answer = json.loads(tree.ask("COUNTERS")[0])
    counts: dict[str, int] = dict(answer["progress"])
    for process, beats in enumerate(answer["beats"]):
        counts |= {f"{process}.{thread}": beat for thread, beat in enumerate(beats)}
    return counts


def member(tree: Workload, number: int) -> int:
    """The pid of a process of the tree, by its name, among the descendants of the first."""
    waiting = [tree.process.pid]
    while waiting:
        pid = waiting.pop()
        if Path(f"/proc/{pid}/comm").read_text() == f"tree-{number}\n":
            return pid
        waiting += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    raise AssertionError(f"there is no process {number}")


def test_everything_in_a_tree_is_fine_and_goes_on(tree: Workload) -> None:
    assert faults(tree) == {}
    before = counters(tree)
    assert len(before) > 8 * 4 + 25

    def all_grew() -> bool:
        now = counters(tree)
        return all(now[name] > count for name, count in before.items())

    wait_until("every counter grows", all_grew)
    assert faults(tree) == {}
    assert tree.ask("1", "2") == ["1 1", "2 2"]


def test_tree_sees_a_wrong_bit_of_its_memory(tree: Workload) -> None:
    assert tree.ask("CORRUPT") == ["CORRUPT ok"]
    assert list(faults(tree)) == ["private"]


def change_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def lengthen_log(tree: Workload) -> None:
    with (tree.directory / "tree-log").open("ab") as file:
        file.write(b"x")


def falsify_map(tree: Workload) -> None:
    # Every page: the next turns rewrite some before the check.
    for page in range(1, 17):
        change_byte(tree.directory / "tree-map", page * PAGE_BYTES + 100)


def steal_message(tree: Workload) -> None:
    fifo = os.open(tree.directory / "tree-fifo", os.O_RDONLY | os.O_NONBLOCK)
    assert len(os.read(fifo, 16)) == 16
    os.close(fifo)


def queue_signal(tree: Workload) -> None:
    os.kill(member(tree, 5), signal.SIGRTMIN + 5)


def renice(tree: Workload) -> None:
    os.setpriority(os.PRIO_PROCESS, member(tree, 6), 9)


def raise_limit(tree: Workload) -> None:
    subprocess.run(["prlimit", "--pid", str(member(tree, 7)), "--nofile=100:300"], check=True)


def reap_stopped(tree: Workload) -> None:
    stopped = next(
        int(pid)
        for pid in Path(f"/proc/{member(tree, 4)}/task/{member(tree, 4)}/children")
        .read_text()
        .split()
        if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")
    )
    os.kill(stopped, signal.SIGCONT)
    os.kill(stopped, signal.SIGKILL)


def replace_watched_directory(tree: Workload) -> None:
    (tree.directory / "tree-watched").rename(tree.directory / "moved")
    (tree.directory / "tree-watched").mkdir()


@pytest.mark.parametrize(
    ("interfere", "feature"),
    [
        (lengthen_log, "file_append"),
        (falsify_map, "file_map"),
        (steal_message, "fifo"),
        (queue_signal, "signals_pending"),
        (renice, "ids"),
        (raise_limit, "ids"),
        (reap_stopped, "stopped"),
        (replace_watched_directory, "inotify"),
    ],
)
def test_tree_sees_what_was_changed_behind_its_back(
    tree: Workload, interfere: Callable[[Workload], None], feature: str
) -> None:
    assert faults(tree) == {}
    interfere(tree)
    wait_until(f"{feature} is reported", lambda: feature in faults(tree))
    assert list(faults(tree)) == [feature]
    assert faults(tree)[feature].startswith("BAD: process ")


# ---- blocker ----


@pytest.mark.parametrize("kind", ["idle", "io_uring", "memfd_secret", "eventfd_semaphore", "ghost"])
def test_blocker_answers_and_says_what_it_holds(start_workload: StartWorkload, kind: str) -> None:
    blocker = start_workload("blocker", kind, "PORT", "DIRECTORY/file")
    sequence, held = blocker.ask("1", "KIND")
    assert sequence == "1 1"
    # A kernel without it says so; that is an answer too, and none of this test's business.
    assert re.fullmatch(rf"KIND {kind} (ok|ERR .+)", held)


def test_blocker_holds_an_io_uring(start_workload: StartWorkload) -> None:
    blocker = start_workload("blocker", "io_uring", "PORT")
    if blocker.ask("KIND") != ["KIND io_uring ok"]:
        pytest.skip("this kernel has no io_uring")
    descriptors = Path(f"/proc/{blocker.process.pid}/fd").iterdir()
    assert "anon_inode:[io_uring]" in {link_of(fd) for fd in descriptors}


def test_asking_nobody_is_an_error() -> None:
    with pytest.raises(WorkloadError, match=r"127\.0\.0\.1 port 1"):
        ask("127.0.0.1", 1, ["KIND"])


def link_of(descriptor: Path) -> str:
    """What a descriptor of a running process is, or nothing when it was closed meanwhile."""
    try:
        return str(descriptor.readlink())
    except FileNotFoundError:
        return ""
