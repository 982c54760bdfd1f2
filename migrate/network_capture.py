"""Read the network identity of a container from its namespace.

Everything is read by netlink inside the namespace; the other ends of its veth pairs are looked up
in the namespace of the calling process, which has to be the host's. What can't move is not left
out: it becomes a refusal.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from migrate.netfilter import has_firewall
from migrate.netns import OWN_NETNS, inode, run_in
from migrate.network_identity import (
    Interface,
    InterfaceAddress,
    Kind,
    Neighbour,
    NetworkError,
    NetworkIdentity,
    Port,
    Route,
    RouteKind,
)
from migrate.network_sysctls import read_sysctls
from migrate.refusals import Refusal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_IFF_UP = 1
_IFF_LOOPBACK = 8
# Made by the kernel in every new namespace when their module is loaded (`net.core.
# fb_tunnels_only_for_init_net`); down, they carry nothing.
_FALLBACK_KINDS = {"ipip", "gre", "gretap", "erspan", "vti", "vti6", "sit", "ip6tnl", "ip6gre"}
_IPV4, _IPV6 = 2, 10
# linux/if_addr.h. NODAD is set on the target in any case; TENTATIVE and PERMANENT are the kernel's.
_IFA_DADFAILED = 0x08
_IFA_KEPT = 0x10 | 0x200 | 0x400  # HOMEADDRESS, NOPREFIXROUTE, MCAUTOJOIN
_PROTOCOL_KERNEL = 2
_TABLE_LOCAL = 255
_RTM_F_CLONED = 0x200
_RTNH_F_ONLINK = 4
_ROUTE_KINDS: dict[int, RouteKind] = {
    1: "unicast",
    6: "blackhole",
    7: "unreachable",
    8: "prohibit",
}
_ROUTE_UNSUPPORTED = ("RTA_MULTIPATH", "RTA_VIA", "RTA_ENCAP", "RTA_ENCAP_TYPE", "RTA_NH_ID")
_NUD_PERMANENT = 0x80
# REACHABLE, STALE, DELAY, PROBE: the entry has a MAC that was right a moment ago.
_NUD_KNOWN = 0x02 | 0x04 | 0x08 | 0x10
_NEIGHBOUR_HINTS_MAX = 64


@dataclass(frozen=True, slots=True)
class Capture:
    """An identity, and what is in the namespace that it does not hold."""

    identity: NetworkIdentity
    refusals: tuple[Refusal, ...]


@dataclass(frozen=True, slots=True)
class _Raw:
    """The kernel's answers, as pyroute2 parses them."""

    links: Sequence[Any]
    addresses: Sequence[Any]
    routes: Sequence[Any]
    neighbours: Sequence[Any]
    rules: Sequence[Any]
    sysctls: dict[str, str]
    has_firewall: bool


def capture(netns: Path, *, hostname: str = "", sysctls: Iterable[str] = ()) -> Capture:
    """The identity of the namespace at `netns`. Blocking, about 10 ms.

    `hostname` and `sysctls` (further keys, "net.core.somaxconn") are config.json's. Raises
    NetworkError when the namespace can't be read or is the host's own.
    """
    try:
        if inode(netns) == inode(OWN_NETNS):
            raise NetworkError(
                f"{netns} is the host's own network",
                remedy="give the container a network namespace of its own, by path, in config.json",
            )
        keys = [key.replace(".", "/") for key in sysctls if key.startswith("net.")]
        raw = run_in(netns, lambda: _read(keys))
        host_ends = _host_ends(netns)
    except (OSError, NetlinkError) as error:
        raise NetworkError(f"the network namespace {netns} can't be read: {error}") from error
    return _interpret(raw, host_ends, hostname)


def _read(keys: Iterable[str]) -> _Raw:
    with IPRoute() as netlink:
        links = list(netlink.get_links())
        names = [link.get_attr("IFLA_IFNAME") for link in links if not _is_idle_fallback(link)]
        both = (_IPV4, _IPV6)
        return _Raw(
            links=links,
            addresses=list(netlink.get_addr()),
            routes=[route for family in both for route in netlink.get_routes(family=family)],
            neighbours=[one for family in both for one in netlink.get_neighbours(family=family)],
            rules=[rule for family in both for rule in netlink.get_rules(family=family)],
            sysctls=read_sysctls(keys, names),
            has_firewall=has_firewall(),
        )


