"""The network of a container: made on the target, plugged, and removed.

    plan      which names it will have on this host; nothing is made        (before anything)
    recreate  namespace, interfaces, addresses, routes; ports in no bridge  (any time)
    hint      neighbours that the container knew                            (before it runs)
    plug      port up and into the bridge, the container is reachable       (CRIU's unlock)
    destroy   ports and namespace                                           (undo, release)

A namespace that a user namespace owns is made by CRIU in the restore, and empty. What `recreate`
has made is moved into it (`hand_over`); its name goes when nobody needs it any more (`forget`).

Nothing here knows CRIU or a session. Calls block for some milliseconds, plug and unplug for 0.1 ms.
pyroute2 must not be called from a thread that runs an event loop: use a worker thread.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from migrate import netns as namespaces
from migrate.network_capture import Capture, capture
from migrate.network_identity import NetworkError, Port, parse_address, validate
from migrate.network_sysctls import write_sysctls
from migrate.port import PortSwitch, index_of, plug, unplug

if TYPE_CHECKING:
    from collections.abc import Mapping

    from migrate.network_identity import Interface, Neighbour, NetworkIdentity, Route

__all__ = [
    "Capture",
    "NetworkHandle",
    "PortSwitch",
    "capture",
    "destroy",
    "forget",
    "free_port_name",
    "hint_neighbours",
    "plan",
    "plug",
    "recreate",
    "unplug",
]

_PROC_SYS = Path("/proc/sys")
_IPV4, _IPV6 = 2, 10
_EVERYTHING = {"inet": "0.0.0.0/0", "inet6": "::/0"}
# The address is used at once: probing for a duplicate would take a second after the plug, and find
# the source's if it came too early.
_IFA_F_NODAD = 0x02
_RTNH_F_ONLINK = 4
_NUD_PERMANENT = 0x80
_NUD_STALE = 0x04
# Until it is plugged, a port is an interface of the host: it answers no ARP there, has no IPv6.
_MUTE = {"net/ipv4/conf/{}/arp_ignore": "8", "net/ipv6/conf/{}/disable_ipv6": "1"}
# IN6_ADDR_GEN_MODE_NONE: no link-local address but those of the identity.
_ADDR_GEN_NONE = "1"


class NetworkHandle(msgspec.Struct, frozen=True):
    """What `recreate` makes: enough to plug it, and to remove it after a crash."""

    netns: str
    ports: tuple[Port, ...]


def plan(
    identity: NetworkIdentity, name: str, bridges: Mapping[str, str] | None = None
) -> NetworkHandle:
    """What `recreate` would make: the namespace /run/netns/NAME and the ports of `identity`.

    `bridges` maps an interface to the bridge on this host, where it differs from the source's.
    Raises NetworkError, also where there is such a namespace. `identity` may come from a peer.
    """
    validate(identity)
    path = namespaces.path_of(name)
    if path.exists():
        raise NetworkError(f"the network namespace {path} exists already")
    return NetworkHandle(str(path), _plan_ports(identity, bridges or {}))


def recreate(identity: NetworkIdentity, handle: NetworkHandle) -> None:
    """Make the namespace as `identity` says, with every port of `handle` in no bridge.

    Raises NetworkError, after everything made was removed again.
    """
    validate(identity)
    plugs = handle.ports
    name = Path(handle.netns).name
    path = namespaces.create(name)
    own = os.open(namespaces.OWN_NETNS, os.O_RDONLY | os.O_CLOEXEC)
    try:
        namespaces.run_in(path, lambda: _create_links(identity, plugs, own))
        for port in plugs:
            _raise_port(port.host_end)
        namespaces.run_in(path, lambda: _configure(identity))
    except (OSError, NetlinkError, NetworkError) as error:
        destroy(handle)
        raise NetworkError(f"the network of {name} can't be made: {error}") from error
    finally:
        os.close(own)


def hand_over(identity: NetworkIdentity, handle: NetworkHandle, task: int) -> None:
    """Move what `recreate` has made into the namespace of a task, by its pid, which is to be empty;
    the name stands for that one then. Raises NetworkError; `destroy` removes what there is."""
    path, of_task = Path(handle.netns), Path(f"/proc/{task}/ns/net")
    try:
        if namespaces.inode(of_task) == namespaces.inode(namespaces.OWN_NETNS):
            raise NetworkError(f"what is restored as {path.name} is in the host's own network")
        target = os.open(of_task, os.O_RDONLY | os.O_CLOEXEC)
        try:
            namespaces.run_in(path, lambda: _move_links(identity, target))
        finally:
            os.close(target)
        namespaces.remove(path)
        namespaces.create(path.name, of_task)
        namespaces.run_in(path, lambda: _set_up(identity))
    except (OSError, NetlinkError, NetworkError) as error:
        raise NetworkError(f"the network of {path.name} can't be handed over: {error}") from error


def hint_neighbours(netns: Path, identity: NetworkIdentity) -> None:
    """Tell the namespace the MACs that the container knew, so that its first answer needs no ARP.

    An ARP request that is lost is repeated only after a second. Not part of `recreate`, because
    such entries age, and the kernel forgets them when it notices, some time after it was made, that
    a link had no carrier. Entries that can't be made are left out: they are hints.
    """

    def work() -> None:
        with IPRoute() as netlink:
            indices = _indices(netlink)
            for entry in identity.neighbours:
                if entry.state != _NUD_PERMANENT and entry.device in indices:
                    with contextlib.suppress(NetlinkError):
                        _add_neighbour(netlink, entry, indices[entry.device], _NUD_STALE)

    validate(identity)
    try:
        namespaces.run_in(netns, work)
    except (OSError, NetlinkError) as error:
        raise NetworkError(f"no neighbour can be added in {netns}: {error}") from error


def destroy(handle: NetworkHandle) -> None:
    """Remove the ports and the namespace. Idempotent; raises NetworkError."""
    for port in handle.ports:
        _delete_port(port.host_end)
    netns = Path(handle.netns)
    # By a task it has no name, and ends with its tasks.
    if not netns.is_relative_to("/proc"):
        namespaces.remove(netns)


def forget(handle: NetworkHandle) -> None:
    """Take the namespace's name away. It goes on for as long as it has tasks. Idempotent."""
    namespaces.remove(Path(handle.netns))


