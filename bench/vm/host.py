"""A virtual machine as tests, demo and bench use it: a lab host that is reached by SSH."""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.lab.enter import inside_environment
from bench.lab.errors import LabError
from bench.lab.host import Host
from bench.vm import console, machine


class MachineHost(Host):
    """One machine of a running lab. `pid` is QEMU's: nothing inside has a pid out here."""

    # Emulated in software: docs/facts.md.
    patience = 10.0
    # A look at a file is a dozen messages through an emulated sshd.
    poll_s = 0.5
    # For the same reason an answer of the agent may take longer than usual, and a handshake does.
    _environment: Final = {"MIGRATE_SILENCE": "15", "MIGRATE_LINK_PATIENCE": "120"}

    def __init__(self, node: Mapping[str, Any]) -> None:
        super().__init__(node)
        self._state = Path(node["state"])

    def command_line(
        self,
        command: Sequence[str],
        *,
        tty: bool = False,
    ) -> list[str]:
        return self._line("shell", inside_environment(self._environment), command, tty=tty)

    def _line(
        self, token: str, env: Mapping[str, str], command: Sequence[str], *, tty: bool
    ) -> list[str]:
        self._check_on()
        inside = [f"{name}={value}" for name, value in env.items()]
        words = ["/usr/local/sbin/machine-exec", token, *inside, *command]
        ssh = machine.ssh_command(self._state)
        return [*ssh, *(["-t"] if tty else []), "machine", shlex.join(words)]

    def popen(
        self,
        command: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        text: bool = True,
        **kwargs: Any,
    ) -> subprocess.Popen[Any]:
        token = secrets.token_hex(6)
        words = [os.fspath(part) for part in command]
        env = inside_environment({**self._environment, **(env or {})})
        full = self._line(token, env, words, tty=False)
        return _Remote(self, token, full, env=inside_environment(), text=text, **kwargs)

    def signal(self, process: subprocess.Popen[Any], number: signal.Signals) -> None:
        assert isinstance(process, _Remote)
        process.signal_inside(number)

    def command_pid(self, process: subprocess.Popen[Any]) -> int:
        raise LabError(f"{self.name} is a machine of its own: its processes have no pid here")

    def path(self, inside: str | os.PathLike[str]) -> Path:
        self._check_on()
        return machine.files_path(self.pid, self._state, os.fspath(inside))

    def console(self) -> str:
        """What it has printed there, also when it is off."""
        return (self._state / machine.CONSOLE).read_text(errors="replace")

    def console_faults(self) -> str:
        """What its kernel has printed since it failed; empty when it has not."""
        return console.faults(self.console())


class _Remote(subprocess.Popen[Any]):
    """A command on a machine: its end here would be the end of its ssh alone."""

    def __init__(self, host: Host, token: str, *args: Any, **kwargs: Any) -> None:
        self._host = host
        self._pid_file = f"/run/commands/{token}"
        super().__init__(*args, **kwargs)

    def signal_inside(self, number: signal.Signals) -> None:
        script = f'[ ! -e "$1" ] || kill -{int(number)} "$(cat "$1")"'
        self._host.run(["sh", "-c", script, "kill", self._pid_file], check=False)

    def kill(self) -> None:
        if self.poll() is None:
            self.signal_inside(signal.SIGKILL)
        super().kill()