def _host_ends(netns: Path) -> dict[int, tuple[str, str | None]]:
    """Index inside `netns` of each veth with an end on this host: (its name here, its bridge)."""
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with IPRoute() as netlink:
            links = {link["index"]: link for link in netlink.get_links()}
            # Asked second: a namespace gets its number when the first link into it is listed
            # (`net/core/rtnetlink.c: rtnl_fill_link_netnsid`).
            number = netlink.get_netnsid(fd=fd)["nsid"]
    finally:
        os.close(fd)
    ends: dict[int, tuple[str, str | None]] = {}
    for link in links.values():
        if _kind(link) != "veth" or link.get_attr("IFLA_LINK_NETNSID") != number:
            continue
        master = links.get(link.get_attr("IFLA_MASTER") or 0)
        bridge = None
        if master is not None and _kind(master) == "bridge":
            bridge = master.get_attr("IFLA_IFNAME")
        ends[link.get_attr("IFLA_LINK")] = (link.get_attr("IFLA_IFNAME"), bridge)
    return ends


def _interpret(raw: _Raw, host_ends: dict[int, tuple[str, str | None]], hostname: str) -> Capture:
    refusals: list[Refusal] = []
    interfaces = []
    ports = []
    for link in raw.links:
        if _is_idle_fallback(link):
            continue
        kind = _known_kind(link)
        if kind is None:
            refusals.append(_foreign(link))
            continue
        interfaces.append(_interface(link, kind, raw.addresses, refusals))
        if kind == "veth":
            ports += _port(link, host_ends.get(link["index"]), refusals)
    names = {interface.index: interface.name for interface in interfaces}
    routes = [route for one in raw.routes if (route := _route(one, names, refusals)) is not None]
    _refuse_rules(raw.rules, refusals)
    if raw.has_firewall:
        refusals.append(
            Refusal(
                code="network-firewall",
                message="the container's network has firewall rules (nft, iptables) of its own",
                remedy="put them on the host's side of its port: they do not move",
            )
        )
    identity = NetworkIdentity(
        hostname=hostname,
        interfaces=tuple(sorted(interfaces, key=lambda interface: interface.index)),
        routes=tuple(routes),
        neighbours=tuple(_neighbours(raw.neighbours, names)),
        ports=tuple(ports),
        sysctls=raw.sysctls,
    )
    return Capture(identity, tuple(refusals))


def _interface(
    link: Any, kind: Kind, addresses: Iterable[Any], refusals: list[Refusal]
) -> Interface:
    name = link.get_attr("IFLA_IFNAME")
    return Interface(
        name=name,
        kind=kind,
        mac=link.get_attr("IFLA_ADDRESS"),
        mtu=link.get_attr("IFLA_MTU"),
        up=bool(link["flags"] & _IFF_UP),
        addresses=tuple(_addresses(addresses, link["index"], name, refusals)),
        index=link["index"],
    )


def _foreign(link: Any) -> Refusal:
    name = link.get_attr("IFLA_IFNAME")
    return Refusal(
        code="network-kind",
        message=f"interface {name} of the container is of the kind {_kind(link) or 'physical'}",
        remedy="only veth pairs into a bridge can move: give the container one instead",
    )


def _port(
    link: Any, host_end: tuple[str, str | None] | None, refusals: list[Refusal]
) -> list[Port]:
    name = link.get_attr("IFLA_IFNAME")
    if host_end is None:
        refusals.append(
            Refusal(
                code="network-peer",
                message=f"the other end of the container's {name} is not on this host's network",
                remedy="put the other end into the host's namespace and plug it into a bridge",
            )
        )
        return []
    port, bridge = host_end
    if bridge is None:
        refusals.append(
            Refusal(
                code="network-bridge",
                message=f"port {port} of the container's {name} is in no bridge",
                remedy=f"plug it into a bridge of this host: ip link set {port} master BRIDGE",
            )
        )
    return [Port(interface=name, host_end=port, bridge=bridge)]


