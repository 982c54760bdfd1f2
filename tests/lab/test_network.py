"""A container's network: captured on one host, made on another, plugged, announced, removed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from bench.containers import ContainerSpec, make_network
from bench.lab.errors import LabCommandError
from bench.lab.host import Host
from bench.lab.lab import Lab
from bench.probe_process import PYTHON_INSIDE
from migrate.announce import REPEAT_DELAYS_S
from tests.lab.inside import PRELUDE, inside
from tests.lab.waiting import wait_until

SPEC = ContainerSpec("net1", "memory", address="10.77.0.61/24", address6="fd77::61/112")
MORE = """
    ip -n net1 route add default via 10.77.0.1
    ip -n net1 route add 10.99.0.0/16 via 10.77.0.3 metric 7 mtu 1300
    ip -n net1 route add 192.0.2.1/32 via 172.16.0.1 dev eth0 onlink
    ip -n net1 route add blackhole 10.98.0.0/16
    ip -n net1 -6 route add default via fd77::1
    ip -n net1 address add 10.77.0.62/24 dev eth0 noprefixroute
    ip -n net1 address add 127.0.0.9/32 dev lo
    ip -n net1 neighbour add 10.77.0.3 lladdr 02:00:00:00:00:03 dev eth0 nud permanent
    ip netns exec net1 ping -q -c1 -W5 10.77.0.1
    ip netns exec net1 sysctl -qw net.core.somaxconn=77 net.ipv4.conf.eth0.arp_ignore=1
"""
CAPTURE = """
from migrate import network
captured = network.capture(
    Path("/run/netns", given), hostname="net1", sysctls=["net.core.somaxconn", "kernel.shmmax"]
)
answer({"identity": captured.identity, "refusals": captured.refusals})
"""
RECREATE = """
from migrate import network
from migrate.network_identity import NetworkIdentity
identity = msgspec.convert(given["identity"], NetworkIdentity)
handle = network.plan(identity, given["name"], given.get("bridges"))
network.recreate(identity, handle)
answer(handle)
"""
DESTROY = """
from migrate import network
handle = msgspec.convert(given, network.NetworkHandle)
network.destroy(handle)
network.destroy(handle)
"""
PLUG_AND_ANNOUNCE = """
import asyncio
from migrate import network
from migrate.announce import Announcer
from migrate.network_identity import NetworkIdentity
identity = msgspec.convert(given["identity"], NetworkIdentity)
handle = msgspec.convert(given["handle"], network.NetworkHandle)
announcer = Announcer(Path(handle.netns), identity)
network.hint_neighbours(Path(handle.netns), identity)
announcer.send()
for port in handle.ports:
    network.plug(port.host_end, port.bridge)
