"""The lab on paper: names, addresses, and the lines for `ip` and `tc`. Pure: touches nothing.

                     wire (network namespace of the keeper)
                   +----------------- br0 -----------------+
                   |               |                       |
                 wire0           wire1                   wire2
      -------------|---------------|-----------------------|--------- links (veth)
                 uplink          uplink                  uplink
                   |               |                       |
                  br0             br0                10.77.S.1  client
           10.77.S.101  A   10.77.S.102  B

A host carries its address on its own br0, into which the ports of containers are plugged too; the
client has no bridge. Containers take addresses 10.77.S.2 to .100, as they like.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.lab.errors import LabError

CLIENT = "client"
# One address byte for the hosts, from 101 up, and nothing above 254.
HOSTS_MAX = 150
# A name becomes a host name, a directory and a cgroup.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9-]{0,40}")
RATE = re.compile(r"[1-9][0-9]*([kmg])?bit")
RATE_UNITS = {None: 1, "k": 10**3, "m": 10**6, "g": 10**9}
# A token bucket that is filled by a timer: what one tick of the coarsest usual timer (250 Hz)
# brings in, and never less than a GSO packet, which it would otherwise have to split.
BURST_TICK_S = 1 / 250
BURST_BYTES_MIN = 65536
# How long a packet may wait in a rate-limited link before it is dropped: a common router's queue.
RATE_QUEUE_MS = 50


@dataclass(frozen=True, slots=True)
class Node:
    """A host, or the client: `index` numbers its link."""

    name: str
    index: int
    address: str
    address6: str
    mac: str

    @property
    def is_client(self) -> bool:
        return self.name == CLIENT

    @property
    def device(self) -> str:
        """The device that carries the address."""
        return "uplink" if self.is_client else "br0"

    @property
    def wire_end(self) -> str:
        return f"wire{self.index}"

    @property
    def slow_end(self) -> str:
        """Stands in the bridge for the wire's end when a line lies between the two."""
        return f"slow{self.index}"

    @property
    def line_end(self) -> str:
        """The line's side of `slow_end`."""
        return f"line{self.index}"

    @property
    def management(self) -> str:
        """The lab's end of the link over which a virtual machine takes commands."""
        return f"manage{self.index}"

    def port(self, *, has_line: bool) -> str:
        """The node's port of the wire's bridge."""
        return self.slow_end if has_line else self.wire_end


@dataclass(frozen=True, slots=True)
class LabPlan:
    """`rate_bits` per second and link of a host, both ways; `delay_ms` on what a host sends."""

    name: str
    nodes: tuple[Node, ...]
    rate_bits: int | None = None
    delay_ms: float = 0.0

    @property
    def hosts(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if not node.is_client)


@dataclass(frozen=True, slots=True)
class Orders:
    """What a lab is asked for; travels to its keeper as JSON."""

    name: str
    hosts: Sequence[str]
    subnet: int
    rate: str | None
    delay_ms: float
    source: str
    machines: bool  # hosts are virtual machines (bench/vm); the client never is
    compared: bool  # hosts have the systems that bench compares with
    owner_pid: int | None  # the lab ends with this process; None: it stays until `lab down`


def check_name(what: str, name: str) -> str:
    if not NAME.fullmatch(name):
        raise LabError(f"{what} {name!r}: use up to 41 letters, digits and hyphens")
    return name


def parse_rate(text: str) -> int:
    """Bits per second of `100mbit`, `1gbit`, …"""
    match = RATE.fullmatch(text.lower())
    if match is None:
        raise LabError(f"rate {text!r}: use for example 100mbit or 1gbit")
    unit = match.group(1)
    return int(match.group(0).removesuffix("bit").rstrip("kmg")) * RATE_UNITS[unit]


