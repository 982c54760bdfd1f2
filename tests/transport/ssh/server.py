"""An SSH server on loopback that runs what it is told to, as this user: for tests alone.

The protocol is paramiko's server; commands are real processes, tunnels real connections.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import paramiko
from paramiko import common


@dataclass
class Behaviour:
    """What the server accepts. after_key: it wants a password as well."""

    keys: list[paramiko.PKey] = field(default_factory=list)
    password: str = ""
    after_key: bool = False
    tunnels: bool = True


class SshServer:
    """Listens at 127.0.0.1:`port` until `close`. `attempts`: what callers tried."""

    def __init__(self, host_keys: list[paramiko.PKey], behaviour: Behaviour) -> None:
        self.host_keys = host_keys
        self.behaviour = behaviour
        self.attempts: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._transports: list[paramiko.Transport] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for transport in self._transports:
            transport.close()
            transport.join(10)

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            transport = paramiko.Transport(plain)
            for key in self.host_keys:
                transport.add_server_key(key)
            self._transports.append(transport)
            transport.start_server(threading.Event(), server=_Session(self))


class _Session(paramiko.ServerInterface):
    def __init__(self, server: SshServer) -> None:
        self._server = server
        self._wants = server.behaviour
        self._has_key = False

    def get_allowed_auths(self, username: str) -> str:
        return "publickey,password" if self._wants.password else "publickey"

    def check_auth_publickey(self, username: str, key: paramiko.PKey) -> int:
        self._server.attempts.append(f"key {username}")
        if key not in self._wants.keys:
            return common.AUTH_FAILED
        self._has_key = True
        return common.AUTH_PARTIALLY_SUCCESSFUL if self._wants.after_key else 0

    def check_auth_password(self, username: str, password: str) -> int:
        self._server.attempts.append(f"password {username}")
        is_right = bool(self._wants.password) and password == self._wants.password
        missing = self._wants.after_key and not self._has_key
        return common.AUTH_SUCCESSFUL if is_right and not missing else common.AUTH_FAILED

    def check_channel_request(self, kind: str, chanid: int) -> int:
        return common.OPEN_SUCCEEDED

    def check_channel_exec_request(self, channel: paramiko.Channel, command: bytes) -> bool:
        threading.Thread(target=_execute, args=(channel, command), daemon=True).start()
        return True

    def check_channel_direct_tcpip_request(
        self, chanid: int, origin: tuple[str, int], destination: tuple[str, int]
    ) -> int:
        if not self._wants.tunnels:
            return common.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED
        transport = threading.current_thread()
        assert isinstance(transport, paramiko.Transport)
        threading.Thread(target=_tunnel, args=(transport, destination), daemon=True).start()
        return common.OPEN_SUCCEEDED


def _execute(channel: paramiko.Channel, command: bytes) -> None:
    with subprocess.Popen(
        ["/bin/sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    ) as process:
        assert process.stdin is not None
        pumps = [
            threading.Thread(target=_pump, args=(process.stdout, channel.sendall), daemon=True),
            threading.Thread(
                target=_pump, args=(process.stderr, channel.sendall_stderr), daemon=True
            ),
        ]
        for pump in pumps:
            pump.start()
        try:
            while piece := channel.recv(65536):
                process.stdin.write(piece)
        except (OSError, EOFError):
            pass
        process.stdin.close()
        while process.poll() is None and not channel.closed and channel.get_transport().is_active():
            time.sleep(0.02)
        if process.poll() is None:
            # sshd(8) hangs up its terminals; nobody would be left to end what runs without one.
            os.killpg(process.pid, signal.SIGKILL)
        for pump in pumps:
            pump.join()
    if not channel.closed:
        with contextlib.suppress(OSError, EOFError):
            channel.send_exit_status(process.returncode)
            channel.close()


def _pump(source: IO[bytes], sink: Callable[[bytes], object]) -> None:
    try:
        while piece := source.read(65536):
            sink(piece)
    except (OSError, EOFError):
        return


def _tunnel(transport: paramiko.Transport, destination: tuple[str, int]) -> None:
    channel = transport.accept(10)
    assert channel is not None
    with socket.create_connection(destination) as plain:
        back = threading.Thread(target=_back, args=(plain, channel), daemon=True)
        back.start()
        try:
            while piece := channel.recv(65536):
                plain.sendall(piece)
            plain.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        back.join()
    channel.close()


def _back(plain: socket.socket, channel: paramiko.Channel) -> None:
    try:
        while piece := plain.recv(65536):
            channel.sendall(piece)
        channel.shutdown_write()
    except OSError:
        channel.close()


def generate_key(directory: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A key by ssh-keygen, its public half beside it."""
    path = directory / f"id_{kind}{'_locked' if passphrase else ''}"
    command = ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-f", str(path)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return path
