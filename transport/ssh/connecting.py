"""A connection to an SSH server that has proven to be the host that was meant.

    with connect("root@db7", Asking(prompts)) as ssh:
        answer = ssh.run(["uname", "-r"], deadline_s=10)

The server's key is judged by known_hosts before anything is told to it. A key that differs from the
known one is refused, whatever the configuration says.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import paramiko

from transport.ssh.authentication import authenticate
from transport.ssh.config import Destination, SshTarget, look_up
from transport.ssh.connection import SshConnection
from transport.ssh.errors import (
    HostKeyChangedError,
    HostKeyRevokedError,
    HostKeyUnknownError,
    SshConfigError,
    SshUnreachableError,
)
from transport.ssh.known_hosts import Judgement, KnownHosts, Verdict, fingerprint, places, remember
from transport.tls import tune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transport.ssh.asking import Asking

CONNECT_DEADLINE_S: Final = 20.0
"""For TCP, for the exchange of keys, and for an answer to each proof."""
JUMPS_MAX: Final = 8
_PROXY_END_S: Final = 5.0

# What it has to say reaches the user as an error of this package.
logging.getLogger("paramiko").addHandler(logging.NullHandler())
logging.getLogger("paramiko").propagate = False


def connect(destination: str, asking: Asking) -> SshConnection:
    """To `[user@]host[:port]`, as the user's ssh would. Blocking. Raises SshError."""
    return _connect(look_up(Destination.parse(destination), asking.config_file), asking, 0)


def _connect(target: SshTarget, asking: Asking, depth: int) -> SshConnection:
    if depth > JUMPS_MAX:
        raise SshConfigError(f"more than {JUMPS_MAX} jumps on the way to {target}")
    with contextlib.ExitStack() as behind:
        try:
            transport = paramiko.Transport(_stream(target, asking, depth, behind))
            behind.callback(transport.close)
            transport.banner_timeout = transport.handshake_timeout = CONNECT_DEADLINE_S
            transport.auth_timeout = CONNECT_DEADLINE_S
            known = KnownHosts([*target.user_known_hosts, *target.global_known_hosts])
            _prefer(transport, known.key_types(target.known_as))
            transport.start_client(timeout=CONNECT_DEADLINE_S)
            _admit(transport.get_remote_server_key(), known, target, asking)
            authenticate(transport, target, asking.prompts)
        except (EOFError, OSError, paramiko.SSHException) as error:
            raise _unreachable(target, error) from error
        return SshConnection(target, transport, behind.pop_all())


def _stream(
    target: SshTarget, asking: Asking, depth: int, behind: contextlib.ExitStack
) -> socket.socket | paramiko.Channel:
    """A way to the server's port; what it needs is put into `behind`, to be closed with it."""
    if target.jumps:
        via = behind.enter_context(_connect(_jump(target, asking), asking, depth + 1))
        return via.open_tunnel(target.host, target.port)
    if target.proxy_command:
        return _piped(target.proxy_command, behind)
    plain = socket.create_connection((target.host, target.port), timeout=CONNECT_DEADLINE_S)
    behind.callback(plain.close)
    tune(plain)
    return plain


def _piped(command: str, behind: contextlib.ExitStack) -> socket.socket:
    """The standard input and output of a command of the user's configuration (ProxyCommand)."""
    here, there = socket.socketpair()
    behind.callback(here.close)
    with there:
        shell = ["/bin/sh", "-c", command]
        process = subprocess.Popen(shell, stdin=there.fileno(), stdout=there.fileno())
    behind.callback(_end, process)
    return here


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_PROXY_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _jump(target: SshTarget, asking: Asking) -> SshTarget:
    """The last host before `target`, to be reached through those before it (ProxyJump)."""
    *before, last = target.jumps
    jump = look_up(Destination.parse(last.removeprefix("ssh://")), asking.config_file)
    if not before:
        return jump
    return replace(jump, jumps=tuple(before))


def _prefer(transport: paramiko.Transport, key_types: Sequence[str]) -> None:
    """Ask for a key of a known type first: a host has several keys, and one is enough."""
    options = transport.get_security_options()
    # An RSA key signs in newer ways than the one that it is named after.
    wanted = (
        {"rsa-sha2-512", "rsa-sha2-256", *key_types} if "ssh-rsa" in key_types else {*key_types}
    )
    offered = list(options.key_types)
    options.key_types = sorted(offered, key=lambda one: one not in wanted)


def _admit(key: paramiko.PKey, known: KnownHosts, target: SshTarget, asking: Asking) -> None:
    """Returns if the server is to be trusted. Raises HostKeyError."""
    blob, name = key.asbytes(), target.known_as
    shown = f"{fingerprint(blob)} ({key.get_name()})"
    judgement = known.judge(name, blob)
    match judgement.verdict:
        case Verdict.KNOWN:
            return
        case Verdict.REVOKED:
            raise HostKeyRevokedError(
                f"the key of {name}, {shown}, is revoked by {judgement.entries[0].place}",
                "do not connect: whoever answers there has a key that was given up",
            )
        case Verdict.CHANGED:
            raise HostKeyChangedError(
                f"the key of {name} has changed: it shows {shown},"
                f" known is {places(judgement.entries)}",
                "somebody may be in between. If the host was installed anew:"
                f" ssh-keygen -f {judgement.entries[0].path} -R '{name}'",
            )
        case Verdict.UNKNOWN:
            _accept(key, shown, judgement, target, asking)


def _accept(
    key: paramiko.PKey, shown: str, judgement: Judgement, target: SshTarget, asking: Asking
) -> None:
    """An unknown key: by --accept-new or the configuration, by asking, or not."""
    name, prompts = target.known_as, None if target.batch else asking.prompts
    unknown = f"the host key of {name}, {shown}, is in no known_hosts"
    if judgement.by_authority:
        raise HostKeyUnknownError(
            f"{unknown} but for a certificate authority, which can't be judged here",
            f"add the key itself: ssh-keyscan {target.host}, compared with the host's own",
        )
    if not (asking.accept_new or target.strict == "accept-new"):
        question = f"{unknown}. Trust it from now on?"
        if target.strict == "yes" or prompts is None or not prompts.confirm(question):
            raise HostKeyUnknownError(
                unknown, "compare it with the host's own (ssh-keygen -lf), then --accept-new"
            )
    if target.user_known_hosts:
        path = target.user_known_hosts[0]
        try:
            remember(path, name, key.get_name(), key.asbytes(), hashed=target.hash_known_hosts)
        except OSError as error:
            raise SshConfigError(f"{path} can't be written: {error.strerror}") from error


def _unreachable(target: SshTarget, error: Exception) -> SshUnreachableError:
    reason = getattr(error, "strerror", "") or str(error) or type(error).__name__
    return SshUnreachableError(
        f"no SSH connection to {target}: {reason}",
        f"is sshd running on {target.host}, and is port {target.port} reachable?",
    )
