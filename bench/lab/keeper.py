"""The keeper: one process that holds a lab and takes all of it away when it ends.

    lab.py / `lab up` ──spawns──> keeper (own session, in the wire's network namespace)
                                    ├── shim ── pid 1 of A ── everything in A
                                    ├── shim ── pid 1 of B ── …
                                    ├── shim ── pid 1 of client
                                    └── lines that delay, lose, reorder (only when asked for)

It reads its orders as one line of JSON from standard input, answers one line on standard output
when the lab is up or could not be, and then serves requests (`crash`, `boot`, `fault`) on a socket
in the state directory until the first of: SIGTERM (`lab down`), the end of its owner (a pidfd, and
the end of standard input).
All of its children die with it (PR_SET_PDEATHSIG), also when it is killed by SIGKILL; what then
remains are empty cgroups and the state directory, which the next lab command sweeps (remains.py).
Single-threaded, since PR_SET_PDEATHSIG looks at the thread that forked.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.lab import kernel, paths, remains, sandbox
from bench.lab.enter import enter_command, inside_environment
from bench.lab.errors import LabError
from bench.lab.host_files import LabIdentities
from bench.lab.line import Fault, Line
from bench.lab.line import start as start_line
from bench.lab.plan import (
    CLIENT,
    WIRE_LINES,
    Node,
    Orders,
    insert_line_lines,
    link_lines,
    make_plan,
    node_lines,
    rate_line,
    veth_line,
)
from bench.vm import image, machine

# A command of the lab's own making (ip, tc, sshd) takes milliseconds; this many seconds mean that
# it hangs.
COMMAND_DEADLINE_S = 30.0
# A few hundred modules are compiled.
PACK_DEADLINE_S = 120.0
# A request is a verb and a host's name; who connects sends it at once.
REQUEST_BYTES_MAX = 4096
REQUEST_DEADLINE_S = 5.0


class Keeper:
    def __init__(self, orders: Orders) -> None:
        self._plan = make_plan(
            orders.name,
            orders.hosts,
            subnet=orders.subnet,
            rate=orders.rate,
            delay_ms=orders.delay_ms,
        )
        self._orders = orders
        self._state = paths.state_path(orders.name)
        self._cgroup = paths.cgroup_path(orders.name)
        self._root = paths.root_path(compared=orders.compared)
        self._bytecode = paths.bytecode_path(self._root, Path(orders.source))
        self._hosts: dict[str, sandbox.Started | machine.Machine] = {}
        self._lines: dict[str, Line] = {}
        self._faults: dict[str, Fault] = {}
        if orders.delay_ms:
            self._faults = {node.name: Fault(orders.delay_ms) for node in self._plan.hosts}
        self._requests = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)

    def claim(self) -> None:
        """Makes the lab known under its name; sweeps dead labs on the way."""
        self._bytecode.mkdir(exist_ok=True)
        # scripts/setup prunes nothing that is locked. Kept open for as long as this process lives.
        image_used = [image.path()] if self._orders.machines else []
        for held in (self._root, self._bytecode, *image_used):
            fcntl.flock(os.open(held, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_SH)
        with remains.sweeping():
            remains.sweep()
            self._state.mkdir(parents=True, exist_ok=True)
            if remains.take_lock(self._state) is None:
                raise LabError(f"lab {self._plan.name} is up already")
            remains.note_grace_periods(self._state)
            self._cgroup.mkdir()

    def build(self) -> dict[str, Any]:
        """Starts everything; what `lab.py` needs to know to use it."""
        kernel.unshare(kernel.CLONE_NEWNET)
        _run(["ip", "-batch", "-"], WIRE_LINES)
        identities = LabIdentities(self._plan)
        for node in self._plan.nodes:
            upper = self._state / node.name / "upper"
            upper.mkdir(parents=True)
            identities.write(upper, node)
        self._power_on(self._plan.nodes)
        self._requests.bind(str(self._state / paths.CONTROL))
        self._requests.listen()
        return self._describe()

    def serve(self, stop_fds: Sequence[int], wakeup_fd: int) -> None:
        """Serves requests until one of `stop_fds` becomes readable or ends, or SIGTERM comes."""
        poll = select.poll()
        for descriptor in (*stop_fds, wakeup_fd, self._requests.fileno()):
            poll.register(descriptor, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor in stop_fds:
                    return
                if descriptor == wakeup_fd:
                    if signal.SIGTERM in os.read(wakeup_fd, 64):
                        return
                else:
                    self._serve_request()

    def close(self) -> None:
        for name in [*self._hosts]:
            self._end_processes(name)
        with remains.sweeping():
            remains.remove(self._plan.name)
            with contextlib.suppress(OSError):
                paths.STATE_BASE.rmdir()

    def _serve_request(self) -> None:
        connection = self._requests.accept()[0]
        with connection:
            connection.settimeout(REQUEST_DEADLINE_S)
            try:
                request = json.loads(connection.recv(REQUEST_BYTES_MAX))
                node = self._node(request["host"])
                if request["verb"] == "fault":
                    self._set_fault(node, Fault(**request["fault"]))
                else:
                    self._crash(node)
                if request["verb"] == "boot":
                    self._power_on([node])
                answer = self._describe()
            except (LabError, OSError, ValueError, KeyError, TypeError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(answer).encode() + b"\n")

    def _node(self, name: str) -> Node:
        for node in self._plan.nodes:
            if node.name == name:
                return node
        raise LabError(f"lab {self._plan.name} has no host {name}")

    def _power_on(self, nodes: Sequence[Node]) -> None:
        """Starts nodes, all at once, from what their disks contain."""
        for node in nodes:
            self._hosts[node.name] = self._start(node)
        for node in nodes:
            self._hosts[node.name].wait_ready()
        links: list[str] = []
        for node in nodes:
            if not self._is_machine(node):
                links.append(veth_line(node, self._hosts[node.name].init_pid))
            links += link_lines(node, has_line=node.name in self._faults)
        _run(["ip", "-batch", "-"], links)
        if self._orders.machines:
            self._furnish([node for node in nodes if self._is_machine(node)])
        for node in nodes:
            self._configure(node)
        self._write_description()

    def _start(self, node: Node) -> sandbox.Started | machine.Machine:
        if not self._is_machine(node):
            return sandbox.start(self._spec(node))
        _run(["ip", "-batch", "-"], machine.link_lines(node))
        return machine.start(node, self._state / node.name, self._cgroup / node.name)

    def _is_machine(self, node: Node) -> bool:
        return self._orders.machines and not node.is_client

    def _furnish(self, nodes: Sequence[Node]) -> None:
        """Gives machines, all started from the same memory, what is theirs, and the source.

        The client packs it: its Python, which is the machines', compiles it here in seconds.
        """
        client = self._node(CLIENT)
        enter = enter_command(
            self._hosts[CLIENT].init_pid,
            self._cgroup / client.name,
            ["sh", "-c", machine.PACK_SOURCE],
        )
        source = subprocess.run(
            enter,
            check=False,
            env=inside_environment(),
            capture_output=True,
            timeout=PACK_DEADLINE_S,
        )
        if source.returncode != 0:
            raise LabError(f"the source is not packed: {source.stderr.decode(errors='replace')}")
        for node in nodes:
            host = self._hosts[node.name]
            assert isinstance(host, machine.Machine)
            host.become(self._state / node.name / "upper")
            host.unpack(source.stdout)

    def _crash(self, node: Node) -> None:
        """Ends a node as a power failure would, except that its disks have all that was written."""
        self._end_processes(node.name)
        remains.end_cgroup(self._cgroup / node.name)
        # The link goes with the host's network namespace, but not at once.
        for device in (node.wire_end, node.slow_end):
            _run(["ip", "link", "delete", device], may_fail=True)

    def _end_processes(self, name: str) -> None:
        if name in self._hosts:
            self._hosts.pop(name).end()
        if name in self._lines:
            self._lines.pop(name).end()

    def _set_fault(self, node: Node, fault: Fault) -> None:
        """A link that has no line yet gets one, and keeps it."""
        if node.name not in self._hosts:
            raise LabError(f"{node.name} is down")
        self._faults[node.name] = fault
        if node.name in self._lines:
            self._lines[node.name].change(fault)
            return
        _run(["ip", "-batch", "-"], insert_line_lines(node))
        self._lines[node.name] = start_line(node, fault)
        self._write_description()

    def _spec(self, node: Node) -> sandbox.HostSpec:
        return sandbox.HostSpec(
            name=node.name,
            root=self._root,
            state=self._state / node.name,
            cgroup=self._cgroup / node.name,
            source=Path(self._orders.source),
            bytecode=self._bytecode,
        )

    def _configure(self, node: Node) -> None:
        host = self._hosts[node.name]
        _run(host.in_network(["ip", "-batch", "-"]), node_lines(node))
        if node.is_client:
            return
        if self._plan.rate_bits is not None:
            rate = self._plan.rate_bits
            _run(host.in_network(["tc", "-batch", "-"]), [rate_line("uplink", rate)])
            _run(["tc", "-batch", "-"], [rate_line(node.wire_end, rate)])
        if node.name in self._faults:
            self._lines[node.name] = start_line(node, self._faults[node.name])
        if not self._is_machine(node):  # its systemd has started one
            sshd = enter_command(host.init_pid, self._cgroup / node.name, ["/usr/sbin/sshd"])
            _run(sshd, environment=inside_environment())

    def _write_description(self) -> None:
        partial = self._state / f"{paths.DESCRIPTION}.partial"
        partial.write_text(json.dumps(self._describe()))
        partial.rename(self._state / paths.DESCRIPTION)

    def _describe(self) -> dict[str, Any]:
        return {
            "name": self._plan.name,
            "keeper_pid": os.getpid(),
            "nodes": [
                {
                    **asdict(node),
                    "port": node.port(has_line=node.name in self._faults),
                    "pid": self._hosts[node.name].init_pid if node.name in self._hosts else 0,
                    "cgroup": str(self._cgroup / node.name),
                    "state": str(self._state / node.name),
                    "is_machine": self._is_machine(node),
                }
                for node in self._plan.nodes
            ],
        }


def _run(
    command: Sequence[str],
    lines: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    may_fail: bool = False,
) -> None:
    try:
        subprocess.run(
            command,
            input="".join(f"{line}\n" for line in lines),
            env=environment,
            capture_output=True,
            text=True,
            check=not may_fail,
            timeout=COMMAND_DEADLINE_S,
        )
    except subprocess.CalledProcessError as error:
        raise LabError(f"{' '.join(command)}: {error.stderr}{error.stdout}") from error
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{' '.join(command)} hangs") from error


def main() -> int:
    orders = Orders(**json.loads(sys.stdin.readline()))
    stop_fds: list[int] = []
    if orders.owner_pid is not None:
        stop_fds = [os.pidfd_open(orders.owner_pid), sys.stdin.fileno()]
        # The pid was the owner's only if the owner is still our parent.
        if os.getppid() != orders.owner_pid:
            return 1
    # A handler is needed for the wakeup descriptor to be written to; it has nothing to do.
    signal.signal(signal.SIGTERM, lambda *_: None)
    wakeup_read, wakeup_write = os.pipe()
    os.set_blocking(wakeup_write, False)
    signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
    try:
        keeper = Keeper(orders)
        keeper.claim()
    except (LabError, OSError) as error:
        _answer({"error": str(error)})
        return 1
    try:
        _answer(keeper.build())
        keeper.serve(stop_fds, wakeup_read)
    except (LabError, OSError) as error:
        _answer({"error": str(error)})
        return 1
    finally:
        keeper.close()
    return 0


def _answer(message: Mapping[str, Any]) -> None:
    # Nobody listens any more when the owner ended meanwhile; serve() sees that itself.
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