def make_plan(
    name: str,
    hosts: Sequence[str],
    *,
    subnet: int = 0,
    rate: str | None = None,
    delay_ms: float = 0.0,
) -> LabPlan:
    """Gives every host and the client their addresses; `subnet` is the third byte (0 to 255)."""
    check_name("lab", name)
    if not 1 <= len(hosts) <= HOSTS_MAX:
        raise LabError(f"a lab has 1 to {HOSTS_MAX} hosts, not {len(hosts)}")
    if not 0 <= subnet <= 255:
        raise LabError(f"subnet {subnet}: 0 to 255")
    lowered = [check_name("host", host).lower() for host in hosts]
    if len({*lowered, CLIENT}) != len(lowered) + 1:
        raise LabError("host names must differ (host names know no case) and not be 'client'")
    nodes = [
        Node(
            name=host,
            index=index,
            address=f"10.77.{subnet}.{101 + index}",
            address6=_address6(f"fd77::{subnet:x}:{101 + index}"),
            mac=f"02:77:00:{subnet:02x}:01:{index:02x}",
        )
        for index, host in enumerate(hosts)
    ]
    client = Node(
        name=CLIENT,
        index=len(hosts),
        address=f"10.77.{subnet}.1",
        address6=_address6(f"fd77::{subnet:x}:1"),
        mac=f"02:77:00:{subnet:02x}:00:01",
    )
    return LabPlan(name, (*nodes, client), parse_rate(rate) if rate else None, delay_ms)


def _address6(text: str) -> str:
    """In the one spelling that programs compare (RFC 5952)."""
    return str(ipaddress.IPv6Address(text))


def hosts_file(plan: LabPlan) -> str:
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    for node in plan.nodes:
        lines += [f"{node.address} {node.name}", f"{node.address6} {node.name}"]
    return "\n".join(lines) + "\n"


# For `ip -batch` in the wire. No snooping: a bridge without a querier would otherwise learn groups
# and hold back the neighbour discovery of IPv6. The wire has no addresses of its own.
WIRE_LINES = (
    "link set lo up",
    "link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0",
    "link set br0 addrgenmode none up",
)


def veth_line(node: Node, pid: int) -> str:
    """For `ip -batch` in the wire: a link into the network namespace of `pid`."""
    return f"link add {node.wire_end} type veth peer name uplink netns {pid}"


def link_lines(node: Node, *, has_line: bool) -> list[str]:
    """For `ip -batch` in the wire: joins the bridge and a node's link, which exists."""
    end = node.wire_end
    if has_line:
        return [f"link set {end} addrgenmode none up", *_line_lines(node)]
    return [f"link set {end} addrgenmode none master br0 up"]


def insert_line_lines(node: Node) -> list[str]:
    """For `ip -batch` in the wire: makes room for a line in a link that has none."""
    return [f"link set {node.wire_end} nomaster", *_line_lines(node)]


def _line_lines(node: Node) -> list[str]:
    return [
        f"link add {node.slow_end} type veth peer name {node.line_end}",
        f"link set {node.line_end} addrgenmode none up",
        f"link set {node.slow_end} addrgenmode none master br0 up",
    ]


def node_lines(node: Node) -> list[str]:
    """For `ip -batch` inside a node.

    The bridge has a fixed MAC: it would otherwise take the lowest of its ports', and change it,
    under its neighbours' feet, when a container is plugged in.
    """
    lines = ["link set lo up"]
    if node.is_client:
        lines += [f"link set uplink address {node.mac} up"]
    else:
        lines += [
            "link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0",
            f"link set br0 address {node.mac} up",
            "link set uplink addrgenmode none master br0 up",
        ]
    return [
        *lines,
        f"address add {node.address}/24 dev {node.device}",
        f"address add {node.address6}/112 dev {node.device} nodad",
    ]


def rate_line(device: str, rate_bits: int) -> str:
    """For `tc -batch`: a token bucket on what leaves the device."""
    burst_bytes = max(BURST_BYTES_MIN, int(rate_bits / 8 * BURST_TICK_S))
    return (
        f"qdisc replace dev {device} root tbf rate {rate_bits}bit "
        f"burst {burst_bytes} latency {RATE_QUEUE_MS}ms"
    )
