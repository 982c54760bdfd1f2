"""A connection of another process that is in repair mode, as a killed CRIU leaves it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

from migrate import tcp_repair

TCP_REPAIR = 19
# Connects, goes into repair mode, then does as it is told: one line each.
CLIENT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
connection.setsockopt(socket.IPPROTO_TCP, 19, 1)
print("repairing", flush=True)
sys.stdin.readline()
print(connection.getsockopt(socket.IPPROTO_TCP, 19), flush=True)
connection.sendall(b"still here")
sys.stdin.readline()
"""


def test_connections_leave_repair_mode_and_speak_again(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, port],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with client, server.accept()[0] as connection:
            assert client.stdin is not None
            assert client.stdout is not None
            assert client.stdout.readline() == "repairing\n"
            below = tmp_path / "below"
            below.mkdir()
            (tmp_path / "cgroup.procs").write_text("")
            (below / "cgroup.procs").write_text(f"{client.pid}\n999999999\n")
            assert tcp_repair.leave(tmp_path) == 1
            # Others are left as they are.
            assert tcp_repair.leave(tmp_path) == 0
            client.stdin.write("\n")
            client.stdin.flush()
            assert client.stdout.readline() == "0\n"
            connection.settimeout(10)
            assert connection.recv(64) == b"still here"
            client.stdin.write("\n")
            client.stdin.flush()


def test_a_cgroup_that_is_gone(tmp_path: Path) -> None:
    assert tcp_repair.leave(tmp_path / "gone") == 0
