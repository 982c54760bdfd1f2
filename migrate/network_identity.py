"""What of a container's network moves with it, as plain data, and what of it a target accepts.

Pure: no netlink, no files. An identity comes over the wire from another host (it is a part of
`core.messages.OpenSession`): its types bound every name, number and count as it is decoded, and
`validate` parses its addresses and compares its parts before any of it reaches the kernel.

Addresses are text ("10.0.0.2", "2001:db8::/64"), numbers are those of rtnetlink(7).
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from migrate.errors import MigrateError

IP: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address

# Each is several times what a container ever had, and keeps the work for a hostile peer bounded.
INTERFACES_MAX = 32
ADDRESSES_MAX = 256
ROUTES_MAX = 1024
NEIGHBOURS_MAX = 256
SYSCTLS_MAX = 512
FRAMES_MAX = 1024
FRAME_HEADER_BYTES = 10
FRAME_BYTES_MAX = FRAME_HEADER_BYTES + 14 + 65535

# linux/if.h: 15 bytes, not "." or ".." (`dev_valid_name`); no leading dash, which is an option.
_INTERFACE_NAME = r"\A[a-zA-Z0-9_][a-zA-Z0-9_.@-]{0,14}\Z"

InterfaceName: TypeAlias = Annotated[str, Meta(pattern=_INTERFACE_NAME)]
Mac: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")]
IpText: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-fA-F:.]{2,45}\Z")]
NetworkText: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9a-fA-F:.]{2,45}/[0-9]{1,3}\Z")]
DestinationText: TypeAlias = Annotated[
    str, Meta(pattern=r"\A(default|[0-9a-fA-F:.]{2,45}/[0-9]{1,3})\Z")
]
SysctlKey: TypeAlias = Annotated[
    str, Meta(pattern=r"\Anet(/[A-Za-z0-9_@-][A-Za-z0-9_.@-]{0,63}){2,6}\Z")
]
SysctlValue: TypeAlias = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_ \t.,:-]{0,256}\Z")]
U8: TypeAlias = Annotated[int, Meta(ge=0, le=255)]
U32: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]

Kind: TypeAlias = Literal["loopback", "veth", "dummy"]
RouteKind: TypeAlias = Literal["unicast", "blackhole", "unreachable", "prohibit"]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of what an identity contains."""


class InterfaceAddress(Part, frozen=True):
    """One address with its prefix. flags: only the IFA_F_* that matter after a move."""

    network: NetworkText
    broadcast: IpText | None = None
    scope: U8 = 0
    flags: U32 = 0


class Interface(Part, frozen=True):
    """One interface inside the namespace. index: programs may remember it; 0 is any."""

    name: InterfaceName
    kind: Kind
    mac: Mac | None
    mtu: Annotated[int, Meta(ge=68, le=65536)]
    up: bool
    addresses: Annotated[tuple[InterfaceAddress, ...], Meta(max_length=ADDRESSES_MAX)]
    index: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] = 0


class Route(Part, frozen=True):
    """One route that the kernel does not make by itself. mtu: 0 when none is given."""

    family: Literal["inet", "inet6"]
    destination: DestinationText
    gateway: IpText | None
    device: InterfaceName | None
    source: IpText | None = None
    metric: U32 = 0
    scope: U8 = 0
    table: U32 = 254
    protocol: U8 = 3
    onlink: bool = False
    kind: RouteKind = "unicast"
    mtu: Annotated[int, Meta(ge=0, le=65536)] = 0


class Neighbour(Part, frozen=True):
    """One entry of the ARP or NDP table; unless it is NUD_PERMANENT it is only a hint."""

    device: InterfaceName
    address: IpText
    mac: Mac
    state: Annotated[int, Meta(ge=0, le=0xFFFF)]


class Port(Part, frozen=True):
    """The host's end of an interface of the container, and the bridge that it is plugged into."""

    interface: InterfaceName
    host_end: InterfaceName
    bridge: InterfaceName | None


