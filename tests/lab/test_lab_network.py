"""The lab's network: everybody reaches everybody, links can be slow, late, cut."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from bench.lab.errors import LabCommandError
from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.lab.plan import BURST_BYTES_MIN, RATE_QUEUE_MS
from tests.lab.waiting import wait_until


@pytest.mark.parametrize("family", ["-4", "-6"])
def test_everybody_reaches_everybody_by_name(lab: Lab, family: str) -> None:
    nodes = [*lab.hosts, lab.client]
    for node in nodes:
        for peer in nodes:
            node.run(["ping", family, "-q", "-c1", "-W5", peer.name])


def test_ssh_opens_every_host_and_checks_who_it_is(lab: Lab) -> None:
    a, b = lab.host("A"), lab.host("B")
    for target in ("B", "b", b.address, b.address6):
        assert a.run(["ssh", "-oBatchMode=yes", target, "hostname"]).stdout == "B\n"
    path = a.run(["ssh", "B", "printenv", "PATH"]).stdout
    assert path == b.run(["printenv", "PATH"]).stdout
    # Another host's key under B's name: refused.
    stranger = f"-oHostKeyAlias={a.address}"
    with pytest.raises(LabCommandError, match="verification failed"):
        a.run(["ssh", "-oBatchMode=yes", stranger, "B", "true"])


def test_only_the_key_of_the_lab_opens_a_host(lab: Lab) -> None:
    keyless = ["ssh", "-oBatchMode=yes", "-oIdentityFile=/dev/null", "-oIdentitiesOnly=yes"]
    with pytest.raises(LabCommandError, match="Permission denied"):
        lab.host("A").run([*keyless, "B", "true"])


def test_a_port_plugged_into_a_hosts_bridge_is_on_the_network(lab: Lab) -> None:
    """As containers are: a namespace with a veth in br0. The host's own MAC must not move."""
    host = lab.host("A")
    script = """
        ip netns add c1
        ip link add port-c1 type veth peer name eth0 address 00:00:00:00:10:01 netns c1
        ip -n c1 address add 10.77.0.10/24 dev eth0
        ip -n c1 link set eth0 up
        ip link set port-c1 address 00:00:00:00:00:02 master br0 up
    """
    mac = ["cat", "/sys/class/net/br0/address"]
    assert host.run(mac).stdout.strip() == host.mac
    host.run(["sh", "-ec", script])
    try:
        for node in (lab.client, lab.host("B"), host):
            node.run(["ping", "-q", "-c1", "-W5", "10.77.0.10"])
        assert host.run(mac).stdout.strip() == host.mac
    finally:
        host.run(["ip", "netns", "delete", "c1"])


# Reads what comes until TIME (seconds) after the first byte; prints bytes and the seconds it took.
RECEIVE = """
import socket, sys, time
server = socket.create_server(("0.0.0.0", 9000)); print("ready", flush=True)
peer, _ = server.accept(); started = time.monotonic(); total = 0
while time.monotonic() - started < float(sys.argv[1]):
    received = len(peer.recv(65536))
    if not received: break
    total += received
print(total, time.monotonic() - started)
"""
SEND = """
import socket, sys
peer = socket.create_connection((sys.argv[1], 9000))
try:
    while True: peer.sendall(bytes(65536))
except OSError: pass
"""


def _transfer(sender: Host, receiver: Host, seconds: float) -> tuple[int, float]:
    """Bytes that arrived, and the seconds in which they did."""
    with receiver.popen(["python3", "-c", RECEIVE, str(seconds)], stdout=-1) as receiving:
        assert receiving.stdout is not None
        assert receiving.stdout.readline() == "ready\n"
        with sender.popen(["python3", "-c", SEND, receiver.address]) as sending:
            total, elapsed_s = receiving.stdout.readline().split()
            receiving.wait()
            sending.wait()
    return int(total), float(elapsed_s)


def test_a_rate_limits_both_directions_of_a_link(new_lab: Callable[..., Lab]) -> None:
    bytes_per_s = 20_000_000 / 8
    lab = new_lab(["A"], rate="20mbit")
    host, client = lab.host("A"), lab.client
    for sender, receiver in ((host, client), (client, host)):
        total, elapsed_s = _transfer(sender, receiver, 0.5)
        # What the bucket and the queue of one link may hold comes on top.
        limit = bytes_per_s * (elapsed_s + RATE_QUEUE_MS / 1000) + BURST_BYTES_MIN
        assert 0.1 * limit < total <= limit