sent = asyncio.run(announcer.announce())
announcer.close()
answer(sent)
"""


@pytest.fixture
def source(lab: Lab) -> Iterator[Host]:
    """Host A with the network of a container, without a container in it."""
    host = lab.host("A")
    make_network(host, SPEC)
    host.run(["sh", "-ec", MORE])
    yield host
    host.run(["sh", "-c", "ip netns delete net1; ip link delete v-net1; true"])


@pytest.fixture
def target(lab: Lab) -> Iterator[Host]:
    host = lab.host("B")
    yield host
    host.run(["sh", "-c", "for n in net1 net2; do ip netns delete $n; done; true"])


def capture(host: Host, name: str = "net1") -> dict[str, Any]:
    answer = inside(host, CAPTURE, name)
    assert isinstance(answer, dict)
    return answer


def interfaces_of(host: Host) -> set[str]:
    return set(host.run(["ls", "/sys/class/net"]).stdout.split())


def test_the_identity_is_what_was_configured(source: Host) -> None:
    captured = capture(source)
    assert captured["refusals"] == []
    identity = captured["identity"]
    lo, eth0 = identity["interfaces"]
    assert (lo["name"], lo["kind"], lo["up"]) == ("lo", "loopback", True)
    assert (eth0["name"], eth0["kind"], eth0["mtu"]) == ("eth0", "veth", 1500)
    assert eth0["mac"] == SPEC.hardware_address
    addresses = {address["network"] for address in eth0["addresses"]}
    assert addresses == {
        *("10.77.0.61/24", "10.77.0.62/24", "fd77::61/112", "fe80::42:aff:fe4d:3d/64")
    }
    assert "127.0.0.9/32" in {address["network"] for address in lo["addresses"]}
    assert identity["ports"] == [{"interface": "eth0", "host_end": "v-net1", "bridge": "br0"}]
    routes = {route["destination"]: route for route in identity["routes"]}
    assert set(routes) == {"default", "10.99.0.0/16", "192.0.2.1/32", "10.98.0.0/16"}
    assert {route["gateway"] for route in identity["routes"]} == {
        *("10.77.0.1", "10.77.0.3", "172.16.0.1", "fd77::1", None)
    }
    assert (routes["10.99.0.0/16"]["metric"], routes["10.99.0.0/16"]["mtu"]) == (7, 1300)
    assert routes["192.0.2.1/32"]["onlink"]
    assert routes["10.98.0.0/16"]["kind"] == "blackhole"
    neighbours = {one["address"]: one["mac"] for one in identity["neighbours"]}
    assert neighbours["10.77.0.3"] == "02:00:00:00:00:03"
    assert "10.77.0.1" in neighbours
    assert identity["sysctls"]["net/core/somaxconn"] == "77"
    assert "kernel/shmmax" not in identity["sysctls"]


def test_the_target_gets_the_same_network_and_nobody_hears_of_it(
    lab: Lab, source: Host, target: Host
) -> None:
    identity = capture(source)["identity"]
    before = interfaces_of(target)
    handle = inside(target, RECREATE, {"identity": identity, "name": "net1"})
    try:
        assert handle["netns"] == "/run/netns/net1"
        assert handle["ports"] == [{"interface": "eth0", "host_end": "v-net1", "bridge": "br0"}]
        made = capture(target)
        assert [code for code, *_ in made["refusals"]] == ["network-bridge"]
        permanent = [one for one in identity["neighbours"] if one["state"] == 128]
        port = {"interface": "eth0", "host_end": "v-net1", "bridge": None}
        expected = identity | {"ports": [port], "neighbours": permanent}
        assert sorted_parts(made["identity"]) == sorted_parts(expected)
        # Ready, but in no bridge: a packet for the container still finds the source.
        assert target.read_text("/sys/class/net/v-net1/operstate").strip() == "up"
        assert not target.path("/sys/class/net/v-net1").joinpath("master").exists()
        lab.client.run(["ping", "-q", "-c1", "-W5", SPEC.ip])
    finally:
        inside(target, DESTROY, handle)
    assert interfaces_of(target) == before
    assert not target.path("/run/netns/net1").exists()


def sorted_parts(identity: dict[str, Any]) -> dict[str, Any]:
    """The kernel lists addresses of an interface by age, and nobody depends on the order."""
    interfaces = [
        one | {"addresses": sorted(one["addresses"], key=lambda address: str(address["network"]))}
        for one in identity["interfaces"]
    ]
    routes = sorted(identity["routes"], key=str)
    return identity | {"interfaces": interfaces, "routes": routes}


def test_ipv6_addresses_are_usable_without_probing_for_duplicates(
    source: Host, target: Host
) -> None:
    """A probe would take a second after the plug, and could find the source's."""
    script = f"""{RECREATE}
import subprocess
tentative = ["ip", "-n", "net1", "-6", "address", "show", "tentative"]
answer(subprocess.run(tentative, capture_output=True, check=True, text=True).stdout)
"""
    given = {"identity": capture(source)["identity"], "name": "net1"}
    assert inside(target, script, given) == ""
    inside(
        target,
        "from migrate import network\nnetwork.destroy(network.NetworkHandle("
        '"/run/netns/net1", (network.Port("eth0", "v-net1", "br0"),)))',
    )