def free_port_name(wanted: str | None) -> str:
    """`wanted`, if no interface of this host has that name, or else a new one."""
    for name in (wanted, f"mig{secrets.token_hex(5)}"):
        if name is not None and not Path("/sys/class/net", name).exists():
            return name
    raise NetworkError("this host has no free interface name")


def _plan_ports(identity: NetworkIdentity, bridges: Mapping[str, str]) -> tuple[Port, ...]:
    plugs = []
    for port in identity.ports:
        bridge = bridges.get(port.interface, port.bridge)
        if bridge is None:
            raise NetworkError(f"no bridge is given for the container's {port.interface}")
        index_of(bridge)
        plugs.append(Port(port.interface, free_port_name(port.host_end), bridge))
    return tuple(plugs)


def _create_links(identity: NetworkIdentity, plugs: tuple[Port, ...], host_netns: int) -> None:
    """Inside the new namespace."""
    host_ends = {port.interface: port.host_end for port in plugs}
    with IPRoute() as netlink:
        for interface in sorted(identity.interfaces, key=lambda one: one.index):
            _create(netlink, interface, host_ends.get(interface.name), host_netns)
    # Before any link is up: some change what the kernel does when it comes up.
    write_sysctls(identity.sysctls)


def _move_links(identity: NetworkIdentity, target: int) -> None:
    """Inside the namespace that they leave. They keep name, number, MAC and MTU."""
    with IPRoute() as netlink:
        indices = _indices(netlink)
        for interface in identity.interfaces:
            if interface.kind == "loopback":
                continue
            if interface.name not in indices:
                raise NetworkError(f"its {interface.name} has been removed")
            netlink.link("set", index=indices[interface.name], net_ns_fd=target)


def _set_up(identity: NetworkIdentity) -> None:
    """Inside the namespace that they have come to."""
    write_sysctls(identity.sysctls)
    _configure(identity)


def _raise_port(name: str) -> None:
    """Bring a host end up, in no bridge, as an interface on which this host itself is mute."""
    for key, value in _MUTE.items():
        path = _PROC_SYS / key.format(name)
        if path.exists():
            path.write_text(value)
    with IPRoute() as netlink:
        netlink.link("set", index=index_of(name), state="up")


