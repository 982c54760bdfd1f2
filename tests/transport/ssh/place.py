"""A user's ~/.ssh in a directory, servers that know the user's key, and somebody at a terminal."""

from __future__ import annotations

from pathlib import Path

import paramiko

from tests.transport.ssh.server import Behaviour, SshServer, generate_key
from transport.ssh.asking import Asking
from transport.ssh.connecting import connect
from transport.ssh.connection import SshConnection


class Typist:
    """Somebody at a terminal who answers what the test says, and remembers the questions."""

    def __init__(self, *secrets: str, confirms: bool = False) -> None:
        self._secrets = list(secrets)
        self._confirms = confirms
        self.asked: list[str] = []

    def confirm(self, text: str) -> bool:
        self.asked.append(text)
        return self._confirms

    def secret(self, text: str) -> str:
        self.asked.append(text)
        return self._secrets.pop(0)


class Place:
    """A user's ~/.ssh in a directory, and servers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.known_hosts = directory / "known_hosts"
        self.host_key = generate_key(made(directory / "host"))
        self.user_key = generate_key(made(directory / "user"))
        self.more = ""
        self._servers: list[SshServer] = []

    def serve(self, behaviour: Behaviour | None = None, *more_keys: Path) -> SshServer:
        wanted = behaviour or Behaviour(keys=[paramiko.PKey.from_path(self.user_key)])
        keys = [paramiko.PKey.from_path(path) for path in (self.host_key, *more_keys)]
        self._servers.append(SshServer(keys, wanted))
        return self._servers[-1]

    def know(self, server: SshServer, key: Path | None = None, marker: str = "") -> None:
        public = (key or self.host_key).with_suffix(".pub").read_text().split()
        with self.known_hosts.open("a") as file:
            file.write(f"{marker}[127.0.0.1]:{server.port} {public[0]} {public[1]}\n")

    def connect(
        self, server: SshServer, prompts: Typist | None = None, *, accept_new: bool = False
    ) -> SshConnection:
        asking = self.asking(prompts, accept_new=accept_new)
        return connect(f"somebody@127.0.0.1:{server.port}", asking)

    def asking(self, prompts: Typist | None = None, *, accept_new: bool = False) -> Asking:
        """With a configuration that knows this place alone."""
        config = self.directory / "config"
        config.write_text(
            f"UserKnownHostsFile {self.known_hosts}\nGlobalKnownHostsFile /dev/null\n"
            f"IdentityFile {self.user_key}\nIdentityAgent none\n{self.more}"
        )
        return Asking(prompts, accept_new=accept_new, config_file=config)

    def close(self) -> None:
        for server in self._servers:
            server.close()


def made(path: Path) -> Path:
    path.mkdir()
    return path
