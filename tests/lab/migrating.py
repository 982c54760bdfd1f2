"""Migrations in the lab as tests run them: containers with a client, the command, what is left.

    with resident(lab, spec) as guest:                   # runs on A, a client streams
        moved = migrate(lab.host("A"), guest.name, "B")  # the command, to its end
        assert moved.code == 0, moved
        guest.verify()
        assert running_on(lab, guest.name) == ["B"]
        assert guest.stop_probe().clean
        assert remains(lab.host("A")) == []

`begin` starts the command and lets the test act while it runs (`Underway`).
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from bench.containers import ContainerSpec, bundle_path, create, is_running, remove, start
from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.probe import Report
from bench.probe_process import ProbeProcess, run_module, start_probe
from bench.vm.host import MachineHost
from tests.lab.inside import inside
from tests.lab.waiting import wait_until

MIGRATION_DEADLINE_S: Final = 120.0
STOP_DEADLINE_S: Final = 30.0
CLEAN_DEADLINE_S: Final = 20.0
ANSWER_DEADLINE_S: Final = 20.0
REPORT: Final = "/tmp/{name}-report.json"
REDIS_MIB: Final = 16
VERSIONS: Final = "/tmp/{name}-versions"

# ---- the command ----


@dataclass(frozen=True, slots=True)
class Migration:
    """A `migrate` that has ended. `report` is what --report wrote, None when it wrote nothing."""

    report: dict[str, Any] | None
    code: int
    stdout: str
    stderr: str

    @property
    def done(self) -> dict[str, Any]:
        """The report of a migration that must have succeeded."""
        assert self.code == 0, self.stderr or self.stdout
        assert self.report is not None
        assert self.report["outcome"] == "done", self.report
        return self.report

    @property
    def events(self) -> list[dict[str, Any]]:
        """With --json: every line of standard output, the report last."""
        return [json.loads(line) for line in self.stdout.splitlines()]


class Underway:
    """A `migrate` that runs. What it writes goes to files, so that it never waits for a reader."""

    def __init__(
        self,
        source: Host,
        name: str,
        arguments: Sequence[str],
        env: Mapping[str, str] | None,
        *,
        program: Sequence[str] = ("migrate",),
    ) -> None:
        self.source = source
        self._report = source.path(REPORT.format(name=name))
        self._stdout: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by finish)
        self._stderr: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [*program, *arguments, "--report", REPORT.format(name=name)]
        self.process: subprocess.Popen[str] = source.popen(
            command, stdin=subprocess.DEVNULL, stdout=self._stdout, stderr=self._stderr, env=env
        )

    @property
    def stdout(self) -> str:
        """What it has written so far."""
        return _text(self._stdout)

    @property
    def stderr(self) -> str:
        """What it has written so far."""
        return _text(self._stderr)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """With --json: its events of this kind so far ("phase", "round", "moved", …)."""
        lines = self.stdout.splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith("\n")]
        return [event for event in found if event.get("event") == kind]

    def wait_phase(self, phase: str, *, deadline_s: float = 60.0) -> None:
        """With --json: returns when it entered this phase; fails when it has ended without."""

        def entered() -> bool:
            ended = self.process.poll() is not None
            if any(event["phase"] == phase for event in self.events("phase")):
                return True
            assert not ended, f"ended before {phase}: {self.stdout[-2000:]} {self.stderr[-2000:]}"
            return False

        wait_until(f"phase {phase}", entered, deadline_s=deadline_s * self.source.patience)

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """A signal to the command, as from a user's keyboard."""
        self.source.signal(self.process, number)

    def go_on(self) -> None:
        """After SIGSTOP: nsenter has stopped itself too, and wakes the command when it is woken."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the command alone."""
        self.process.kill()

    def finish(self, deadline_s: float = MIGRATION_DEADLINE_S) -> Migration:
        """Waits for its end; it has been killed when that does not come in time."""
        deadline_s *= self.source.patience
        try:
            code = self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_DEADLINE_S)
            raise AssertionError(
                f"migrate has not ended in {deadline_s:g} s: {self.stdout[-2000:]} {self.stderr}"
            ) from None
        stdout, stderr = self.stdout, self.stderr
        self._stdout.close()
        self._stderr.close()
        report = json.loads(self._report.read_text()) if self._report.exists() else None
        self._report.unlink(missing_ok=True)
        return Migration(report, code, stdout, stderr)


