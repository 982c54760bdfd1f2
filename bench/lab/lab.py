"""A lab: hosts A, B, … and a client on one network, on this machine.

    with Lab(hosts=["A", "B"], rate="1gbit") as lab:
        lab.host("A").run(["ping", "-c1", "B"])
        lab.client.run(["curl", "…"])

The lab ends with the `with` block, and also when this process ends in whatever way: it is held by
a keeper (keeper.py) that watches this process. `Lab.attach(name)` uses one that was started
elsewhere, by `scripts/lab up` for example.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from bench.lab import agents, paths, remains
from bench.lab.errors import LabError
from bench.lab.host import POLL_S, Host
from bench.lab.line import Fault
from bench.lab.plan import CLIENT, Orders, check_name, make_plan, parse_rate, rate_line
from bench.vm.host import MachineHost
from migrate import config

# Up takes a second; a machine under load ten times that.
UP_DEADLINE_S = 60.0
# Virtual machines are slower: bench/vm/machine.py.
MACHINES_UP_DEADLINE_S = 300.0
# remains.KILL_DEADLINE_S for the processes, and the removal of the files of large containers.
DOWN_DEADLINE_S = 60.0
# Where agents listen: control and data.
AGENT_PORTS = (config.CONTROL_PORT, config.DATA_PORT)
# The kernel notices a carrier once a second.
LINK_DEADLINE_S = 10.0


class Lab:
    """A lab that this object starts and ends (`with`), or that it found (`attach`)."""

    def __init__(
        self,
        hosts: Sequence[str] = ("A", "B"),
        *,
        name: str | None = None,
        subnet: int = 0,
        rate: str | None = None,
        delay_ms: float = 0.0,
        source: Path = paths.PROJECT,
        machines: bool = False,
        compared: bool = False,
        owned: bool = True,
    ) -> None:
        """`machines`: hosts are virtual machines with a kernel of their own (bench/vm), which start
        with the source as it is now. `compared`: hosts have the systems that bench compares with
        (`scripts/setup --bench`). `rate`: of each host's link, both ways, like "1gbit";
        `delay_ms`: on all that hosts send.

        `subnet` is the third byte of the addresses; labs do not see each other, so it need not
        differ. An owned lab ends with this process; another one stays until `lab down`.
        """
        self.name = name or f"own-{os.getpid()}-{secrets.token_hex(3)}"
        self._orders = Orders(
            name=self.name,
            hosts=list(hosts),
            subnet=subnet,
            rate=rate,
            delay_ms=delay_ms,
            source=str(source),
            machines=machines,
            compared=compared,
            owner_pid=os.getpid() if owned else None,
        )
        make_plan(self.name, hosts, subnet=subnet, rate=rate, delay_ms=delay_ms)
        self._nodes: dict[str, Host] = {}
        self._ports: dict[str, tuple[str, str]] = {}
        self.keeper_pid = 0
        # Its end tells the keeper that the owner is gone, or wants the lab to end.
        self._lifeline: IO[bytes] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    @classmethod
    def attach(cls, name: str) -> Self:
        """A running lab by its name; LabError when there is none."""
        state = paths.state_path(check_name("lab", name))
        try:
            description = json.loads((state / paths.DESCRIPTION).read_text())
        except FileNotFoundError:
            description = None
        if description is None or not remains.is_alive(state):
            up = ", ".join(names()) or "none"
            raise LabError(
                f"no lab {name} is up (up: {up}); start it: scripts/lab up --name {name}"
            )
        lab = cls(name=name)
        lab._learn(description)
        return lab

    def start(self) -> None:
        """Starts the lab; LabError with the reason when it can't be, and nothing is left then."""
        keeper = subprocess.Popen(
            [sys.executable, "-m", "bench.lab.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=paths.PROJECT,
            start_new_session=True,
        )
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        assert keeper.stderr is not None
        with keeper.stdout as answers, keeper.stderr as errors:
            keeper.stdin.write(json.dumps(asdict(self._orders)).encode() + b"\n")
            keeper.stdin.flush()
            try:
                machines = self._orders.machines
                answer = _read_answer(
                    answers, MACHINES_UP_DEADLINE_S if machines else UP_DEADLINE_S
                )
                if "error" in answer:
                    raise LabError(f"lab {self.name}: {answer['error']}")
            except BaseException as error:
                keeper.stdin.close()
                keeper.terminate()
                keeper.wait(DOWN_DEADLINE_S)
                error.add_note(errors.read().decode(errors="replace"))
                raise
        self._learn(answer)
        self._keeper = keeper
        self._lifeline = keeper.stdin

    def close(self) -> None:
        """Ends a lab that this object started; what remains of it is nothing."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        if self._lifeline is not None:
            self._lifeline.close()
        keeper.terminate()
        try:
            status = keeper.wait(DOWN_DEADLINE_S)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"the keeper of lab {self.name}, {keeper.pid}, does not end") from error
        if status != 0:
            # Killed, or it could not remove something: the sweep does it, or says what.
            with remains.sweeping():
                remains.remove(self.name)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def hosts(self) -> list[Host]:
        """All hosts, without the client."""
        return [node for name, node in self._nodes.items() if name != CLIENT]

    @property
    def client(self) -> Host:
        return self._nodes[CLIENT]

    def host(self, name: str) -> Host:
        """A host, or the client, by its name."""
        try:
            return self._nodes[name]
        except KeyError:
            raise LabError(f"lab {self.name} has no host {name}, but {[*self._nodes]}") from None

    def start_agents(self) -> None:
        """Starts `migrate agent` on every host and waits until each one accepts connections."""
        for host in self.hosts:
            agents.launch(host)
        for host in self.hosts:
            agents.wait_listening(host)

    def start_agent(self, host: str, env: Mapping[str, str] | None = None) -> None:
        """Starts the agent of one host, with `env` added to its environment, and waits for it."""
        agents.launch(self.host(host), env)
        agents.wait_listening(self.host(host))

    def kill_agent(self, host: str) -> None:
        """SIGKILL for the agent of one host; what it had started itself is left alone."""
        agents.kill(self.host(host))

    def crash(self, host: str) -> None:
        """Ends a host as a power failure would; what it has written to its disks stays."""
        self._request("crash", host)

    def boot(self, host: str) -> None:
        """Starts a host again after `crash`; `pid` of the Host is a new one then."""
        self._request("boot", host)

    def set_link(self, host: str, *, up: bool) -> None:
        """Pulls or plugs the cable between a host (with all its containers) and the network.

        A plugged one is usable when this returns; who looked for a neighbour in vain before may
        still take a second to look again.
        """
        wire_end, _ = self._ports[host]
        self._in_wire("ip", "link", "set", wire_end, "up" if up else "down")
        if up:
            self._wait_forwarding(host)

    def set_isolated(self, hosts: Sequence[str], *, isolated: bool) -> None:
        """Cuts the given hosts off from each other, while the client and other hosts reach them."""
        for host in hosts:
            _, port = self._ports[host]
            state = "on" if isolated else "off"
            self._in_wire("bridge", "link", "set", "dev", port, "isolated", state)

    def set_rate(self, host: str, rate: str) -> None:
        """Limits a host's link, both ways, from now on ("100mbit")."""
        bits = parse_rate(rate)
        self.host(host).run(["tc", *rate_line("uplink", bits).split()])
        self._in_wire("tc", *rate_line(self._ports[host][0], bits).split())

    def set_fault(
        self,
        host: str,
        *,
        delay_ms: float = 0.0,
        loss: float = 0.0,
        reorder: float = 0.0,
        seed: int = 0,
    ) -> None:
        """What happens from now on to what a host sends (line.py); without arguments, nothing.

        The first call for a host puts a line into its link, which makes it slower for good, and
        plugs it into another port: isolate it again if it was. Frames are lost and overtaken one by
        one, so hosts send none that a card would still have to cut.
        """
        fault = asdict(Fault(delay_ms, loss, reorder, seed))
        if loss or reorder:
            self.host(host).run(["ip", "link", "set", "dev", "uplink", "gso_max_segs", "1"])
        self._request("fault", host, fault=fault)
        self._wait_forwarding(host)

    def reset_connections(self, host: str, peer: str) -> int:
        """Resets every TCP connection between the agents' ports of two hosts; how many there were.

        By SOCK_DESTROY (`ss -K`): the peer gets a real RST. Containers' connections stay.
        """
        count = 0
        for one, other in ((host, peer), (peer, host)):
            for direction in ("dport", "sport"):
                for port in AGENT_PORTS:
                    address = self.host(other).address
                    what = ["dst", address, "and", direction, "=", f":{port}"]
                    ended = self.host(one).run(["ss", "-HKtn", "state", "established", *what])
                    count += len(ended.stdout.splitlines())
        return count

    def _in_wire(self, *command: str) -> str:
        entered = ["nsenter", "-t", str(self.keeper_pid), "-n", "--", *command]
        done = subprocess.run(entered, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabError(f"in the wire: {' '.join(command)}: {done.stderr}")
        return done.stdout

    def _wait_forwarding(self, host: str) -> None:
        deadline = time.monotonic() + LINK_DEADLINE_S
        while not (
            _forwards(self._in_wire(*_PORT_STATE, self._ports[host][1]))
            and _forwards(self.host(host).run([*_PORT_STATE, "uplink"]).stdout)
        ):
            if time.monotonic() > deadline:
                raise LabError(f"the link of {host} is not up after {LINK_DEADLINE_S:g} s")
            time.sleep(POLL_S)

    def _request(self, verb: str, host: str, **arguments: Any) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(UP_DEADLINE_S)
            connection.connect(str(paths.state_path(self.name) / paths.CONTROL))
            request = {"verb": verb, "host": self.host(host).name, **arguments}
            connection.sendall(json.dumps(request).encode())
            with connection.makefile() as answers:
                answer = json.loads(answers.readline())
        if "error" in answer:
            raise LabError(f"{verb} {host}: {answer['error']}")
        self._learn(answer)

    def _learn(self, description: Mapping[str, Any]) -> None:
        self.keeper_pid = description["keeper_pid"]
        for node in description["nodes"]:
            name = node["name"]
            self._ports[name] = (f"wire{node['index']}", node["port"])
            if name in self._nodes:
                self._nodes[name].pid = node["pid"]
            else:
                self._nodes[name] = MachineHost(node) if node["is_machine"] else Host(node)


# iproute2's view of a port of a bridge, which tells when the kernel has seen the carrier.
_PORT_STATE = ("bridge", "-json", "link", "show", "dev")


def _forwards(ports_json: str) -> bool:
    ports = json.loads(ports_json)
    return bool(ports) and ports[0]["state"] == "forwarding"


def names() -> list[str]:
    """The labs that are up, or on their way."""
    if not paths.STATE_BASE.is_dir():
        return []
    return sorted(path.name for path in paths.STATE_BASE.iterdir() if remains.is_alive(path))


def take_down(name: str) -> bool:
    """Ends a lab, whoever started it, and waits until nothing of it is left; False: none there."""
    state = paths.state_path(check_name("lab", name))
    found = state.is_dir()
    pid = int((state / remains.LOCK).read_text() or 0) if remains.is_alive(state) else 0
    if pid:
        with contextlib.suppress(ProcessLookupError):
            keeper_fd = os.pidfd_open(pid)
            try:
                # Still alive after the descriptor was opened: it is the keeper's.
                if remains.is_alive(state):
                    signal.pidfd_send_signal(keeper_fd, signal.SIGTERM)
                    if not select.select([keeper_fd], [], [], DOWN_DEADLINE_S)[0]:
                        raise LabError(f"the keeper of lab {name}, {pid}, does not end")
            finally:
                os.close(keeper_fd)
    with remains.sweeping():
        remains.sweep()
    return found


def _read_answer(answers: IO[bytes], deadline_s: float) -> dict[str, Any]:
    if not select.select([answers], [], [], deadline_s)[0]:
        raise LabError(f"the keeper gave no answer in {deadline_s:g} s")
    line = answers.readline()
    if not line:
        raise LabError("the keeper ended without an answer")
    answer: dict[str, Any] = json.loads(line)
    return answer