def test_a_container_that_moves_is_reached_at_once(lab: Lab, source: Host, target: Host) -> None:
    """The client's switch and both bridges have learned the MAC on the source's side."""
    identity = capture(source)["identity"]
    handle = inside(target, RECREATE, {"identity": identity, "name": "net1"})
    try:
        lab.client.run(["ping", "-q", "-c1", "-W5", SPEC.ip])
        inside(source, 'from migrate import network\nnetwork.unplug("v-net1")')
        with pytest.raises(LabCommandError, match="100% packet loss"):
            lab.client.run(["ping", "-q", "-c1", "-W1", SPEC.ip])
        heard = "arp or (icmp6 and ip6[40] == 136)"
        with lab.client.popen(
            ["tcpdump", "-lnvv", f"ether src {SPEC.hardware_address} and ({heard})"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as listener:
            assert listener.stderr is not None
            for line in listener.stderr:
                if "listening on" in line:
                    break
            given = {"identity": identity, "handle": handle}
            # Two ARP frames for each IPv4 address, an advertisement for each IPv6 address.
            assert inside(target, PLUG_AND_ANNOUNCE, given) == 6 * len(REPEAT_DELAYS_S)
            for family in ("-4", "-6"):
                address = SPEC.ip if family == "-4" else str(SPEC.ip6)
                lab.client.run(["ping", family, "-q", "-c1", "-W5", address])
            lab.client.signal(listener, signal.SIGINT)
            text, _ = listener.communicate(timeout=20)
        # One may be lost, as any packet; a neighbour may have asked for more.
        most = len(REPEAT_DELAYS_S)
        for said in (
            *("Request who-has 10.77.0.61 ", "Request who-has 10.77.0.62 "),
            *("Reply 10.77.0.61 ", "Reply 10.77.0.62 "),
            *("tgt is fd77::61", "tgt is fe80::42:aff:fe4d:3d"),
        ):
            assert text.count(said) >= most - 1, f"{said}: {text}"
        assert text.count("icmp6 sum ok") >= 2 * (most - 1)
        assert "bad" not in text
        table = target.run(["bridge", "fdb", "show", "br", "br0"]).stdout
        assert f"{SPEC.hardware_address} dev v-net1" in table
    finally:
        inside(target, DESTROY, handle)


def test_a_source_that_is_plugged_in_again_is_as_before(lab: Lab, source: Host) -> None:
    before = capture(source)["identity"]
    script = """
from migrate import network
for _ in range(2):
    network.unplug("v-net1")
switch = network.PortSwitch("v-net1", "br0")
assert not switch.is_plugged()
for _ in range(2):
    switch.plug()
assert switch.is_plugged()
switch.unplug()
switch.unplug()
assert not switch.is_plugged()
switch.plug()
switch.close()
switch.close()
"""
    # The end of duplicate address detection would be heard, too.
    wait_until(
        "its addresses are its own",
        lambda: not source.run(["ip", "-n", "net1", "address", "show", "tentative"]).stdout,
    )
    with source.popen(
        ["ip", "-n", "net1", "monitor", "link", "address", "neigh"],
        stdout=subprocess.PIPE,
        text=True,
    ) as monitor:
        inside(source, script)
        # Whatever the container could hear of it comes before this.
        source.run(["ip", "-n", "net1", "address", "add", "127.0.0.8/32", "dev", "lo"])
        assert monitor.stdout is not None
        heard = monitor.stdout.readline()
        source.signal(monitor, signal.SIGINT)
    assert "127.0.0.8" in heard
    source.run(["ip", "-n", "net1", "address", "delete", "127.0.0.8/32", "dev", "lo"])
    for address in (SPEC.ip, str(SPEC.ip6)):
        lab.client.run(["ping", "-q", "-c1", "-W5", address])
    after = capture(source)["identity"]
    before["neighbours"] = after["neighbours"] = []
    assert after == before


def test_a_name_that_is_taken_is_refused_and_left_alone(source: Host) -> None:
    identity = capture(source)["identity"]
    with pytest.raises(LabCommandError, match="exists already"):
        inside(source, RECREATE, {"identity": identity, "name": "net1"})
    assert capture(source)["identity"]["ports"] == identity["ports"]


KEEP = """
import time
from migrate.held_frames import HeldFrames
from migrate.network_identity import NetworkIdentity
from migrate import network
identity = msgspec.convert(given, NetworkIdentity)
held = HeldFrames(identity)
network.unplug("v-net1")
held.begin()
print("begun", flush=True)
frames, end_s = [], time.monotonic() + 30
while not any(frame.data[10 + 12 : 10 + 14] == b"\\x08\\x00" for frame in frames):
    assert time.monotonic() < end_s
    time.sleep(0.005)
    frames += held.take()
held.close()
answer(frames)
"""
DELIVER = """
from migrate import held_frames, network
from migrate.network_identity import HeldFrame, NetworkIdentity
identity = msgspec.convert(given["identity"], NetworkIdentity)
frames = msgspec.convert(given["frames"], list[HeldFrame])
handle = msgspec.convert(given["handle"], network.NetworkHandle)
(port,) = handle.ports
network.plug(port.host_end, port.bridge)
wrong = [msgspec.structs.replace(frame, interface="eth1") for frame in frames]
strange = [HeldFrame("eth0", bytes(10) + b"\\x02" * 60)]
assert held_frames.deliver([*wrong, *strange], identity, handle.ports) == 0
answer(held_frames.deliver(frames, identity, handle.ports))
"""


def test_what_came_meanwhile_is_delivered_on_another_host(
    lab: Lab, source: Host, target: Host
) -> None:
    """One echo request, never repeated: it reaches the container where it is plugged next."""
    lab.client.run(["ping", "-q", "-c1", "-W5", SPEC.ip])
    identity = capture(source)["identity"]
    handle = inside(target, RECREATE, {"identity": identity, "name": "net1"})
    keeping = source.popen(
        ["python3", "-c", PRELUDE + KEEP, json.dumps(identity)],
        env=PYTHON_INSIDE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        with keeping as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            with lab.client.popen(
                ["ping", "-n", "-c1", "-W60", SPEC.ip], stdout=subprocess.PIPE, text=True
            ) as ping:
                frames = json.loads(process.stdout.readline())
                given = {"identity": identity, "handle": handle, "frames": frames}
                assert inside(target, DELIVER, given) == len(frames)
                said, _ = ping.communicate()
        assert "1 received" in said
    finally:
        inside(target, DESTROY, handle)


LAST = """
import socket
from migrate import netns, network
from migrate.held_frames import HeldFrames
from migrate.network_identity import NetworkIdentity
from pathlib import Path
identity = msgspec.convert(given["identity"], NetworkIdentity)
held = HeldFrames(identity)
def say(word):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as said:
        said.sendto(word, (given["client"], 7777))
def from_inside(word):
    netns.run_in(Path("/run/netns/net1"), lambda: say(word))
held.watch()
network.unplug("v-net1")
from_inside(b"last")
first = held.send_on()
from_inside(b"too late")
again = held.send_on()
held.close()
network.plug("v-net1", "br0")
from_inside(b"end")
answer([first, again])
"""
LISTEN = """
import socket
heard = []
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ears:
    ears.bind(("0.0.0.0", 7777))
    ears.settimeout(60)
    print("listening", flush=True)
    while not heard or heard[-1] != "end":
        heard.append(ears.recv(100).decode())
print(*heard)
"""


def test_the_last_that_a_container_sends_goes_on(lab: Lab, source: Host) -> None:
    """Until `send_on`, which is when its tasks stand still."""
    lab.client.run(["ping", "-q", "-c1", "-W5", SPEC.ip])
    given = {"identity": capture(source)["identity"], "client": lab.client.address}
    with lab.client.popen(
        ["python3", "-c", LISTEN], stdout=subprocess.PIPE, text=True
    ) as listening:
        assert listening.stdout is not None
        assert listening.stdout.readline() == "listening\n"
        first, again = inside(source, LAST, given)
        assert listening.stdout.readline() == "last end\n"
    assert first >= 1
    assert again == 0


def test_a_port_name_that_is_taken_is_replaced(source: Host) -> None:
    """Also the case of a clone: the same names twice on one host, the networks apart."""
    identity = capture(source)["identity"]
    handle = inside(source, RECREATE, {"identity": identity, "name": "net2"})
    try:
        assert handle["ports"][0]["host_end"].startswith("mig")
    finally:
        inside(source, DESTROY, handle)
    assert source.path("/sys/class/net/v-net1").exists()


def test_a_network_that_fails_half_way_leaves_nothing(source: Host, target: Host) -> None:
    identity = capture(source)["identity"]
    before = interfaces_of(target)
    nowhere = identity["routes"][0] | {"destination": "10.97.0.0/16", "gateway": "203.0.113.1"}
    identity["routes"].append(nowhere)
    with pytest.raises(LabCommandError, match="can't be made"):
        inside(target, RECREATE, {"identity": identity, "name": "net1"})
    assert interfaces_of(target) == before
    assert not target.path("/run/netns/net1").exists()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("ip -n net1 link add br7 type bridge", "network-kind"),
        ("ip link set v-net1 nomaster", "network-bridge"),
        ("ip -n net1 link add v7 type veth peer name v8", "network-peer"),
        ("ip -n net1 rule add from 10.0.0.0/8 table 100", "network-rules"),
        (
            "ip -n net1 route add 10.90.0.0/16 nexthop via 10.77.0.3 nexthop via 10.77.0.4",
            "network-route",
        ),
        ("ip -n net1 route add local 10.91.0.0/16 dev lo table 9", "network-route"),
        ("ip -n net1 address add 10.77.0.63 peer 10.77.0.64 dev eth0", "network-address"),
    ],
)
def test_what_cannot_move_is_refused(source: Host, script: str, code: str) -> None:
    source.run(["sh", "-ec", script])
    found = {refusal[0]: refusal for refusal in capture(source)["refusals"]}
    assert set(found) == {code}
    assert all(found[code])


def test_a_bridge_keeps_its_mac_when_ports_come_and_go(lab: Lab) -> None:
    """A bridge without a MAC of its own takes the lowest of its ports', ours for example."""
    host = lab.host("A")
    host.run(
        [
            *("sh", "-ec"),
            """
            ip link add br9 type bridge
            ip link add p1 type veth peer name q1
            ip link add p2 type veth peer name q2
            ip link set p1 address 02:00:00:00:00:11
            ip link set p2 address 02:00:00:00:00:12
            ip link set p2 master br9
            """,
        ]
    )
    script = """
from migrate import network
before = Path("/sys/class/net/br9/address").read_text()
network.plug("p1", "br9")
answer([before, Path("/sys/class/net/br9/address").read_text()])
"""
    try:
        before, after = inside(host, script)
        assert before.strip() == after.strip() == "02:00:00:00:00:12"
    finally:
        host.run(["sh", "-c", "ip link delete p1; ip link delete p2; ip link delete br9"])


def test_a_port_that_vanishes_is_unplugged_and_cannot_be_plugged(lab: Lab) -> None:
    host = lab.host("A")
    host.run(["ip", "link", "add", "p7", "type", "veth", "peer", "name", "q7"])
    script = """
import subprocess
from migrate import network
from migrate.network_identity import NetworkError
switch = network.PortSwitch("p7", "br0")
switch.plug()
subprocess.run(["ip", "link", "delete", "p7"], check=True)
switch.unplug()
network.unplug("p7")
try:
    switch.plug()
except NetworkError as error:
    answer(str(error))
"""
    assert "p7 can't be plugged into br0" in inside(host, script)


def test_work_in_a_namespace_that_is_removed_meanwhile(source: Host) -> None:
    """The namespace lives on while somebody is in it; its path does not."""
    script = """
from migrate import netns
path = netns.create("net3")
def work():
    netns.remove(path)
    return Path("/proc/thread-self/net/dev").read_text().count("lo:")
answer([netns.run_in(path, work), path.exists()])
"""
    assert inside(source, script) == [1, False]
    wait_until("the namespace is gone", lambda: "net3" not in source.run(["ip", "netns"]).stdout)