def begin(
    source: Host, name: str, target: str, *options: str, env: Mapping[str, str] | None = None
) -> Underway:
    """Starts `migrate NAME --to TARGET` on `source`; `finish` has to be called."""
    return Underway(source, name, [name, "--to", target, *options], env)


def migrate(
    source: Host,
    name: str,
    target: str,
    *options: str,
    env: Mapping[str, str] | None = None,
    deadline_s: float = MIGRATION_DEADLINE_S,
) -> Migration:
    """Runs `migrate NAME --to TARGET` on `source` to its end, whatever that is."""
    return begin(source, name, target, *options, env=env).finish(deadline_s)


def _text(file: IO[str]) -> str:
    """What a child has written to its file so far, whose offset the child shares: read apart."""
    return Path(f"/proc/self/fd/{file.fileno()}").read_text(errors="replace")


# ---- where a container is ----


def running_on(lab: Lab, name: str) -> list[str]:
    """The hosts on which tasks of the container execute: not frozen, not held by a tracer."""
    return [host.name for host in lab.hosts if host.pid and is_running(host, name)]


# What a host has that it has not after its start, a line each.
_REMAINS = """\
ip -o link show | sed 's/^[0-9]*: \\([^:@]*\\).*/link \\1/'
ip netns list | sed 's/ .*//; s/^/netns /'
cd /sys/fs/cgroup && find . -mindepth 1 -type d | sed 's,^\\./,cgroup ,'
cut -d' ' -f2 /proc/1/mounts | sed -n 's,^\\(/run/\\|/tmp/\\|/var/lib/[a-z]*/\\),mount &,p'
for directory in /tmp /run /run/migrate /run/migrate/sessions /run/migrate/claims /run/runc \\
    /run/crun /var/lib/migrate /var/lib/migrate/containers; do
    [ ! -d $directory ] || ls -A $directory | sed "s,^,file $directory/,"
done
ps -eo pid=,ppid=,cgroup=,args= | awk -v me=$$ '$1 != me && $2 != me {
    $1 = "process"; $2 = ""; gsub(/ +/, " "); print }'
"""
_ALWAYS: Final = re.compile(
    r"link (lo|br0|uplink)"
    r"|cgroup (init\.scope|dolly)"
    r"|mount /run/netns"
    r"|file /run/(lock|mount|netns|sshd|sshd\.pid|migrate-agent\.pid|migrate|runc|crun|criu\.kdat)"
    # crun's own, of seccomp filters.
    r"|file /run/crun/\.cache"
    r"|file /run/migrate/(sessions|claims|claims/agent|front)"
    r"|file /var/lib/migrate/(containers|journal\.sqlite.*)"
    r"|process 0::/init\.scope (\S*catatonit -P|sshd: .*listener.*"
    r"|\S*python3 -m (migrate|tests\.faults\.halting) agent.*"
    r"|\S*python3 -P -m migrate\.agent\.front .*)"
)


# Besides, in a virtual machine: its systemd, its kernel's threads, and the way for commands.
_ALWAYS_IN_A_MACHINE: Final = re.compile(
    r"link management"
    r"|cgroup ([a-z-]+\.mount|proc-\S+\.automount|proc-\S+\.mount|system\.slice|user\.slice)"
    r"|cgroup system\.slice/(ssh\.service|systemd-(journald|udevd)\.service(/udev)?|[a-z-]+\.mount)"
    r"|mount /run/(lock|credentials/\S+)"
    r"|file /run/(commands|credentials|initctl|initramfs|log|motd\.dynamic|sendsigs\.omit\.d)"
    r"|file /run/(setrans|shm|sudo|systemd|tmpfiles\.d|udev|user)"
    r"|process - \[.*\]"
    r"|process 0::/init\.scope /sbin/init"
    r"|process 0::/system\.slice/\S+ (/usr/lib/systemd/\S+|\(udev-worker\)|sshd.*|\S+/sftp-server)"
)


def remains(host: Host, *residents: str) -> list[str]:
    """What is on a host besides itself, its agent and these containers with their things."""
    lines = host.run(["sh", "-c", _REMAINS]).stdout.splitlines()
    if isinstance(host, MachineHost):
        lines = [line for line in lines if not _ALWAYS_IN_A_MACHINE.fullmatch(line)]
    return [
        line
        for line in lines
        if not _ALWAYS.fullmatch(line) and not any(_is_of(name, line) for name in residents)
    ]


