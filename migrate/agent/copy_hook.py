"""Programs of a target's operator that a copy meets before its first instruction.

    /etc/migrate/
    clone.d/NAME            a program
    clone.d/NAME/…          several, run in the order of their names

Who asks for a copy says NAME and no more: the programs are this host's own, and only such that
nobody but root can have written. They run while CRIU holds the restored tasks, in the copy's
namespaces, cgroup and root, as its root, held back as its first task will be (`in_copy.py`); its
network is not plugged in yet. One that fails, or all together when they take too long, end the
copy, which has executed nothing then.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Final

import msgspec

from criu_glue.errors import TaskGoneError
from criu_glue.mappings import Task, cgroup_pids
from migrate import config, confinement
from migrate.agent.in_copy import HOOK_BYTES_MAX, InCopy
from migrate.drain_hooks import refused
from migrate.errors import RestoreFailed
from migrate.processes import module_command
from migrate.refusals import Refusal

if TYPE_CHECKING:
    from pathlib import Path

    from migrate.core.confinement import Confinements
    from migrate.core.messages import OpenSession

PROGRAMS_MAX: Final = 8
_SAID_BYTES_MAX: Final = 4096
_SAID_CHARS_MAX: Final = 300
_FIRST: Final = 1


def refusals(request: OpenSession, directory: Path) -> list[Refusal]:
    """Why a copy can't meet what it is to meet; `directory` is the host's. Blocking."""
    if not request.copy_of or not request.copy_of.hook:
        return []
    try:
        _programs(directory, request.copy_of.hook)
    except RestoreFailed as error:
        return [Refusal("hook", error.message, error.remedy)]
    return []


async def run(
    request: OpenSession, confinements: Confinements, cgroup: Path, directory: Path
) -> None:
    """Run what was asked for, one after the other. Raises RestoreFailed."""
    if not request.copy_of or not request.copy_of.hook:
        return
    found = await asyncio.to_thread(_programs, directory, request.copy_of.hook)
    first = await asyncio.to_thread(first_task, cgroup)
    if first is None or _FIRST not in confinements.threads:
        raise RestoreFailed("the copy has no first task that a hook could be run beside")
    sheet = confinements.sheets[confinements.threads[_FIRST]]
    maps = await asyncio.to_thread(confinement.maps_of, first)
    if maps != (sheet.user_map, sheet.group_map):
        raise RestoreFailed(
            "the copy's first task was restored with other users or groups than its original has,"
            " so no hook was run in it",
            phase="restore",
            remedy="see what its source has sent: nothing but its images says so",
        )
    plan = InCopy(
        task=first,
        cgroup=str(cgroup),
        bounding=sheet.bounding,
        is_filtered=sheet.seccomp != 0,
        label=sheet.label,
        environment=_environment(request),
    )
    deadline_s = config.COPY_HOOK_DEADLINE_S
    for program in found:
        began_s = time.monotonic()
        why = await _run(program, plan, deadline_s)
        deadline_s -= time.monotonic() - began_s
        if why:
            raise RestoreFailed(
                f"the hook {program.name} {why}",
                phase="restore",
                remedy=f"mend {program}, or copy without it",
            )


def first_task(cgroup: Path) -> int | None:
    """The pid here of the container's first task; None when there is none. Blocking."""
    for pid in cgroup_pids(cgroup):
        with contextlib.suppress(TaskGoneError), contextlib.closing(Task(pid)) as task:
            numbers = task.status("NSpid").split()
            if len(numbers) > 1 and int(numbers[-1]) == _FIRST:
                return pid
    return None


def _programs(directory: Path, name: str) -> list[Path]:
    """What `name` stands for. Raises RestoreFailed for what is not there or not to be run."""
    wanted = directory / name
    found = sorted(wanted.iterdir()) if wanted.is_dir() else [wanted]
    if not wanted.exists() or not 0 < len(found) <= PROGRAMS_MAX:
        raise RestoreFailed(
            f"there is no hook {name} in {directory}, or it is none or more than {PROGRAMS_MAX}"
            " programs",
            remedy="name one that this host's operator has put there",
        )
    for program in found:
        if why := _unfit(program):
            raise RestoreFailed(
                f"the hook {program} {why}", remedy=f"chown root {program}; chmod 755 {program}"
            )
    return found


def _unfit(program: Path) -> str:
    try:
        if not program.is_file() or program.stat().st_size > HOOK_BYTES_MAX:
            return f"was not run: it is no file of at most {HOOK_BYTES_MAX >> 20} MiB"
        return refused(program)
    except OSError as error:
        return f"was not run: {error.strerror}"


def _environment(request: OpenSession) -> dict[str, str]:
    assert request.copy_of
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "MIGRATE_COPY": request.container,
        "MIGRATE_COPY_OF": request.copy_of.container,
        "MIGRATE_COPY_ADDRESSES": " ".join(own for _, own in request.copy_of.renamed),
    }


async def _run(program: Path, plan: InCopy, deadline_s: float) -> str:
    """Why it has failed, empty if it has not."""
    descriptor = os.open(program, os.O_RDONLY | os.O_CLOEXEC)
    try:
        process = await asyncio.create_subprocess_exec(
            *module_command("migrate.agent.in_copy", str(descriptor), program.name),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=(descriptor,),
        )
    finally:
        os.close(descriptor)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(deadline_s):
            process.stdin.write(msgspec.json.encode(plan))
            process.stdin.close()
            said = await process.stdout.read(_SAID_BYTES_MAX)
            # Whatever more it says: it must not wait for a reader.
            while await process.stdout.read(_SAID_BYTES_MAX):
                pass
            code = await process.wait()
    except TimeoutError:
        return f"was not done within {deadline_s:.0f} s"
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    words = said.decode("utf-8", "replace").strip()[-_SAID_CHARS_MAX:]
    return f"ended with {code}: {words}" if code else ""
