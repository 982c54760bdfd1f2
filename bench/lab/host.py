"""A lab host as tests, demo and bench use it: run programs in it, read and write its files."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

from bench.lab.enter import enter_command, inside_environment
from bench.lab.errors import LabCommandError, LabError

# Long enough for everything that a test does in one command, short enough that a hang is noticed
# before the limit of the test.
RUN_TIMEOUT_S = 120.0
# sh, nsenter and setpriv follow each other within milliseconds.
ENTER_DEADLINE_S = 10.0
POLL_S = 0.005


class Host:
    """One host, or the client, of a running lab."""

    # How many times longer than on this machine things may take.
    patience = 1.0
    # How often to look whether something has come true, without keeping it from that.
    poll_s = POLL_S

    def __init__(self, node: Mapping[str, Any]) -> None:
        """`node`: an entry of the keeper's description of the lab."""
        self.name: str = node["name"]
        self.address: str = node["address"]  # IPv4, without prefix length
        self.address6: str = node["address6"]
        self.mac: str = node["mac"]  # of the device that carries the addresses
        self.pid: int = node[
            "pid"
        ]  # of its pid 1, as this machine sees it; new with a boot, 0 when off
        self.cgroup = Path(node["cgroup"])  # the host's root cgroup, as this machine sees it

    def __repr__(self) -> str:
        return f"Host({self.name!r}, {self.address}, pid={self.pid})"

    def run(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        check: bool = True,
        input: str | None = None,  # noqa: A002 - the name that subprocess.run has for it
        timeout_s: float = RUN_TIMEOUT_S,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside to its end; `env` is added to the host's plain environment.

        LabCommandError when it ends with a status other than 0 (unless `check` is off) or is not
        through after `timeout_s`; it has been killed then. A daemon that it leaves behind must not
        keep the standard output open.
        """
        shown = shlex.join(map(str, command))
        process = self.popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            errors="replace",
        )
        with process:
            try:
                stdout, stderr = process.communicate(input, timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                process.kill()
                stdout, stderr = process.communicate()
                outcome = f"not through after {timeout_s:g} s"
                raise LabCommandError(self.name, shown, outcome, stdout, stderr) from error
            except BaseException:
                process.kill()
                raise
        if check and process.returncode != 0:
            outcome = f"status {process.returncode}"
            raise LabCommandError(self.name, shown, outcome, stdout, stderr)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)

    @overload
    def popen(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        text: Literal[True] = True,
        **kwargs: Any,
    ) -> subprocess.Popen[str]: ...

    @overload
    def popen(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        text: Literal[False],
        **kwargs: Any,
    ) -> subprocess.Popen[bytes]: ...

    def popen(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        text: bool = True,
        **kwargs: Any,
    ) -> subprocess.Popen[Any]:
        """Starts a command inside; `kwargs` as for subprocess.Popen.

        `kill()` of the result kills the command; to send it another signal use `signal()` here,
        since the process that Popen knows is nsenter, which passes none on.
        """
        full = self.command_line([os.fspath(part) for part in command])
        return subprocess.Popen(full, env=inside_environment(env), text=text, **kwargs)

    def command_line(self, command: Sequence[str], *, tty: bool = False) -> list[str]:
        """What this machine executes to run a command inside, with `inside_environment`; `tty`:
        by somebody who types."""
        self._check_on()
        return enter_command(self.pid, self.cgroup, command)

    def signal(self, process: subprocess.Popen[Any], number: signal.Signals) -> None:
        """Sends a signal to the command that `popen` started."""
        os.kill(self.command_pid(process), number)

    def command_pid(self, process: subprocess.Popen[Any]) -> int:
        """The pid, as this machine sees it, of the command that `popen` started."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        deadline = time.monotonic() + ENTER_DEADLINE_S
        while process.poll() is None and time.monotonic() < deadline:
            pids = children.read_text().split()
            # nsenter's child becomes setpriv, and that the command.
            if pids and Path(f"/proc/{pids[0]}/comm").read_text().strip() not in _ENTERING:
                return int(pids[0])
            time.sleep(POLL_S)
        raise LabError(f"on {self.name}: process {process.pid} runs no command any more")

    def path(self, inside: str | os.PathLike[str]) -> Path:
        """The path by which this machine reaches a file of the host.

        Only while the host runs; an absolute symbolic link on the way would lead out of it.
        """
        self._check_on()
        return Path(f"/proc/{self.pid}/root") / os.fspath(inside).lstrip("/")

    def read_text(self, inside: str | os.PathLike[str]) -> str:
        return self.path(inside).read_text()

    def write_text(self, inside: str | os.PathLike[str], text: str, mode: int = 0o644) -> None:
        """Writes a file of the host, with the directories that lead to it."""
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)

    def _check_on(self) -> None:
        if self.pid == 0:
            raise LabError(f"{self.name} has crashed, and was not booted since")


_ENTERING = frozenset({"nsenter", "setpriv"})