def _is_of(name: str, line: str) -> bool:
    return bool(
        re.fullmatch(
            rf"link v-{name}|netns {name}|cgroup dolly/{name}|mount /run/netns/{name}"
            rf"|file /run/(runc|crun)/{name}|file /var/lib/migrate/containers/{name}"
            rf"|process 0::/dolly/{name} .*",
            line,
        )
    )


def wait_clean(host: Host, *residents: str) -> None:
    """Returns when nothing remains but these containers; fails naming what does."""
    left: list[str] = []

    def clean() -> bool:
        left[:] = remains(host, *residents)
        return not left

    with contextlib.suppress(AssertionError):
        wait_until("nothing is left", clean, deadline_s=CLEAN_DEADLINE_S * host.patience)
    assert not left, f"on {host.name}: {left}"


# ---- a container with its client ----


@dataclass(slots=True)
class Resident:
    """A container that runs in a lab, wherever it is, and the client that must not notice."""

    lab: Lab
    spec: ContainerSpec
    probe: ProbeProcess | None

    @property
    def name(self) -> str:
        return self.spec.name

    def ask(self, *lines: str, address: str | None = None) -> list[str]:
        """The answers of a workload with lines (memory, tree, blocker), over a new connection."""
        where = (address or self.spec.ip, str(self.spec.port))
        return run_module(self.lab.client, "bench.workloads.ask", *where, *lines).splitlines()

    def redis(self, act: str, *options: str, address: str | None = None) -> dict[str, Any]:
        """`bench.workloads.redis_data ACT`; its report, in which all is well."""
        where = (address or self.spec.ip, str(self.spec.port), f"--mib={REDIS_MIB}")
        answer = run_module(self.lab.client, "bench.workloads.redis_data", act, *where, *options)
        report: dict[str, Any] = json.loads(answer)
        assert report["ok"], report
        return report

    def verify(self) -> None:
        """Its memory is what it must be, byte by byte (memory only)."""
        (answer,) = self.ask("VERIFY")
        assert answer.startswith("VERIFY ok ") and " bad=0 " in answer, answer  # noqa: PT018

    def answers(self) -> int:
        """How many requests the server has answered; grows strictly."""
        (answer,) = self.ask("1")
        return int(answer.split()[1])

    def wait_answers(self) -> None:
        """Returns when the streaming client was answered again: the connection lives on."""
        before = self.answers()
        # Each look is answered too: more than those must have been.
        looks = 0

        def streamed() -> bool:
            nonlocal looks
            looks += 1
            return self.answers() > before + looks

        patience = max(host.patience for host in self.lab.hosts)
        wait_until("the client is answered", streamed, deadline_s=ANSWER_DEADLINE_S * patience)

    def stop_probe(self) -> Report:
        """Ends the client; what it saw."""
        assert self.probe is not None
        return self.probe.stop()


@contextlib.contextmanager
def resident(
    lab: Lab,
    spec: ContainerSpec,
    *,
    on: str = "A",
    probe: bool = True,
    rate_per_s: float = 500.0,
    program: Path | None = None,
) -> Iterator[Resident]:
    """Runs a container on a host with a streaming client; at the end it is nowhere.

    A redis is empty: `guest.redis("fill")`. Without `probe` no client is connected. `program`, a
    static binary, runs in place of the workload's own and is given the same arguments.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(expel, lab, spec.name)
        create(lab.host(on), spec)
        if program is not None:
            inner = f"{bundle_path(spec.name)}/rootfs/bin/{spec.workload}"
            shutil.copy2(program, lab.host(on).path(inner))
        start(lab.host(on), spec.name)
        client = None
        if probe:
            client = stack.enter_context(
                start_probe(spec.client, spec.ip, spec.port, host=lab.client, rate_per_s=rate_per_s)
            )
        yield Resident(lab, spec, client)


_EXPEL = """
from migrate.runtimes.known import drivers
name, *bundles = given
for driver in drivers().values():
    for bundle in bundles:
        driver.delete(name, bundle=Path(bundle))
"""


def expel(lab: Lab, name: str) -> None:
    """Removes a container, in whatever state, from every host that is up."""
    for host in lab.hosts:
        if host.pid:
            arrived = f"/var/lib/migrate/containers/{name}"
            inside(host, _EXPEL, [name, bundle_path(name), arrived])
            remove(host, name)
            host.run(["rm", "-rf", arrived])