def _configure(identity: NetworkIdentity) -> None:
    """Inside the new namespace."""
    with IPRoute() as netlink:
        for interface in identity.interfaces:
            _bring_up(netlink, interface)
        indices = _indices(netlink)
        for route in sorted(identity.routes, key=_reachable_first):
            _add_route(netlink, route, indices)
        for entry in identity.neighbours:
            if entry.state == _NUD_PERMANENT:
                _add_neighbour(netlink, entry, indices[entry.device], _NUD_PERMANENT)
    # Once more: `addr_gen_mode` was held back while the links came up.
    write_sysctls(identity.sysctls)


def _create(netlink: Any, interface: Interface, host_end: str | None, host_netns: int) -> None:
    if interface.kind == "loopback":
        return
    link: dict[str, Any] = {"ifname": interface.name, "mtu": interface.mtu}
    if interface.mac is not None:
        link["address"] = interface.mac
    if interface.index:
        link["index"] = interface.index
    if interface.kind == "veth":
        link["peer"] = {"ifname": host_end, "mtu": interface.mtu, "net_ns_fd": host_netns}
        if interface.mac is not None:
            # A high MAC, as libvirt gives to its taps: a bridge without a MAC of its own takes the
            # lowest of its ports.
            prefix = "fa" if interface.mac.startswith("fe") else "fe"
            link["peer"]["address"] = prefix + interface.mac[2:]
    netlink.link("add", kind=interface.kind, **link)


def _bring_up(netlink: Any, interface: Interface) -> None:
    index = netlink.link_lookup(ifname=interface.name)[0]
    mode = _PROC_SYS / f"net/ipv6/conf/{interface.name}/addr_gen_mode"
    if mode.exists():
        mode.write_text(_ADDR_GEN_NONE)
    if interface.up:
        netlink.link("set", index=index, state="up")
    for address in interface.addresses:
        ip, prefix_len = parse_address(address.network)
        # The kernel has put 127.0.0.1 and ::1 on the loopback itself.
        verb = "replace" if interface.kind == "loopback" else "add"
        broadcast = {} if address.broadcast is None else {"broadcast": address.broadcast}
        netlink.addr(
            verb,
            index=index,
            family=_IPV6 if ip.version == 6 else _IPV4,
            address=str(ip),
            prefixlen=prefix_len,
            scope=address.scope,
            flags=address.flags | (_IFA_F_NODAD if ip.version == 6 else 0),
            **broadcast,
        )


def _reachable_first(route: Route) -> tuple[bool, int]:
    # A gateway must be reachable when its route is added, by a route that may be in this list.
    prefix = route.destination.rpartition("/")[2]
    return route.gateway is not None, -int(prefix) if prefix.isdecimal() else 0


def _add_route(netlink: Any, route: Route, indices: Mapping[str, int]) -> None:
    is_ipv6 = route.family == "inet6"
    given: dict[str, Any] = {
        "oif": None if route.device is None else indices[route.device],
        "gateway": route.gateway,
        "prefsrc": route.source,
        "priority": route.metric or None,
        "metrics": {"mtu": route.mtu} if route.mtu else None,
    }
    netlink.route(
        "add",
        family=_IPV6 if is_ipv6 else _IPV4,
        dst=_EVERYTHING[route.family] if route.destination == "default" else route.destination,
        type=route.kind,
        table=route.table,
        proto=route.protocol,
        scope=0 if is_ipv6 else route.scope,
        flags=_RTNH_F_ONLINK if route.onlink else 0,
        **{key: value for key, value in given.items() if value is not None},
    )


def _add_neighbour(netlink: Any, entry: Neighbour, index: int, state: int) -> None:
    netlink.neigh(
        "replace",
        family=_IPV6 if ":" in entry.address else _IPV4,
        dst=entry.address,
        lladdr=entry.mac,
        ifindex=index,
        state=state,
    )


def _indices(netlink: Any) -> dict[str, int]:
    return {link.get_attr("IFLA_IFNAME"): link["index"] for link in netlink.get_links()}


def _delete_port(name: str) -> None:
    try:
        with IPRoute() as netlink:
            for index in netlink.link_lookup(ifname=name):
                netlink.link("del", index=index)
    except NetlinkError as error:
        # It went away meanwhile, with its namespace.
        if error.code != errno.ENODEV:
            raise NetworkError(f"port {name} can't be removed: {error}") from error
