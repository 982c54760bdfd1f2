"""Gate, observe and hold one CRIU run that a container runtime starts.

A runtime (runc) starts CRIU itself and takes its time before it does. Three small programs, written
into a directory of the migration, give us the moments that matter:

    runtime ──exec──> bin/criu (gate) ──exec──> real criu ──system()──> hook, at every action
                         │  ^                                             │  ^
                 "gate"  v  │ "go"                        "post-dump" …   v  │ "commit" | "abort"
                        events  gate                                 events  verdict      (FIFOs)

- The program *bin/criu* is first in the runtime's PATH. It looks at the first request on the
  runtime's socket (MSG_PEEK, so CRIU still reads it): feature checks pass, DUMP and RESTORE come to
  the gate. So the runtime's own preparation is over before anything is frozen. A gate whose maker
  is gone fails, and the runtime with it: nothing has been frozen or restored yet.
- A restore stands at the gate before it executes CRIU, which begins with the images. A dump stands
  there in CRIU's pre-dump hook: it has started then, and has not looked at any task
  (`criu/cr-dump.c: cr_dump_tasks`).
- The *hook* is CRIU's action script. It reports each action, and at one of them (post-dump on the
  source, post-restore on the target) it waits for a verdict. Its failure there makes CRIU undo all
  it did: `criu/cr-dump.c: cr_dump_finish`, `criu/cr-restore.c: restore_root_task`. A hook that was
  killed counts as failed (`criu/util.c: cr_system_userns`), which is the safe side.
- The hook waits for ever: a hold outlives whoever made it, and any later process may decide by
  writing one word. When no word comes for a second it starts a program (`HoldPlan.orphaned`) that
  can find out whether anybody is left to say one, and what it is.
- On the source the hook freezes the tasks' cgroup before it says that it holds: they are stopped by
  CRIU's ptrace alone, and would go on the moment that CRIU is killed. On the target they wait for
  CRIU in a futex (`criu/cr-restore.c: __restore_switch_stage`), so there they stay.
- A copy has a second, short hold at pre-resume (`HoldPlan.judged`): only there have its tasks their
  credentials and seccomp filters (`criu/pie/restorer.c`: behind the stage that post-restore is in),
  and they stand in CRIU's ptrace, before their first instruction. The word is "run" or "refuse".
  The failure of this hook would only be logged, so a refused copy is killed by it, by its init.
- A network namespace that CRIU makes is empty, and sockets need their addresses. So CRIU is held at
  setup-namespaces as well (`HoldPlan.needs_network`), until whoever drives it says "go". When that
  one is gone CRIU fails, as at the gate.
- CRIU is urgent from the gate on (`urgency.py`), with all that it starts.
- Each action leaves a file `seen.ACTION`, and the gate CRIU's pid in `criu.pid`, for a process that
  comes later and has heard no event.

A lazy dump wants a page server. The gate hands CRIU a socket that is at its end already
(`ps-socket`), so that no port is opened, nobody can ask for pages, and CRIU finishes as soon as the
hook has let it go: `criu/page-xfer.c: page_server_serve` takes the end of file for success.

CRIU dumps and fills a tmpfs by `tar --gzip` (`criu/filesystems.c`), while the container stands
still. The program *bin/tar* leaves the `gzip` out: it takes longer than all else where there are a
few devices in a tmpfs, and far longer where there is much. It fills from either kind. Where it may
not be executed, in a user namespace, `execvp` finds the host's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shlex
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from criu_glue import urgency
from criu_glue.errors import CriuGlueError

if TYPE_CHECKING:
    from collections.abc import Mapping

Verdict = Literal["commit", "abort"]
Judgement = Literal["run", "refuse"]

# The descriptor on which the gate leaves CRIU its finished page-server socket. Above what runtimes
# pass (runc: 3..7), below CRIU's own service descriptors, which start at the top of the limit.
PAGE_SERVER_FD = 40

# How long a hold lasts before somebody looks after it: longer than any hand-over that goes well.
PATIENCE_S = 1

# CRIU's hooks send one word each; a line longer than this is not one of ours.
EVENT_LINE_BYTES_MAX = 256

_GATE = """\
#!/usr/bin/python3 -ISE
import os, select, socket, sys
if len(sys.argv) > 2 and sys.argv[1] == "swrk":
    peer = socket.socket(fileno=int(sys.argv[2]))
    request = peer.recv(2, socket.MSG_PEEK)
    peer.detach()
    # criu_req.type is field 1: 0x08, then DUMP=1 or RESTORE=2 (criu/images/rpc.proto)
    if request in (b"\\x08\\x01", b"\\x08\\x02"):
        ours, theirs = socket.socketpair()
        os.dup2(ours.fileno(), {page_server_fd}, inheritable=True)
        ours.close()
        theirs.close()
        with open({pid!r}, "w") as pid:
            pid.write(f"{{os.getpid()}} {{os.getppid()}}\\n")
        # A dump lets go of its tasks when it dies: the kernel takes another process when memory
        # runs out. Not so a restore: its tasks would inherit this where their own value is 0.
        if request == b"\\x08\\x01":
            try:
                with open("/proc/self/oom_score_adj", "w") as rank:
                    rank.write("-1000")
            except OSError:
                pass
        elif {join!r}:
            with open({join!r}, "w") as group:
                group.write("0")
        # Behind the cgroup, which may have no real-time share: then it is refused and no more.
        try:
            os.sched_setscheduler(0, os.SCHED_RR, os.sched_param({priority}))
        except OSError:
            pass
    if request == b"\\x08\\x02":
        with open({events!r}, "r+b", buffering=0) as events:
            events.write(b"gate\\n")
        # Whoever made the gate keeps it open for writing: no writer, or its end, is his end.
        gate = os.open({gate!r}, os.O_RDONLY | os.O_NONBLOCK)
        waiting = select.poll()
        waiting.register(gate, select.POLLIN)
        try:
            word = os.read(gate, 64)
        except BlockingIOError:
            waiting.poll()
            word = os.read(gate, 64)
        os.close(gate)
        if word != b"go\\n":
            sys.exit(1)
