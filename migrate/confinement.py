"""Read what holds a container's threads back (proc(5)), and judge a copy that waits at pre-resume.

The agent judges its own copies. When it does not answer for a second, the hook starts this module,
which says the same word from what the agent has left in the session's directory:

    python3 -m migrate.confinement EXPECTED CGROUP HOLD_DIRECTORY
"""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from criu_glue import hooks
from criu_glue.errors import CriuGlueError, TaskGoneError
from criu_glue.mappings import Task, cgroup_pids
from criu_glue.urgency import give_timers_slack
from migrate import cgroup
from migrate.core.confinement import (
    LIMIT_MAX,
    THREADS_MAX,
    UNLIMITED,
    Confinements,
    Sheet,
    weaker,
)
from migrate.errors import MigrateError
from migrate.processes import module_command

if TYPE_CHECKING:
    from collections.abc import Iterable

# CRIU restores in the container's cgroup, where whoever it starts begins.
_MOVE = 'echo $$ > "$0"; exec "$@"'
_STATUS = re.compile(
    r"^(State|NSpid|Uid|Gid|Groups|Cap(?:Inh|Prm|Eff|Bnd|Amb)|NoNewPrivs|Seccomp|Seccomp_filters)"
    r":[ \t]*(.*?)[ \t]*$",
    re.MULTILINE,
)
_LIMIT = re.compile(r"^(Max \S+(?: \S+)*?) {2,}(\d+|unlimited) +(\d+|unlimited)", re.MULTILINE)


class ConfinementError(MigrateError):
    """Nobody can say what confines the tasks of a container."""


class _Shared(NamedTuple):
    """What the threads of a process have in common."""

    user_map: str
    group_map: str
    setgroups: str
    oom_score_adj: int
    limits: tuple[tuple[str, int, int], ...]


def read(directory: Path) -> Confinements:
    """Of every living thread of the cgroup `directory` that is in a pid namespace of its own, as
    containers are and CRIU is not. The tasks must stand still. Blocking. Raises ConfinementError.
    """
    try:
        return _read(directory)
    except (CriuGlueError, OSError, LookupError, ValueError) as error:
        raise ConfinementError(f"what confines the tasks can't be read: {error}") from error


def labels(pids: Iterable[int]) -> tuple[str, ...]:
    """Those that a security module has given the processes that live, each once."""
    found: dict[str, None] = {}
    for pid in pids if _has_labels() else ():
        with contextlib.suppress(TaskGoneError), contextlib.closing(Task(pid)) as task:
            found[_label(task, pid)] = None
    return tuple(found)


def maps_of(pid: int) -> tuple[str, str]:
    """What a process's users and groups are here, as a sheet says it. Blocking. Raises
    ConfinementError."""
    try:
        with contextlib.closing(Task(pid)) as task:
            return _map(task.read("uid_map")), _map(task.read("gid_map"))
    except (CriuGlueError, OSError) as error:
        raise ConfinementError(f"whose ids a task has can't be read: {error}") from error


def differences(expected: Confinements, directory: Path) -> list[str]:
    """In what a copy is held back less, or why it can't be looked at. Blocking."""
    try:
        return weaker(expected, read(directory))
    except ConfinementError as error:
        return [error.message]


def command(expected: Path, directory: Path, hold: Path) -> tuple[str, ...]:
    """The command line of a judge of one copy, in the cgroup of this process."""
    return (
        *("sh", "-c", _MOVE, str(cgroup.own() / "cgroup.procs")),
        *module_command("migrate.confinement", str(expected), str(directory), str(hold)),
    )


def main() -> int:
    """Judge, and say so; 0 when the hook has been told."""
    expected, directory, hold = map(Path, sys.argv[1:])
    try:
        confinements = msgspec.json.decode(expected.read_bytes(), type=Confinements)
        give_timers_slack(directory)
        found = differences(confinements, directory)
    except (OSError, msgspec.DecodeError) as error:
        found = [f"nobody knows what its source was: {error}"]
    return 0 if hooks.judge(hold, "refuse" if found else "run") else 1


def _read(directory: Path) -> Confinements:
    seen: dict[tuple[object, ...], int] = {}
    sheets: list[Sheet] = []
    threads: dict[int, int] = {}
    has_labels = _has_labels()
    for pid in cgroup_pids(directory):
        with contextlib.suppress(TaskGoneError), contextlib.closing(Task(pid)) as task:
            shared: _Shared | None = None
            for thread in task.threads():
                status = dict(_STATUS.findall(task.read(f"task/{thread}/status").decode()))
                numbers = status.pop("NSpid").split()
                if status.pop("State")[0] in "ZX" or len(numbers) < 2:
                    continue
                shared = shared or _of_process(task)
                label = _label(task, thread) if has_labels else ""
                key = (*status.values(), label, shared)
                if key not in seen:
                    seen[key] = len(sheets)
                    sheets.append(_sheet(status, label, shared))
                threads[int(numbers[-1])] = seen[key]
    if len(threads) > THREADS_MAX:
        raise ValueError(f"{len(threads)} threads are more than {THREADS_MAX}")
    return Confinements(tuple(sheets), threads)


def _sheet(status: dict[str, str], label: str, shared: _Shared) -> Sheet:
    return Sheet(
        users=_four(status["Uid"]),
        groups=_four(status["Gid"]),
        more_groups=tuple(map(int, status["Groups"].split())),
        inheritable=int(status["CapInh"], 16),
        permitted=int(status["CapPrm"], 16),
        effective=int(status["CapEff"], 16),
        bounding=int(status["CapBnd"], 16),
        ambient=int(status["CapAmb"], 16),
        no_new_privileges=status["NoNewPrivs"] == "1",
        seccomp=int(status["Seccomp"]),
        # Since Linux 5.9.
        filters=int(status.get("Seccomp_filters", "0")),
        label=label,
        user_map=shared.user_map,
        group_map=shared.group_map,
        setgroups=shared.setgroups,
        oom_score_adj=shared.oom_score_adj,
        limits={name: (soft, hard) for name, soft, hard in shared.limits},
    )


def _of_process(task: Task) -> _Shared:
    limits = _LIMIT.findall(task.read("limits").decode())
    return _Shared(
        user_map=_map(task.read("uid_map")),
        group_map=_map(task.read("gid_map")),
        setgroups=task.read("setgroups").decode().strip(),
        oom_score_adj=int(task.read("oom_score_adj")),
        limits=tuple((name, _limit(soft), _limit(hard)) for name, soft, hard in limits),
    )


def _limit(text: str) -> int:
    return UNLIMITED if text == "unlimited" else min(int(text), LIMIT_MAX)


def _map(text: bytes) -> str:
    return "\n".join(" ".join(line.split()) for line in text.decode().splitlines())


def _four(text: str) -> tuple[int, int, int, int]:
    real, effective, saved, of_files = map(int, text.split())
    return real, effective, saved, of_files


def _has_labels() -> bool:
    """Without a security module there is nothing to be read (EINVAL)."""
    try:
        return bool(Path("/proc/self/attr/current").read_bytes())
    except OSError:
        return False


def _label(task: Task, thread: int) -> str:
    return task.read(f"task/{thread}/attr/current").decode(errors="replace").strip("\0\n")


if __name__ == "__main__":
    sys.exit(main())
