"""What a destination means to the user's own `ssh`: its configuration is asked for by `ssh -G`.

OpenSSH reads its files (Include, Match, patterns, tokens) better than a second reader could, so
there is none here. `ssh -G` prints one `keyword value` a line, lower case, and connects to nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from transport.ssh.errors import SshConfigError

SSH_PORT: Final = 22
CONFIG_DEADLINE_S = 20.0
"""`ssh -G` takes milliseconds; `Match exec` may ask something of the network."""

# Nothing that a shell, `ssh` or a URL reads as anything but a name or an address.
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:%-]{0,254}|::1")
_USER = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.@\\-]{0,63}\$?")
_BRACKETED = re.compile(r"\[([^\]]+)\](?::([0-9]{1,5}))?")
_STRICT: Final = {"yes": "yes", "true": "yes", "accept-new": "accept-new", "ask": "ask"}


@dataclass(frozen=True, slots=True)
class Destination:
    """`[user@]host[:port]` as a user writes it; the host may be an alias of ~/.ssh/config."""

    host: str
    user: str | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises SshConfigError. An IPv6 address with a port stands in brackets."""
        user, separator, place = text.rpartition("@")
        if separator and not _USER.fullmatch(user):
            raise SshConfigError(f"{user!r} is not a user's name")
        host, port = _split_port(place)
        if not _HOST.fullmatch(host):
            raise SshConfigError(f"{host!r} is not the name of a host", "user@host or user@host:22")
        if port is not None and not (port.isdecimal() and 0 < int(port) < 1 << 16):
            raise SshConfigError(f"{port!r} is not a port")
        return cls(host, user or None, int(port) if port else None)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = f"{self.user}@" if self.user else ""
        return f"{user}{host}:{self.port}" if self.port else f"{user}{host}"


@dataclass(frozen=True, slots=True)
class SshTarget:
    """How the user's ssh would connect. strict: yes, accept-new or ask (StrictHostKeyChecking);
    agent: the socket, None for the environment's, "" for no agent."""

    alias: str
    host: str
    port: int
    user: str
    identity_files: tuple[Path, ...] = ()
    identities_only: bool = False
    agent: str | None = None
    host_key_alias: str = ""
    user_known_hosts: tuple[Path, ...] = ()
    global_known_hosts: tuple[Path, ...] = ()
    strict: str = "ask"
    hash_known_hosts: bool = False
    jumps: tuple[str, ...] = ()
    proxy_command: str = ""
    batch: bool = False

    @property
    def known_as(self) -> str:
        """The name in known_hosts (sshd(8)): with the port where that is not 22."""
        name = self.host_key_alias or self.host.lower()
        if self.port == SSH_PORT or self.host_key_alias:
            return name
        return f"[{name}]:{self.port}"

    def __str__(self) -> str:
        via = f" ({self.host})" if self.alias != self.host else ""
        return f"{self.user}@{self.alias}{via} port {self.port}"


def look_up(destination: Destination, config_file: Path | None = None) -> SshTarget:
    """What `ssh` would do for it; `config_file` replaces the user's, as `ssh -F`.

    Raises SshConfigError, also when there is no ssh. Blocking.
    """
    program = shutil.which("ssh")
    if program is None:
        raise SshConfigError(
            "there is no ssh here, whose configuration is used", "install openssh-client"
        )
    command = [program, "-G"]
    command += ["-F", str(config_file)] if config_file is not None else []
    command += ["-l", destination.user] if destination.user else []
    command += ["-p", str(destination.port)] if destination.port else []
    try:
        done = subprocess.run(
            [*command, "--", destination.host],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CONFIG_DEADLINE_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise SshConfigError(f"ssh -G {destination.host} hangs") from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it gives no reason"])[-1]
        raise SshConfigError(f"ssh can't read its configuration: {reason}", "mend ~/.ssh/config")
    return read_answer(destination.host, done.stdout)


def read_answer(alias: str, answer: str) -> SshTarget:
    """The target that `ssh -G` describes. Raises SshConfigError."""
    values: dict[str, list[str]] = {}
    for line in answer.splitlines():
        keyword, _, value = line.partition(" ")
        values.setdefault(keyword.lower(), []).append(value.strip())

    def one(keyword: str, default: str = "") -> str:
        return values.get(keyword, [default])[0]

    user, host, port = one("user"), one("hostname", alias), int(one("port", str(SSH_PORT)))
    tokens = {"%": "%", "d": str(Path.home()), "h": host, "n": alias, "p": str(port), "r": user}

    def paths(text: str) -> tuple[Path, ...]:
        return tuple(Path(_expand(part, tokens)).expanduser() for part in text.split())

    agent = one("identityagent", "SSH_AUTH_SOCK")
    jump = one("proxyjump", "none")
    command = one("proxycommand", "none")
    return SshTarget(
        alias=alias,
        host=host,
        port=port,
        user=user,
        identity_files=tuple(
            path for text in values.get("identityfile", []) for path in paths(text)
        ),
        identities_only=one("identitiesonly") == "yes",
        agent={"none": "", "SSH_AUTH_SOCK": None}.get(agent, str(Path(agent).expanduser())),
        host_key_alias=one("hostkeyalias"),
        user_known_hosts=paths(one("userknownhostsfile")),
        global_known_hosts=paths(one("globalknownhostsfile")),
        # "no" and "off" mean that a changed key is let in too, which is never done here.
        strict=_STRICT.get(one("stricthostkeychecking"), "accept-new"),
        hash_known_hosts=one("hashknownhosts") == "yes",
        jumps=() if jump == "none" else tuple(jump.split(",")),
        proxy_command="" if command == "none" else _expand(command, tokens),
        batch=one("batchmode") == "yes",
    )


def _split_port(place: str) -> tuple[str, str | None]:
    if bracketed := _BRACKETED.fullmatch(place):
        return bracketed[1], bracketed[2]
    if place.count(":") == 1:
        host, _, port = place.partition(":")
        return host, port
    return place, None


def _expand(text: str, tokens: dict[str, str]) -> str:
    """TOKENS of ssh_config(5), as far as they are known here."""

    def value(match: re.Match[str]) -> str:
        try:
            return tokens[match[1]]
        except KeyError:
            raise SshConfigError(f"%{match[1]} in ssh's configuration is not understood") from None

    return re.sub("%(.)", value, text)