os.execv({criu!r}, ["criu", *sys.argv[1:]])
"""

_PREFIXED = """\
#!/bin/sh
exec {} "$@"
"""

# GNU tar looks itself whether an archive is compressed, if it may open it.
_TAR = """\
#!/bin/sh
# CRIU runs this for each tmpfs; see criu_glue/hooks.py.
for option; do
    shift
    [ "$option" = --gzip ] || set -- "$@" "$option"
done
[ "$1" != --extract ] || set -- "$@" --file=/proc/self/fd/0
exec {tar} "$@"
"""

_HOOK = """\
#!/bin/sh
# CRIU runs this at each of its actions; see criu_glue/hooks.py.
action=$CRTOOLS_SCRIPT_ACTION holds=
true > {seen}."$action"
{gate}{network}{at_unlock}{judged}[ "$action" = {hold_at} ] && holds=1
{freeze}echo "$action" 1<> {events}
[ "$holds" ] || exit 0
{watch}read -r verdict <> {verdict}
{unwatch}[ "$verdict" = commit ] || exit 1
{check}: > {committed}
"""

# A copy may only be let go by a CRIU that lives on (neither PF_EXITING nor with SIGKILL pending:
# proc_pid_stat(5), behind the name) and whose runtime does and is its parent still: without it CRIU
# runs no hook any more, so the tasks would be let go unjudged and the network not. A process that
# dies has closed its connections before its children have another parent.
_CHECK = """\
lives() {{
    read -r stat < /proc/$1/stat && set -- ${{stat##*) }} && parent=$2 &&
        [ $((($7 & 4) | (${{29}} & 256))) = 0 ]
}}
read -r _ runtime < {pid} && lives "$runtime" && lives $PPID && [ "$parent" = "$runtime" ] && """

_FREEZE = """\
[ "$holds" ] && echo 1 > {cgroup_freeze}
"""

# A program that starts at once would cost the hand-over its time.
_WATCH = """\
(
    trap 'kill $sleeper; exit' TERM
    sleep {patience_s} & sleeper=$!
    wait $sleeper
    trap - TERM
    exec {command}
) > /dev/null 2>&1 < /dev/null & watch=$!
"""
_UNWATCH = "kill $watch\n"

# CRIU unlocks the network after a failed restore too, with the tasks dead: a port plugged then
# would have the kernel answer the container's clients with RST.
_AT_UNLOCK = """\
if [ "$action" = network-unlock ] && [ -e {committed} ]; then
    {{ {command}; }} || echo network-unlock-failed 1<> {events}
fi
"""


# The mark comes behind the kill: a hook that ends in between has refused nothing. The port goes
# first, so that no client hears of the sockets' end.
_JUDGED = """\
if [ "$action" = pre-resume ]; then
    echo "$action" 1<> {events}
    {watch}read -r word <> {judgement}
    {unwatch}if [ "$word" = run ]; then
        {settling}exit 0
    fi
    {unplug}kill -KILL "$CRTOOLS_INIT_PID" && : > {refused}
    exit 1
fi
"""


# Open for reading only, a FIFO ends with its last writer; that one may be gone already, and then
# nobody could open it so, but for a writer of our own.
_UNTIL_GO = """\
if [ "$action" = {action} ]; then
    exec 3<> {fifo} 4< {fifo} 3>&-
    {before}echo {event} 1<> {events}
    read -r word <&4
    [ "$word" = go ]
    exit
fi
"""


# CRIU has to go on, and would freeze with its tasks; so would this hook. A runtime that has ended
# may be a zombie, until whoever started it looks.
_SETTLING = """\
echo $PPID > {outside} && echo $$ > {outside} && echo 1 > {cgroup_freeze}
        read -r _ runtime < {pid}
        (
            while read -r stat < /proc/$runtime/stat; do
                case ${{stat##*) }} in [ZX]*) break ;; esac
                sleep 0.002
            done
            echo 0 > {cgroup_freeze}
            : > {seen}.settled
        ) > /dev/null 2>&1 < /dev/null &
        """


class Waitable(Protocol):
    """The runtime's process, as asyncio's or any other."""

    async def wait(self) -> int:
        """Return when it has ended; may be cancelled."""
        ...


@dataclass(frozen=True, slots=True)
class HoldPlan:
    """What one CRIU run is to do besides what the runtime asks of it.

    `hold_at` is the action at which CRIU waits for the verdict. `at_unlock` are command lines that
    run exactly when CRIU says that sockets may speak again. `options` are lines of
    CRIU's configuration file. `freeze` is the cgroup that is frozen as long as CRIU is held. `join`
    is the cgroup of what is restored, which CRIU begins in, so that its tasks are born there.
    `outside`, for a copy that is judged and a runtime that sets the limits of its tasks when CRIU
    has ended: the cgroup that CRIU goes back to before they may run. They stay frozen then until
    the runtime has ended (`seen.settled`).
    `orphaned` is started when the hold lasts (see the module) and ended with it. `judged` is the
    same for the hold at pre-resume, which there is only if it is given; `at_refusal` are command
    lines that run before a refused copy is killed. `needs_network`: CRIU makes a network namespace
    and waits until it is filled. `prefix`: in front of the gate's command line; it ends in an exec.
    """

    hold_at: Literal["post-dump", "post-restore"]
    options: tuple[str, ...]
    at_unlock: tuple[tuple[str, ...], ...] = ()
    freeze: Path | None = None
    join: Path | None = None
    outside: Path | None = None
    orphaned: tuple[str, ...] = ()
    judged: tuple[str, ...] = ()
    at_refusal: tuple[tuple[str, ...], ...] = ()
    needs_network: bool = False
    prefix: tuple[str, ...] = ()


@dataclass(slots=True)
class CriuHold:
    """The gate, the hook and the FIFOs of one CRIU run, seen from the process that drives it.

    Must be created and used in one event loop. Raises CriuGlueError when CRIU is not installed,
    or `tar`.
    """

    directory: Path
    marks_us: dict[str, int] = field(default_factory=dict)
    _seen: dict[str, asyncio.Event] = field(default_factory=dict)
    _fds: dict[str, int] = field(default_factory=dict)
    _pending: bytes = b""

    @classmethod
    def prepare(cls, directory: Path, plan: HoldPlan) -> CriuHold:
        """Write the programs into `directory`, which is made; its file system allows execution."""
        criu, tar = _installed("criu"), _installed("tar")
        (directory / "bin").mkdir(mode=0o700, parents=True)
        hold = cls(directory)
        for fifo in ("events", "gate", "network", "verdict", "judgement"):
            os.mkfifo(directory / fifo, 0o600)
            # Read and write: opening never blocks, and the pipe keeps what was written to it until
            # the other side opens it.
            hold._fds[fifo] = os.open(directory / fifo, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        gate = _GATE.format(
            page_server_fd=PAGE_SERVER_FD,
            pid=str(directory / "criu.pid"),
            events=str(directory / "events"),
            gate=str(directory / "gate"),
            criu=criu,
            priority=urgency.STANDSTILL,
            join="" if plan.join is None else str(plan.join / "cgroup.procs"),
        )
        # A gate is known by its name, too (`criu_pid`).
        gate_program = directory / "bin" / "criu"
        if plan.prefix:
            gate_program = directory / "prefixed" / "criu"
            gate_program.parent.mkdir(mode=0o700)
            command = shlex.join((*plan.prefix, str(gate_program)))
            _write_program(directory / "bin" / "criu", _PREFIXED.format(command))
        _write_program(gate_program, gate)
        _write_program(directory / "bin" / "tar", _TAR.format(tar=shlex.quote(tar)))
        _write_program(directory / "hook", _hook_text(directory, plan))
        lines = (*plan.options, f"action-script {directory / 'hook'}")
        (directory / "criu.conf").write_text("\n".join(lines) + "\n")
        asyncio.get_running_loop().add_reader(hold._fds["events"], hold._read_events)
        return hold

    def environment(self, base: Mapping[str, str]) -> dict[str, str]:
        """`base` with PATH and CRIU_CONFIG_FILE such that the runtime's CRIU is this one."""
        return {
            **base,
            "PATH": f"{self.directory / 'bin'}:{base.get('PATH', os.defpath)}",
            "CRIU_CONFIG_FILE": str(self.directory / "criu.conf"),
        }

    async def wait_or_end(self, action: str, runtime: Waitable, deadline_s: float) -> int | None:
        """Wait for an action of CRIU, or for "gate"; returns when it was seen (monotonic, µs).

        None when the runtime ended before it came, or the deadline passed.
        """
        acted = asyncio.create_task(self._event(action).wait())
        ended = asyncio.create_task(runtime.wait())
        try:
            await asyncio.wait(
                {acted, ended}, timeout=deadline_s, return_when=asyncio.FIRST_COMPLETED
            )
            if ended.done() and not acted.done():
                # The hook's last word may still be in the pipe.
                self._read_events()
        finally:
            acted.cancel()
            ended.cancel()
        return self.marks_us.get(action)

    def open_gate(self) -> int:
        """Let the waiting CRIU start; returns the moment (monotonic, µs)."""
        os.write(self._fds["gate"], b"go\n")
        return time.monotonic_ns() // 1000

    def decide(self, verdict: Verdict) -> int:
        """Answer the hold, whether CRIU waits at it already or not; returns the moment (µs)."""
        if verdict == "abort":
            with contextlib.suppress(BlockingIOError):
                os.write(self._fds["gate"], b"abort\n")
        os.write(self._fds["verdict"], verdict.encode() + b"\n")
        return time.monotonic_ns() // 1000

    def judge(self, word: Judgement) -> int:
        """Answer the hold at pre-resume; returns the moment (µs)."""
        os.write(self._fds["judgement"], word.encode() + b"\n")
        return time.monotonic_ns() // 1000

    def init_pid(self) -> int:
        """The container's first task, once CRIU is at setup-namespaces."""
        return int((self.directory / "init.pid").read_text())

    def network_is_made(self) -> None:
        """Answer the hold at setup-namespaces."""
        os.write(self._fds["network"], b"go\n")

    def close(self) -> None:
        """Give up observing. A CRIU that is held stays held."""
        if "events" in self._fds:
            asyncio.get_running_loop().remove_reader(self._fds["events"])
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _event(self, action: str) -> asyncio.Event:
        return self._seen.setdefault(action, asyncio.Event())

    def _read_events(self) -> None:
        now_us = time.monotonic_ns() // 1000
        try:
            self._pending += os.read(self._fds["events"], 4096)
        except BlockingIOError:
            return
        *lines, self._pending = self._pending.split(b"\n")
        if len(self._pending) > EVENT_LINE_BYTES_MAX:
            self._pending = b""
        for line in lines:
            action = line.decode("ascii", "replace")
            self.marks_us.setdefault(action, now_us)
            self._event(action).set()


def abort_from_outside(directory: Path) -> bool:
    """Tell a gate or a hold that another process made to abort, but not a hold at pre-resume; True
    when one of them waited.

    Call again until the runtime has ended.
    """
    told = [_say(directory / fifo, "abort") for fifo in ("gate", "network", "verdict")]
    return any(told)


def say(directory: Path, verdict: Verdict) -> bool:
    """Answer a hold that another process made; True when it waited.

    Opening a FIFO for writing succeeds only while somebody reads it (`fifo(7)`), so nothing is left
    in it for a CRIU that comes later.
    """
    return _say(directory / "verdict", verdict)


def judge(directory: Path, word: Judgement) -> bool:
    """Answer a hold at pre-resume that another process made; True when it waited."""
    return _say(directory / "judgement", word)


def is_held(directory: Path) -> bool:
    """Whether a CRIU waits for its verdict."""
    return _say(directory / "verdict", "")


def has_seen(directory: Path, action: str) -> bool:
    """Whether CRIU has come to an action, by the mark that its hook has left."""
    return (directory / f"seen.{action}").exists()


def is_let_go(directory: Path) -> bool:
    """Whether the hook has let CRIU go on: from then on restored tasks may have run, unless they
    were refused at pre-resume."""
    return (directory / "committed").exists() and not is_refused(directory)


def is_refused(directory: Path) -> bool:
    """Whether a copy was killed at pre-resume: it has executed nothing."""
    return (directory / "refused").exists()


def criu_pid(directory: Path) -> int | None:
    """The process that was the gate and became CRIU; None when it has ended or never was.

    Its number may be another's by now, so its name must be right. CRIU overwrites its command line.
    """
    try:
        pid = int((directory / "criu.pid").read_text().split()[0])
        # "PID (NAME) STATE …" (proc_pid_stat(5)); a zombie has ended.
        name, state = Path("/proc", str(pid), "stat").read_text().split()[1:3]
    except (OSError, ValueError, IndexError):
        return None
    return pid if name == "(criu)" and state not in "ZX" else None


def has_criu_died(directory: Path) -> bool:
    """Whether there was a CRIU, beyond or at its gate, and is none any more."""
    with contextlib.suppress(FileNotFoundError):
        # A gate that has just made the file has not written into it yet.
        return (directory / "criu.pid").stat().st_size > 0 and criu_pid(directory) is None
    return False


def _say(fifo: Path, word: str) -> bool:
    """Whether somebody reads; without a word only that is found out."""
    try:
        fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.ENXIO, errno.ENOENT):
            raise
        return False
    with os.fdopen(fd, "wb", buffering=0) as waiting:
        if word:
            waiting.write(word.encode() + b"\n")
    return True


def _hook_text(directory: Path, plan: HoldPlan) -> str:
    def quoted(name: str) -> str:
        return shlex.quote(str(directory / name))

    gate = at_unlock = freeze = watch = judged = network = ""
    if plan.hold_at == "post-dump":
        gate = _UNTIL_GO.format(
            action="pre-dump", event="gate", fifo=quoted("gate"), before="", events=quoted("events")
        )
    if plan.needs_network:
        network = _UNTIL_GO.format(
            action="setup-namespaces",
            event="setup-namespaces",
            fifo=quoted("network"),
            before=f'echo "$CRTOOLS_INIT_PID" > {quoted("init.pid")}\n    ',
            events=quoted("events"),
        )
    if plan.at_unlock:
        command = " && ".join(shlex.join(words) for words in plan.at_unlock)
        at_unlock = _AT_UNLOCK.format(
            command=command, committed=quoted("committed"), events=quoted("events")
        )
    if plan.freeze is not None:
        freeze = _FREEZE.format(cgroup_freeze=shlex.quote(str(plan.freeze / "cgroup.freeze")))
    if plan.orphaned:
        watch = _WATCH.format(patience_s=PATIENCE_S, command=shlex.join(plan.orphaned))
    settling = ""
    if plan.outside is not None and plan.join is not None:
        settling = _SETTLING.format(
            outside=shlex.quote(str(plan.outside / "cgroup.procs")),
            cgroup_freeze=shlex.quote(str(plan.join / "cgroup.freeze")),
            pid=quoted("criu.pid"),
            seen=quoted("seen"),
        )
    if plan.judged:
        unplug = "".join(f"{shlex.join(words)}; " for words in plan.at_refusal)
        judged = _JUDGED.format(
            events=quoted("events"),
            watch=_WATCH.format(patience_s=PATIENCE_S, command=shlex.join(plan.judged)),
            judgement=quoted("judgement"),
            unwatch=_UNWATCH,
            settling=settling,
            unplug=unplug,
            refused=quoted("refused"),
        )
    return _HOOK.format(
        gate=gate,
        network=network,
        at_unlock=at_unlock,
        judged=judged,
        freeze=freeze,
        watch=watch,
        unwatch=_UNWATCH if watch else "",
        check=_CHECK.format(pid=quoted("criu.pid")) if plan.hold_at == "post-restore" else "",
        committed=quoted("committed"),
        events=quoted("events"),
        seen=quoted("seen"),
        hold_at=plan.hold_at,
        verdict=quoted("verdict"),
    )


def _installed(program: str) -> str:
    path = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None:
        raise CriuGlueError(f"{program} is not installed")
    return path


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o700)
