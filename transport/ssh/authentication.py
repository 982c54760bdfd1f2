"""Proving to an SSH server who the user is: agent, key files, then passwords, as ssh does it."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Final

import paramiko

from transport.ssh.errors import SshAuthError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transport.ssh.asking import Prompts
    from transport.ssh.config import SshTarget

AGENT_DEADLINE_S: Final = 60.0
"""An agent may ask its user to touch a token."""
PASSWORDS_MAX: Final = 3
KEY_BYTES_MAX: Final = 64 << 10


def authenticate(transport: paramiko.Transport, target: SshTarget, prompts: Prompts | None) -> None:
    """Returns when the server has accepted the user. Raises SshAuthError, and SSHException when
    the connection ends. prompts: None where nobody can be asked."""
    attempt = _Attempt(transport, target, prompts)
    if attempt.without_proof() or attempt.with_keys() or attempt.with_passwords():
        return
    tried = ", ".join(attempt.tried) or "nothing, as there is no key"
    wanted = ", ".join(sorted(attempt.allowed)) or "nothing known"
    raise SshAuthError(
        f"{target} does not let {target.user} in: it takes {wanted}; tried {tried}",
        f"ssh-copy-id {target.user}@{target.alias}, or load a key into the agent (ssh-add)",
    )


class _Attempt:
    """Each method returns whether the user is in."""

    def __init__(
        self, transport: paramiko.Transport, target: SshTarget, prompts: Prompts | None
    ) -> None:
        self._transport = transport
        self._target = target
        self._prompts = None if target.batch else prompts
        self.allowed: set[str] = set()
        self.tried: list[str] = []

    def without_proof(self) -> bool:
        """Ask what the server takes; some let everybody in."""
        try:
            self._transport.auth_none(self._target.user)
        except paramiko.BadAuthenticationType as error:
            self.allowed = set(error.allowed_types)
        return self._transport.is_authenticated()

    def with_keys(self) -> bool:
        """Those of the agent first: nobody has to be asked for their passphrases."""
        if "publickey" not in self.allowed:
            return False
        with contextlib.ExitStack() as agent:
            return any(self._is_let_in(name, key) for name, key in self._keys(agent))

    def _is_let_in(self, name: str, key: paramiko.PKey) -> bool:
        if "publickey" not in self.allowed:
            return False
        self.tried.append(name)
        try:
            # A server that wants a key and a password as well says so here.
            self.allowed = set(self._transport.auth_publickey(self._target.user, key))
        except paramiko.BadAuthenticationType as error:
            self.allowed = set(error.allowed_types)
        except paramiko.AuthenticationException:
            if not self._transport.is_active():
                raise
        return self._transport.is_authenticated()

    def with_passwords(self) -> bool:
        """Typed ones; a server may ask for them as a dialogue."""
        if self._prompts is None:
            return False
        for _ in range(PASSWORDS_MAX):
            try:
                if "password" in self.allowed:
                    question = f"{self._target.user}@{self._target.alias}'s password"
                    password = self._prompts.secret(question)
                    self._transport.auth_password(self._target.user, password, fallback=False)
                elif "keyboard-interactive" in self.allowed:
                    self._transport.auth_interactive(self._target.user, self._answer)
                else:
                    return False
            except paramiko.AuthenticationException:
                self.tried.append("a password")
            if self._transport.is_authenticated():
                return True
        return False

    def _answer(
        self, title: str, instructions: str, questions: list[tuple[str, bool]]
    ) -> list[str]:
        assert self._prompts is not None
        return [
            self._prompts.secret(f"{self._target.alias}: {_printable(question).rstrip(': ')}")
            for question, _ in questions
        ]

    def _keys(self, agent: contextlib.ExitStack) -> Iterator[tuple[str, paramiko.PKey]]:
        files = [path for path in self._target.identity_files if path.is_file()]
        wanted = {blob for path in files for blob in _public_blobs(path)}
        for held in _agent_keys(self._target.agent, agent):
            if not self._target.identities_only or held.asbytes() in wanted:
                yield f"{held.get_name()} of the agent", held
        for path in files:
            key = self._load(path)
            if key is not None:
                yield str(path), key

    def _load(self, path: Path) -> paramiko.PKey | None:
        if path.stat().st_size > KEY_BYTES_MAX:
            return None
        try:
            return paramiko.PKey.from_path(path)
        except (paramiko.PasswordRequiredException, TypeError):
            return self._unlock(path)
        except (paramiko.SSHException, ValueError, OSError) as error:
            self.tried.append(f"{path} (can't be read: {error})")
            return None

    def _unlock(self, path: Path) -> paramiko.PKey | None:
        if self._prompts is None:
            self.tried.append(f"{path} (needs its passphrase, and nobody can be asked)")
            return None
        for _ in range(PASSWORDS_MAX):
            typed = self._prompts.secret(f"passphrase of {path}")
            with contextlib.suppress(paramiko.SSHException, ValueError):
                # It takes bytes only, whatever its types say.
                return paramiko.PKey.from_path(path, typed.encode())  # type: ignore[arg-type]
        self.tried.append(f"{path} (wrong passphrase)")
        return None


def _agent_keys(where: str | None, stack: contextlib.ExitStack) -> list[paramiko.AgentKey]:
    """The keys of the agent at a socket; of the environment's for None; "" is no agent. They work
    until the stack closes the connection to it."""
    address = os.environ.get("SSH_AUTH_SOCK", "") if where is None else where
    if not address:
        return []
    with contextlib.suppress(OSError, paramiko.SSHException):
        return list(stack.enter_context(contextlib.closing(_Agent(address))).open())
    return []


class _Agent(paramiko.agent.AgentSSH):
    """paramiko's, at a socket that need not be the environment's."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address
        self._socket = socket.socket(socket.AF_UNIX)

    def open(self) -> tuple[paramiko.AgentKey, ...]:
        """Connect and ask for the keys. Raises OSError, SSHException."""
        self._socket.settimeout(AGENT_DEADLINE_S)
        self._socket.connect(self._address)
        self._connect(self._socket)  # type: ignore[attr-defined]  # missing in types-paramiko
        return self.get_keys()

    def close(self) -> None:
        """End the connection; its keys sign no more."""
        self._socket.close()


def _public_blobs(path: Path) -> list[bytes]:
    """The public half beside a key, by which IdentitiesOnly picks those of the agent."""
    public = path.with_name(path.name + ".pub")
    with contextlib.suppress(OSError, ValueError, IndexError), public.open("rb") as file:
        return [base64.b64decode(file.read(KEY_BYTES_MAX).split()[1], validate=True)]
    return []


def _printable(text: str) -> str:
    """A server's words, without what would write elsewhere on the terminal."""
    return "".join(c for c in text if c.isprintable())[:200]