def test_a_rate_can_be_set_while_the_lab_runs(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A"])
    host, client = lab.host("A"), lab.client
    free, free_s = _transfer(host, client, 0.3)
    lab.set_rate("A", "20mbit")
    limited, limited_s = _transfer(host, client, 0.3)
    limit = 20_000_000 / 8 * (limited_s + RATE_QUEUE_MS / 1000) + BURST_BYTES_MIN
    assert limited <= limit
    assert free / free_s > 5 * limited / limited_s


def test_a_delay_holds_back_what_hosts_send(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"], delay_ms=20)
    for sender, peer, delays in ((lab.host("A"), "B", 2), (lab.client, "A", 1)):
        for family in ("-4", "-6"):
            out = sender.run(["ping", family, "-q", "-c2", "-i0.2", "-W5", peer]).stdout
            fastest = re.search(r"= ([\d.]+)/", out)
            assert fastest is not None, out
            assert float(fastest.group(1)) >= delays * 20


def test_a_delayed_link_carries_every_byte(new_lab: Callable[..., Lab]) -> None:
    """Large segments and unfinished checksums must pass the delay line unharmed."""
    lab = new_lab(["A", "B"], delay_ms=3)
    lab.host("A").run(["sh", "-c", "head -c 20000000 /dev/urandom >/root/data"])
    script = "scp -q /root/data B:/root/data && sha256sum /root/data && ssh B sha256sum /root/data"
    sent, arrived = lab.host("A").run(["sh", "-c", script]).stdout.splitlines()
    assert sent == arrived
    lab.crash("B")
    lab.boot("B")
    assert lab.host("A").run(["ssh", "B", "sha256sum", "/root/data"]).stdout.strip() == sent


def _reaches(sender: Host, peer: str) -> bool:
    return sender.run(["ping", "-4", "-q", "-c1", "-W5", peer], check=False).returncode == 0


def _is_cut_off(sender: Host, peer: str) -> bool:
    return sender.run(["ping", "-4", "-q", "-c1", "-W1", peer], check=False).returncode != 0


def test_a_cable_can_be_pulled_and_plugged(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"])
    lab.set_link("B", up=False)
    assert _is_cut_off(lab.host("A"), "B")
    assert _is_cut_off(lab.client, "B")
    assert _reaches(lab.client, "A")
    lab.set_link("B", up=True)
    wait_until("A finds B again", lambda: _reaches(lab.host("A"), "B"))


@pytest.mark.parametrize("delay_ms", [0, 1])
def test_hosts_can_be_isolated_from_each_other_only(
    new_lab: Callable[..., Lab], delay_ms: float
) -> None:
    lab = new_lab(["A", "B"], delay_ms=delay_ms)
    lab.set_isolated(["A", "B"], isolated=True)
    assert _is_cut_off(lab.host("A"), "B")
    assert _reaches(lab.client, "A")
    assert _reaches(lab.client, "B")
    lab.set_isolated(["A", "B"], isolated=False)
    wait_until("A finds B again", lambda: _reaches(lab.host("A"), "B"))


def test_a_link_can_be_given_faults_while_the_lab_runs(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"])
    a, b = lab.host("A"), lab.host("B")
    assert _reaches(a, "B")
    lab.set_fault("A", loss=1.0)
    assert _is_cut_off(a, "B")
    lab.set_fault("A", delay_ms=30)
    out = b.run(["ping", "-4", "-q", "-c2", "-i0.2", "-W5", "A"]).stdout
    fastest = re.search(r"= ([\d.]+)/", out)
    assert fastest is not None, out
    assert float(fastest.group(1)) >= 30
    lab.set_fault("A", loss=0.02, reorder=0.05)
    a.run(["sh", "-c", "head -c 3000000 /dev/urandom >/root/data"])
    script = "scp -q /root/data B:/root/data && sha256sum /root/data && ssh B sha256sum /root/data"
    sent, arrived = a.run(["sh", "-c", script]).stdout.splitlines()
    assert sent == arrived
    assert _retransmitted(a) > 0
    lab.set_fault("A")
    lab.crash("A")
    lab.boot("A")
    wait_until("A is back", lambda: _reaches(a, "B"))


def _retransmitted(host: Host) -> int:
    """TCP segments that a host has sent again (Tcp of /proc/net/snmp)."""
    names, values = [
        line.split()
        for line in host.run(["cat", "/proc/net/snmp"]).stdout.splitlines()
        if line.startswith("Tcp:")
    ]
    return int(values[names.index("RetransSegs")])


# Listens on the agent's control port, and on another one; says what becomes of who connects there.
LISTEN = """
import socket, sys
ports = [7337, 9000]
servers = [socket.create_server(("0.0.0.0", port)) for port in ports]
print("ready", flush=True)
peers = [server.accept()[0] for server in servers]
print("connected", flush=True)
for port, peer in zip(ports, peers):
    try:
        print(port, peer.recv(1), flush=True)
    except OSError as error:
        print(port, error.errno, flush=True)
"""
CONNECT = """
import socket, sys
peers = [socket.create_connection((sys.argv[1], port)) for port in (7337, 9000)]
try:
    peers[0].recv(1)
except OSError as error:
    print(error.errno, flush=True)
peers[1].sendall(b"x")
"""


def test_connections_between_agents_can_be_reset(new_lab: Callable[..., Lab]) -> None:
    lab = new_lab(["A", "B"])
    assert lab.reset_connections("A", "B") == 0
    listen = lab.host("B").popen(["python3", "-c", LISTEN], stdout=-1)
    with listen as listening:
        assert listening.stdout is not None
        assert listening.stdout.readline() == "ready\n"
        connect = ["python3", "-c", CONNECT, lab.host("B").address]
        with lab.host("A").popen(connect, stdout=-1) as connecting:
            assert listening.stdout.readline() == "connected\n"
            assert lab.reset_connections("A", "B") > 0
            told = [listening.stdout.readline() for _ in range(2)]
            out, _ = connecting.communicate()
    # ECONNRESET, ECONNABORTED: what is not the agents' stays.
    assert told[0] == "7337 104\n"
    assert told[1] == "9000 b'x'\n"
    assert out in ("103\n", "104\n")
