"""Connections to a server on loopback: whose key, which proof, what is carried."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import paramiko
import pytest

from tests.transport.ssh.place import Place, Typist, made
from tests.transport.ssh.server import Behaviour, generate_key
from transport.ssh.asking import Asking
from transport.ssh.connecting import connect
from transport.ssh.connection import SshConnection
from transport.ssh.errors import (
    HostKeyChangedError,
    HostKeyRevokedError,
    HostKeyUnknownError,
    SshAuthError,
    SshCommandError,
    SshUnreachableError,
)
from transport.ssh.forwarding import Forward
from transport.ssh.known_hosts import fingerprint


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


# ---- whose key ----


def test_a_known_host_is_asked_nothing(place: Place) -> None:
    server = place.serve()
    place.know(server)
    with place.connect(server) as ssh:
        done = ssh.run(["printf", "%s|", "a b", "$HOME", "'"], deadline_s=20)
    assert (done.status, done.stdout) == (0, b"a b|$HOME|'|")


def test_of_several_keys_the_known_one_is_asked_for(place: Place) -> None:
    """A server prefers Ed25519; known is its ECDSA key."""
    ecdsa = generate_key(made(place.directory / "ecdsa"), "ecdsa")
    server = place.serve(None, ecdsa)
    place.know(server, ecdsa)
    place.connect(server).close()


def test_an_unknown_key_is_refused_without_anybody_to_ask(place: Place) -> None:
    server = place.serve()
    with pytest.raises(HostKeyUnknownError) as refused:
        place.connect(server)
    assert _fingerprint(place.host_key) in str(refused.value)
    assert "--accept-new" in refused.value.remedy
    assert server.attempts == []
    assert not place.known_hosts.exists()


@pytest.mark.parametrize("confirms", [True, False])
def test_an_unknown_key_is_shown_and_asked(place: Place, confirms: bool) -> None:
    server, typist = place.serve(), Typist(confirms=confirms)
    if confirms:
        place.connect(server, typist).close()
        place.connect(server).close()
    else:
        with pytest.raises(HostKeyUnknownError):
            place.connect(server, typist)
        assert not place.known_hosts.exists()
    (question,) = typist.asked
    assert _fingerprint(place.host_key) in question


def test_a_new_key_is_accepted_and_written_down(place: Place) -> None:
    server = place.serve()
    place.connect(server, accept_new=True).close()
    place.connect(server).close()
    assert f"[127.0.0.1]:{server.port} ssh-ed25519 " in place.known_hosts.read_text()


def test_the_configuration_may_want_no_new_key(place: Place) -> None:
    server, typist = place.serve(), Typist(confirms=True)
    place.more = "StrictHostKeyChecking yes\n"
    with pytest.raises(HostKeyUnknownError):
        place.connect(server, typist)
    assert typist.asked == []


@pytest.mark.parametrize("configured", ["ask", "accept-new", "no"])
def test_a_changed_key_is_refused_whatever_is_said(place: Place, configured: str) -> None:
    server, typist = place.serve(), Typist(confirms=True)
    former = generate_key(made(place.directory / "former"))
    place.know(server, former)
    place.more = f"StrictHostKeyChecking {configured}\n"
    before = place.known_hosts.read_text()
    with pytest.raises(HostKeyChangedError) as refused:
        place.connect(server, typist, accept_new=True)
    said = str(refused.value)
    assert _fingerprint(place.host_key) in said
    assert f"{_fingerprint(former)} (ssh-ed25519) in {place.known_hosts}:1" in said
    assert "ssh-keygen" in refused.value.remedy
    assert (typist.asked, server.attempts) == ([], [])
    assert place.known_hosts.read_text() == before


def test_a_key_of_another_type_than_the_known_one_has_changed(place: Place) -> None:
    server = place.serve()
    place.know(server, generate_key(made(place.directory / "former"), "ecdsa"))
    with pytest.raises(HostKeyChangedError):
        place.connect(server, accept_new=True)


def test_a_revoked_key_is_refused(place: Place) -> None:
    server = place.serve()
    place.know(server)
    place.know(server, marker="@revoked ")
    with pytest.raises(HostKeyRevokedError, match="known_hosts:2"):
        place.connect(server, accept_new=True)
    assert server.attempts == []


def test_a_host_that_only_an_authority_vouches_for_is_refused(place: Place) -> None:
    server = place.serve()
    place.know(server, marker="@cert-authority ")
    with pytest.raises(HostKeyUnknownError, match="certificate authority"):
        place.connect(server, Typist(confirms=True), accept_new=True)


# ---- which proof ----


def test_a_key_with_a_passphrase(place: Place) -> None:
    locked = generate_key(place.directory / "user", passphrase="secret")
    unlocked = paramiko.PKey.from_path(locked, b"secret")  # type: ignore[arg-type]
    server, typist = place.serve(Behaviour(keys=[unlocked])), Typist("wrong", "secret")
    place.know(server)
    place.user_key = locked
    place.connect(server, typist).close()
    assert typist.asked == [f"passphrase of {locked}"] * 2
    with pytest.raises(SshAuthError, match="nobody can be asked"):
        place.connect(server)


def test_a_key_of_the_agent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    server = place.serve()
    place.know(server)
    agent = place.directory / "agent.sock"
    command = ["ssh-agent", "-D", "-a", str(agent)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
        try:
            _until(agent.exists)
            environment = {**os.environ, "SSH_AUTH_SOCK": str(agent)}
            add = ["ssh-add", "-q", str(place.user_key)]
            subprocess.run(add, env=environment, check=True, stderr=subprocess.DEVNULL)
            place.user_key.unlink()
            asking = Asking(config_file=_agent_config(place, agent))
            connect(f"somebody@127.0.0.1:{server.port}", asking).close()
        finally:
            running.terminate()


def _agent_config(place: Place, agent: Path) -> Path:
    path = place.directory / "agent_config"
    path.write_text(f"UserKnownHostsFile {place.known_hosts}\nIdentityAgent {agent}\n")
    return path


def test_a_password_is_asked_for_three_times(place: Place) -> None:
    server, typist = place.serve(Behaviour(password="right")), Typist("x", "y", "right")
    place.know(server)
    place.connect(server, typist).close()
    assert typist.asked == ["somebody@127.0.0.1's password"] * 3
    assert server.attempts == ["key somebody", *["password somebody"] * 3]


def test_a_wrong_password_is_the_end_of_it(place: Place) -> None:
    server = place.serve(Behaviour(password="right"))
    place.know(server)
    with pytest.raises(SshAuthError) as refused:
        place.connect(server, Typist("x", "y", "z"))
    assert "publickey" in str(refused.value)
    assert "ssh-copy-id somebody@127.0.0.1" in refused.value.remedy


def test_a_server_may_want_both(place: Place) -> None:
    keys = [paramiko.PKey.from_path(place.user_key)]
    server = place.serve(Behaviour(keys=keys, password="right", after_key=True))
    place.know(server)
    place.connect(server, Typist("right")).close()
    with pytest.raises(SshAuthError):
        place.connect(server)


def test_nobody_listens(place: Place) -> None:
    server = place.serve()
    server.close()
    place._servers.clear()
    with pytest.raises(SshUnreachableError, match="refused"):
        place.connect(server)


def test_a_server_that_is_none(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answering = threading.Thread(target=_say, args=(listener, b"HTTP/1.1 400\r\n" * 200))
        answering.start()
        with pytest.raises(SshUnreachableError):
            place.connect(_At(listener.getsockname()[1]))  # type: ignore[arg-type]
        answering.join()


class _At:
    def __init__(self, port: int) -> None:
        self.port = port


# ---- commands ----


@pytest.fixture
def ssh(place: Place) -> Iterator[SshConnection]:
    server = place.serve()
    place.know(server)
    with place.connect(server) as connection:
        yield connection


def test_what_goes_in_and_what_comes_out(ssh: SshConnection) -> None:
    content = [os.urandom(1 << 20) for _ in range(3)]
    script = 'sha256sum; echo "of $0" >&2; exit 3'
    done = ssh.run(["sh", "-c", script, "me"], stdin=iter(content), deadline_s=60)
    digest = hashlib.sha256(b"".join(content)).hexdigest()
    assert (done.status, done.stdout.split()[0].decode()) == (3, digest)
    assert done.last_words == "of me"


def test_a_command_that_does_not_read_its_input(ssh: SshConnection) -> None:
    done = ssh.run(["true"], stdin=(bytes(1 << 16) for _ in range(256)), deadline_s=60)
    assert done.status == 0


@pytest.mark.parametrize("to", ["/dev/stdout", "/dev/stderr"])
def test_a_command_that_never_stops_talking(ssh: SshConnection, to: str) -> None:
    with pytest.raises(SshCommandError, match="prints more"):
        ssh.run(["sh", "-c", f"yes >{to}"], deadline_s=60, output_bytes_max=100_000)


def test_a_connection_that_is_lost_does_not_hide_that_a_command_said_too_much(
    ssh: SshConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(_: paramiko.Channel) -> None:
        raise EOFError

    monkeypatch.setattr(paramiko.Channel, "close", lost)
    with pytest.raises(SshCommandError, match="prints more"):
        ssh.run(["head", "-c200000", "/dev/zero"], deadline_s=60, output_bytes_max=100_000)


def test_a_command_that_never_ends(ssh: SshConnection) -> None:
    with pytest.raises(SshCommandError, match="too long"):
        ssh.run(["sleep", "1000"], deadline_s=0.5)


def test_last_words_can_be_shown_on_a_terminal(ssh: SshConnection) -> None:
    done = ssh.run(["printf", r"\033[2Jgone\007\n"], deadline_s=20)
    wrong = ssh.run(["sh", "-c", r"printf '\033[2Jgone\007\n' >&2"], deadline_s=20)
    assert b"\x1b" in done.stdout
    assert wrong.last_words == "[2Jgone"


def test_a_connection_that_is_lost_is_an_error(place: Place) -> None:
    server = place.serve()
    place.know(server)
    with place.connect(server) as ssh:
        server.close()
        place._servers.clear()
        with pytest.raises(SshUnreachableError):
            ssh.run(["true"], deadline_s=20)


# ---- forwarded ports ----


def test_a_port_of_the_other_host(ssh: SshConnection) -> None:
    content = os.urandom(4 << 20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        echoing = threading.Thread(target=_echo, args=(listener,))
        echoing.start()
        with (
            Forward(ssh, "127.0.0.1", listener.getsockname()[1]) as forward,
            socket.create_connection(("127.0.0.1", forward.port)) as stream,
        ):
            sending = threading.Thread(target=_send, args=(stream, content))
            sending.start()
            got = bytearray()
            while piece := stream.recv(1 << 16):
                got += piece
            sending.join()
        echoing.join()
    assert bytes(got) == content


def test_nobody_at_the_other_end_and_no_tunnels(place: Place) -> None:
    keys = [paramiko.PKey.from_path(place.user_key)]
    server = place.serve(Behaviour(keys=keys, tunnels=False))
    place.know(server)
    with (
        place.connect(server) as ssh,
        Forward(ssh, "127.0.0.1", 9) as forward,
        socket.create_connection(("127.0.0.1", forward.port)) as stream,
    ):
        stream.settimeout(20)
        assert stream.recv(1) == b""


def test_connections_end_with_the_forward(ssh: SshConnection) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        forward = Forward(ssh, "127.0.0.1", listener.getsockname()[1])
        with socket.create_connection(("127.0.0.1", forward.port)) as stream:
            accepted, _ = listener.accept()
            forward.close()
            stream.settimeout(20)
            assert stream.recv(1) == b""
            accepted.settimeout(20)
            assert accepted.recv(1) == b""
            accepted.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", forward.port))


# ---- jumps ----


@pytest.mark.parametrize("how", ["ProxyJump", "ProxyCommand"])
def test_through_another_host(place: Place, how: str) -> None:
    inner, outer = place.serve(), place.serve()
    place.know(inner)
    place.know(outer)
    if how == "ProxyJump":
        # For the inner port alone: the jump itself has no jump.
        jump = f"ProxyJump somebody@127.0.0.1:{outer.port}"
        place.more = f'Match exec "test %p = {inner.port}"\n  {jump}\n'
    else:
        pipe = "exec 3<>/dev/tcp/%h/%p; cat <&3 & cat >&3; kill $!"
        place.more = f"ProxyCommand bash -c '{pipe}'\n"
    with place.connect(inner) as ssh:
        assert ssh.run(["echo", "through"], deadline_s=20).stdout == b"through\n"
    assert outer.attempts == (["key somebody"] if how == "ProxyJump" else [])


# ---- small parts ----


def _fingerprint(key: Path) -> str:
    return fingerprint(base64.b64decode(key.with_suffix(".pub").read_text().split()[1]))


def _until(condition: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


def _say(listener: socket.socket, words: bytes) -> None:
    accepted, _ = listener.accept()
    with accepted:
        accepted.sendall(words)


def _echo(listener: socket.socket) -> None:
    accepted, _ = listener.accept()
    with accepted:
        while piece := accepted.recv(1 << 16):
            accepted.sendall(piece)


def _send(stream: socket.socket, content: bytes) -> None:
    stream.sendall(content)
    stream.shutdown(socket.SHUT_WR)