def _addresses(
    messages: Iterable[Any], index: int, name: str, refusals: list[Refusal]
) -> Iterable[InterfaceAddress]:
    for message in messages:
        flags = message.get_attr("IFA_FLAGS") or 0
        is_ours = message["index"] == index and message["family"] in (_IPV4, _IPV6)
        if not is_ours or flags & _IFA_DADFAILED:
            continue
        # IFA_ADDRESS is the peer's on a point-to-point link, IFA_LOCAL always ours (if_addr.h).
        other = message.get_attr("IFA_ADDRESS")
        own = message.get_attr("IFA_LOCAL") or other
        if own != other:
            refusals.append(
                Refusal(
                    code="network-address",
                    message=f"address {own} of the container's {name} is point-to-point",
                    remedy="give it an address with a prefix instead of a peer",
                )
            )
        yield InterfaceAddress(
            network=f"{own}/{message['prefixlen']}",
            broadcast=message.get_attr("IFA_BROADCAST"),
            scope=message["scope"],
            flags=flags & _IFA_KEPT,
        )


def _route(message: Any, names: dict[int, str], refusals: list[Refusal]) -> Route | None:
    table = message.get_attr("RTA_TABLE") or message["table"]
    is_kernels = message["proto"] == _PROTOCOL_KERNEL or table == _TABLE_LOCAL
    if is_kernels or message["flags"] & _RTM_F_CLONED:
        return None
    given = message.get_attr("RTA_DST")
    destination = "default" if given is None else f"{given}/{message['dst_len']}"
    kind = _ROUTE_KINDS.get(message["type"])
    name = names.get(message.get_attr("RTA_OIF") or 0)
    strange = [name for name in _ROUTE_UNSUPPORTED if message.get_attr(name) is not None]
    if kind is None or strange or (kind == "unicast" and name is None):
        refusals.append(
            Refusal(
                code="network-route",
                message=f"the container's route to {destination} is of a kind that can't be moved",
                remedy="use a route with one gateway on one of the container's interfaces",
            )
        )
        return None
    metrics = message.get_attr("RTA_METRICS")
    return Route(
        family="inet" if message["family"] == _IPV4 else "inet6",
        destination=destination,
        gateway=message.get_attr("RTA_GATEWAY"),
        device=name if kind == "unicast" else None,
        source=message.get_attr("RTA_PREFSRC"),
        metric=message.get_attr("RTA_PRIORITY") or 0,
        scope=message["scope"],
        table=table,
        protocol=message["proto"],
        onlink=bool(message["flags"] & _RTNH_F_ONLINK),
        kind=kind,
        mtu=(metrics.get_attr("RTAX_MTU") or 0) if metrics is not None else 0,
    )


def _refuse_rules(rules: Iterable[Any], refusals: list[Refusal]) -> None:
    if any(rule.get_attr("FRA_PROTOCOL") != _PROTOCOL_KERNEL for rule in rules):
        refusals.append(
            Refusal(
                code="network-rules",
                message="the container's network has policy routing rules, which do not move",
                remedy="remove them (ip rule), or use plain routes",
            )
        )


def _neighbours(messages: Iterable[Any], names: dict[int, str]) -> list[Neighbour]:
    kept: list[Neighbour] = []
    hints: list[Neighbour] = []
    for message in messages:
        name, mac = names.get(message["ifindex"]), message.get_attr("NDA_LLADDR")
        if name is None or mac is None:
            continue
        entry = Neighbour(name, message.get_attr("NDA_DST"), mac, message["state"])
        if message["state"] == _NUD_PERMANENT:
            kept.append(entry)
        elif message["state"] & _NUD_KNOWN:
            hints.append(entry)
    return kept + hints[:_NEIGHBOUR_HINTS_MAX]


def _kind(link: Any) -> str | None:
    info = link.get_attr("IFLA_LINKINFO")
    return None if info is None else info.get_attr("IFLA_INFO_KIND")


def _known_kind(link: Any) -> Kind | None:
    if link["flags"] & _IFF_LOOPBACK:
        return "loopback"
    kind = _kind(link)
    if kind == "veth":
        return "veth"
    return "dummy" if kind == "dummy" else None


def _is_idle_fallback(link: Any) -> bool:
    return _kind(link) in _FALLBACK_KINDS and not link["flags"] & _IFF_UP