class HeldFrame(Part, frozen=True, array_like=True):
    """A frame that has come for a container and waits for it. interface: the container's.

    data: the kernel's header (`struct virtio_net_hdr`, 10 bytes), which says what of segments and
    checksums is left to be done, then the Ethernet frame, of up to 64 KiB of joined segments.
    """

    interface: InterfaceName
    data: Annotated[bytes, Meta(min_length=FRAME_HEADER_BYTES + 14, max_length=FRAME_BYTES_MAX)]


class NetworkIdentity(Part, frozen=True):
    """What a container is in the eyes of its network.

    sysctls: path below /proc/sys ("net/core/somaxconn") to value, of the container's namespace.
    """

    hostname: Annotated[str, Meta(max_length=128)]
    interfaces: Annotated[tuple[Interface, ...], Meta(max_length=INTERFACES_MAX)]
    routes: Annotated[tuple[Route, ...], Meta(max_length=ROUTES_MAX)]
    neighbours: Annotated[tuple[Neighbour, ...], Meta(max_length=NEIGHBOURS_MAX)]
    ports: Annotated[tuple[Port, ...], Meta(max_length=INTERFACES_MAX)]
    sysctls: Annotated[dict[SysctlKey, SysctlValue], Meta(max_length=SYSCTLS_MAX)] = {}


class NetworkError(MigrateError):
    """A container's network could not be read, made, plugged or removed."""


class InvalidIdentityError(NetworkError):
    """A network identity that came from a peer is not one."""


def validate(identity: NetworkIdentity) -> NetworkIdentity:
    """`identity`, if every part of it can be one; raises InvalidIdentityError."""
    names = [interface.name for interface in identity.interfaces]
    indices = [interface.index for interface in identity.interfaces if interface.index]
    if len(set(names)) != len(names) or len(set(indices)) != len(indices):
        raise InvalidIdentityError("two interfaces have the same name or index")
    for interface in identity.interfaces:
        _check_interface(interface)
    for route in identity.routes:
        _check_route(route, names)
    for neighbour in identity.neighbours:
        _known(neighbour.device, names)
        parse_ip(neighbour.address)
    veths = [interface.name for interface in identity.interfaces if interface.kind == "veth"]
    if sorted(port.interface for port in identity.ports) != sorted(veths):
        raise InvalidIdentityError("the ports are not those of the interfaces")
    return identity


def is_interface_name(name: str) -> bool:
    """Whether `name` may be an interface's, and is harmless in a path and a command line."""
    return re.match(_INTERFACE_NAME, name) is not None


def parse_ip(text: str) -> IP:
    """The address; raises InvalidIdentityError."""
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidIdentityError(f"{text!r} is not an IP address") from error


def parse_address(text: str) -> tuple[IP, int]:
    """ "10.0.0.5/24" as address and prefix length; raises InvalidIdentityError."""
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError as error:
        raise InvalidIdentityError(f"{text!r} is not an address with its prefix") from error
    return interface.ip, interface.network.prefixlen


def _check_interface(interface: Interface) -> None:
    if (interface.name == "lo") != (interface.kind == "loopback"):
        raise InvalidIdentityError(f"{interface.name} can't be of the kind {interface.kind}")
    for address in interface.addresses:
        ip, _ = parse_address(address.network)
        if address.broadcast is not None:
            _same_family(parse_ip(address.broadcast), ip.version)


def _check_route(route: Route, names: list[str]) -> None:
    version = 4 if route.family == "inet" else 6
    if route.destination != "default":
        try:
            found = ipaddress.ip_network(route.destination).version
        except ValueError as error:
            raise InvalidIdentityError(f"{route.destination!r} is no destination") from error
        if found != version:
            raise InvalidIdentityError(f"{route.destination} is not of the family {route.family}")
    for other in (route.gateway, route.source):
        if other is not None:
            _same_family(parse_ip(other), version)
    if route.device is not None:
        _known(route.device, names)
    elif route.kind == "unicast":
        raise InvalidIdentityError(f"the route to {route.destination} has no interface")


def _same_family(ip: IP, version: int) -> None:
    if ip.version != version:
        raise InvalidIdentityError(f"{ip} is not of the family of what it belongs to")


def _known(name: str, names: list[str]) -> None:
    if name not in names:
        raise InvalidIdentityError(f"{name!r} is not one of the interfaces")
