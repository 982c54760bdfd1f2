"""The command line that runs a program inside a lab host. Pure: builds lists and environments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.lab.host_files import PATH_INSIDE
from bench.lab.sandbox import INIT_CGROUP


def enter_command(init_pid: int, cgroup: Path, command: Sequence[str]) -> list[str]:
    """Joins the host's cgroup, then all its namespaces, then becomes `command`.

    The cgroup first: a process outside of the host's cgroup namespace sees no own cgroup in it.
    nsenter stays as the parent of the command outside the host's pid namespace and ends with its
    status; when nsenter is killed, the command is too (setpriv).
    """
    return [
        "/bin/sh",
        "-c",
        'echo $$ >"$1" && shift && exec "$@"',
        "lab-enter",
        str(cgroup / INIT_CGROUP / "cgroup.procs"),
        *("nsenter", "-t", str(init_pid), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--"),
        *("/usr/bin/setpriv", "--pdeathsig", "KILL", "--"),
        *command,
    ]


def inside_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment of a command inside a host: nothing of the caller's is passed on."""
    return {
        "PATH": PATH_INSIDE,
        "HOME": "/root",
        "USER": "root",
        "LOGNAME": "root",
        "SHELL": "/bin/bash",
        "TERM": "xterm",
        "LANG": "C.UTF-8",
        **(extra or {}),
    }
