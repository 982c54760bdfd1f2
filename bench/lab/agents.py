"""The `migrate agent` of a lab host: started as a daemon, waited for, killed.

Knows of the agent its command, its port, and that it stays in the foreground.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

from bench.lab.errors import LabError
from bench.lab.host import Host

PORT = 7337
LOG = "/var/log/migrate-agent.log"
PID_FILE = "/run/migrate-agent.pid"
# A socket in /proc/net/tcp (proc(5)): number, its address and port, the peer's, the state, of which
# 0A is LISTEN.
_LISTENS = re.compile(rf"^ *\d+: [0-9A-F]+:{PORT:04X} [0-9A-F]+:0000 0A ", re.MULTILINE)
# The first start on a machine compiles all modules, and every other process waits meanwhile.
LISTEN_DEADLINE_S = 60.0
LOG_TAIL = 4000
# A killed process is gone when the kernel has given back its memory, page store and all.
KILL_DEADLINE_S = 20.0


def launch(host: Host, env: Mapping[str, str] | None = None) -> None:
    """Starts the agent as a daemon; what it writes goes to LOG inside the host."""
    script = f"echo $$ >{PID_FILE}; exec migrate agent >>{LOG} 2>&1 </dev/null"
    host.run(["setsid", "--fork", "sh", "-c", script], env=env)


def listens(host: Host) -> bool:
    """Whether the agent accepts TCP connections, by the kernel's table: a connection from inside
    takes several programs each time, on processors that the agent needs to get so far."""
    tables = (host.path(f"/proc/1/net/{name}").read_text() for name in ("tcp", "tcp6"))
    return any(_LISTENS.search(table) for table in tables)


def wait_listening(host: Host) -> None:
    """Returns when the agent accepts TCP connections; LabError with its log when it does not."""
    deadline_s = LISTEN_DEADLINE_S * host.patience
    deadline = time.monotonic() + deadline_s
    while not listens(host):
        pid = _pid(host)
        gone = pid is not None and not host.path(f"/proc/{pid}").exists()
        if gone or time.monotonic() > deadline:
            log_file = host.path(LOG)
            log = log_file.read_text(errors="replace")[-LOG_TAIL:] if log_file.exists() else ""
            state = "ended" if gone else f"does not listen after {deadline_s:g} s"
            raise LabError(f"the agent on {host.name} {state}; {LOG}: {log}")
        time.sleep(host.poll_s)


def kill(host: Host) -> None:
    """SIGKILL for the agent alone, as an out-of-memory killer would; returns when it is gone."""
    pid = _pid(host)
    if pid is None:
        raise LabError(f"no agent was started on {host.name}")
    host.run(["sh", "-c", f"kill -KILL {pid}"])
    deadline = time.monotonic() + KILL_DEADLINE_S * host.patience
    # Its front ends with it, a moment later, and must not be taken for the next one's.
    while host.path(f"/proc/{pid}").exists() or listens(host):
        if time.monotonic() > deadline:
            raise LabError(f"the agent on {host.name} is still there after its kill")
        time.sleep(host.poll_s)


def _pid(host: Host) -> int | None:
    """The agent's pid inside its host; None while it has none yet."""
    pid_file = host.path(PID_FILE)
    text = pid_file.read_text().strip() if pid_file.exists() else ""
    return int(text) if text else None
