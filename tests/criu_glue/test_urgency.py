"""Real-time scheduling of real processes; the machine's kernel grants it to root."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from criu_glue.urgency import (
    FILL,
    STANDSTILL,
    TIMER_SLACK_NS,
    TRACER,
    give_timers_slack,
    make_urgent,
)

NORMAL: Final = [os.SCHED_OTHER, 0]
URGENT: Final = [os.SCHED_RR | os.SCHED_RESET_ON_FORK, STANDSTILL]
# What it is asked goes on in a process of its own, with another thread than the asking one.
PRELUDE: Final = """\
import json, os, subprocess, sys, threading
from contextlib import ExitStack
from pathlib import Path
from criu_glue.urgency import STANDSTILL, Urgency, make_urgent

threading.Thread(target=threading.Event().wait, daemon=True).start()
ASK = "import os; print(os.sched_getscheduler(0), os.sched_getparam(0).sched_priority)"

def seen(pid=os.getpid()):
    threads = [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    found = {(os.sched_getscheduler(one), os.sched_getparam(one).sched_priority) for one in threads}
    assert len(threads) == 2 and len(found) == 1, (threads, found)
    return list(*found)

def seen_by_child():
    said = subprocess.run([sys.executable, "-c", ASK], capture_output=True, check=True)
    return [int(word) for word in said.stdout.split()]
"""


def told(script: str) -> Any:
    """What it prints last, as JSON."""
    command = [sys.executable, "-c", PRELUDE + script]
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def test_all_threads_are_urgent_until_nobody_wants_it() -> None:
    script = """
urgency, steps = Urgency(), []
with urgency:
    steps += [seen(), seen_by_child()]
    with urgency:
        pass
    steps.append(seen())
steps.append(seen())
print(json.dumps(steps))
"""
    assert told(script) == [URGENT, NORMAL, URGENT, NORMAL]


def test_others_are_as_urgent_and_asked_for_each_time() -> None:
    script = """
SLEEP = "import threading; threading.Thread(target=input).start(); print(flush=True); input()"
with subprocess.Popen(
    [sys.executable, "-c", SLEEP], stdin=subprocess.PIPE, stdout=subprocess.PIPE
) as other:
    other.stdout.readline()
    pids, steps = [], []
    urgency = Urgency(lambda: pids)
    with urgency:
        steps.append(seen(other.pid))
        pids.append(other.pid)
        with urgency:
            steps.append(seen(other.pid))
    steps.append(seen(other.pid))
    other.communicate(b"\\n\\n")
print(json.dumps(steps))
"""
    assert told(script) == [NORMAL, URGENT, NORMAL]


def test_what_is_started_is_urgent_where_that_is_inherited() -> None:
    script = """
make_urgent(os.getpid(), STANDSTILL, inherited=True)
print(json.dumps(seen_by_child()))
"""
    assert told(script) == [os.SCHED_RR, STANDSTILL]


def test_who_is_waited_for_most_is_most_urgent() -> None:
    assert 0 < FILL < STANDSTILL < TRACER


def test_a_process_that_is_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    make_urgent(process.pid, STANDSTILL, inherited=True)


def test_tasks_of_an_urgent_parent_get_the_slack_of_all_others(tmp_path: Path) -> None:
    """The cgroup is played by a directory."""
    script = """
make_urgent(os.getpid(), STANDSTILL, inherited=True)
task = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
os.sched_setscheduler(task.pid, os.SCHED_OTHER, os.sched_param(0))
print(task.pid)
"""
    task = told(script)
    try:
        slack = Path(f"/proc/{task}/timerslack_ns")
        (tmp_path / "cgroup.procs").write_text(f"{task}\n")
        give_timers_slack(tmp_path)
        assert int(slack.read_text()) == TIMER_SLACK_NS
        slack.write_text("70000")
        give_timers_slack(tmp_path)
        assert int(slack.read_text()) == 70_000
    finally:
        os.kill(task, signal.SIGKILL)


def test_a_cgroup_that_is_gone(tmp_path: Path) -> None:
    give_timers_slack(tmp_path / "none")
