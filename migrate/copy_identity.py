"""Who a copy of a container is: name, host name, addresses, MACs, cgroup. Pure but for the MACs.

A copy keeps what its programs can remember without it being theirs alone: names, numbers and MTU
of interfaces, prefixes, routes, neighbours. It gets addresses of its own, one for each that the
original has on a wire; one that it gets none for is left out. A link-local IPv6 address follows
from the MAC.
"""

from __future__ import annotations

import ipaddress
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET

from migrate.core.messages import CopyOf
from migrate.errors import UsageError
from migrate.network_identity import parse_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from ipaddress import IPv4Network, IPv6Network

    from migrate.core.messages import CopySignal
    from migrate.network_identity import (
        IP,
        Interface,
        InterfaceAddress,
        NetworkIdentity,
        Route,
    )


@dataclass(frozen=True, slots=True)
class CopyIdentity:
    """A copy in the eyes of its host and its network. renamed: (the original's address, its own),
    one of a pair each. hook, signal: how it learns that it is one; beside, number, fill: where its
    memory comes from (`core.messages.CopyOf`)."""

    name: str
    network: NetworkIdentity
    renamed: tuple[tuple[str, str], ...]
    hook: str = ""
    signal: CopySignal | None = None
    beside: str = ""
    number: int = 0
    fill: bool = True

    def of(self, original: str) -> CopyOf:
        """As a target is told it."""
        return CopyOf(
            original,
            self.renamed,
            self.hook or UNSET,
            self.signal or UNSET,
            self.beside or UNSET,
            self.number,
            self.fill,
        )

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its own."""
        return tuple(own for _, own in self.renamed)


def random_mac() -> str:
    """A locally administered address of one interface."""
    return ":".join(["02", *(f"{byte:02x}" for byte in secrets.token_bytes(5))])


def identity_of(
    original: NetworkIdentity,
    name: str,
    given: Sequence[IP],
    make_mac: Callable[[], str] = random_mac,
) -> CopyIdentity:
    """The copy `name` of a container that is `original` in its network. Raises UsageError when
    `given` are not the addresses that it takes."""
    renamed = dict(_match(original, given))
    macs = {
        one.name: one.mac and make_mac() for one in original.interfaces if one.kind != "loopback"
    }
    network = msgspec.structs.replace(
        original,
        hostname=name,
        interfaces=tuple(_interface(one, renamed, macs) for one in original.interfaces),
        routes=tuple(_route(one, renamed) for one in original.routes if _has(one.source, renamed)),
    )
    told = tuple((str(old), str(own)) for old, own in renamed.items())
    return CopyIdentity(name, network, told)


def left_out(original: NetworkIdentity, copies: Sequence[CopyIdentity]) -> list[str]:
    """Addresses of the original that its copies have none for; all of them have as many."""
    renamed = {old for old, _ in copies[0].renamed}
    return [str(one) for one in _addresses(original) if str(one) not in renamed]


def unusable(original: NetworkIdentity, candidates: Sequence[IP]) -> set[IP]:
    """Of these addresses, those that the container's network has already, as far as the container
    knows it."""
    wires = {old: _wire(original, old) for old in _addresses(original)}
    return {
        one
        for one in candidates
        for old, wire in wires.items()
        if one == old or (one in wire and not _is_free(original, wire, one))
    }


def config_of(text: str, name: str) -> str:
    """The original's config.json for the copy `name`: its host name, and a cgroup of that name
    beside the original's. Raises UsageError."""
    try:
        spec: dict[str, Any] = json.loads(text)
        if spec.get("hostname"):
            spec["hostname"] = name
        linux = spec.setdefault("linux", {})
        if path := str(linux.get("cgroupsPath") or ""):
            linux["cgroupsPath"] = _cgroup(path, name)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"the container's config.json can't be used: {error}") from error
    return json.dumps(spec)


def _cgroup(path: str, name: str) -> str:
    # systemd's way to say it: slice:prefix:name (runc: libcontainer/cgroups/systemd)
    if re.fullmatch(r"[^/]*:[^/]*:[^/]*", path):
        return ":".join([*path.split(":")[:2], name])
    return str(PurePosixPath(path).with_name(name))


def _addresses(original: NetworkIdentity) -> list[IP]:
    """What others know the container by."""
    found = [
        parse_address(address.network)[0]
        for interface in original.interfaces
        if interface.kind == "veth"
        for address in interface.addresses
    ]
    return [address for address in found if not address.is_link_local]


def _match(original: NetworkIdentity, given: Sequence[IP]) -> Iterator[tuple[IP, IP]]:
    """Which address of the original each given one stands for: of each family it may have one."""
    for version in (4, 6):
        old = [address for address in _addresses(original) if address.version == version]
        own = [address for address in given if address.version == version]
        if len(old) > 1:
            raise UsageError(
                f"the container has {len(old)} IPv{version} addresses:"
                f" {', '.join(map(str, old))}; a copy can be given one",
                remedy="copies of such containers are not made",
            )
        if len(own) > len(old):
            raise UsageError(f"the container has no IPv{version} address that {own[-1]} stands for")
        if own and own[0] == old[0]:
            raise UsageError(f"{own[0]} is the container's own address", remedy="give a free one")
        if own:
            _check_free(original, old[0], own[0])
        yield from zip(old, own, strict=False)
    if _addresses(original) and not given:
        raise UsageError(
            "a copy needs an address of its own", remedy="give --ip ADDRESS, a free one"
        )


def _check_free(original: NetworkIdentity, old: IP, own: IP) -> None:
    """Raises UsageError for an address that can't be free in the original's network."""
    wire = _wire(original, old)
    if own not in wire or not _is_free(original, wire, own):
        raise UsageError(
            f"{own} is no free address of the container's network {wire}",
            remedy="give one that nobody has",
        )


def _wire(original: NetworkIdentity, old: IP) -> IPv4Network | IPv6Network:
    """The network that this address of the original is in."""
    (wire,) = (
        ipaddress.ip_interface(address.network).network
        for interface in original.interfaces
        for address in interface.addresses
        if parse_address(address.network)[0] == old
    )
    return wire


def _is_free(original: NetworkIdentity, wire: IPv4Network | IPv6Network, address: IP) -> bool:
    """Whether nothing says that an address in `wire` is somebody's."""
    known = {one.gateway for one in original.routes} | {one.address for one in original.neighbours}
    is_special = wire.num_addresses > 2 and address in (wire[0], wire[-1])
    return not is_special and str(address) not in known


def _interface(
    interface: Interface, renamed: dict[IP, IP], macs: dict[str, str | None]
) -> Interface:
    if interface.kind == "loopback":
        return interface
    mac = macs[interface.name]
    addresses = [_address(one, renamed, mac) for one in interface.addresses]
    kept = tuple(one for one in addresses if one is not None)
    return msgspec.structs.replace(interface, mac=mac, addresses=kept)


def _address(
    address: InterfaceAddress, renamed: dict[IP, IP], mac: str | None
) -> InterfaceAddress | None:
    ip, prefix_len = parse_address(address.network)
    own = renamed.get(ip)
    if ip.is_link_local and ip.version == 6 and mac is not None:
        own = _link_local(mac)
    if own is None:
        return None
    return msgspec.structs.replace(
        address, network=f"{own}/{prefix_len}", broadcast=_broadcast(address, own, prefix_len)
    )


def _broadcast(address: InterfaceAddress, own: IP, prefix_len: int) -> str | None:
    if address.broadcast is None:
        return None
    return str(ipaddress.ip_interface(f"{own}/{prefix_len}").network.broadcast_address)


def _link_local(mac: str) -> IP:
    """By EUI-64: RFC 4291, appendix A."""
    first, *rest = (int(byte, 16) for byte in mac.split(":"))
    suffix = bytes((first ^ 2, *rest[:2], 0xFF, 0xFE, *rest[2:]))
    return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + suffix)


def _has(source: str | None, renamed: dict[IP, IP]) -> bool:
    """Whether the copy can have a route with this source."""
    return source is None or ipaddress.ip_address(source) in renamed


def _route(route: Route, renamed: dict[IP, IP]) -> Route:
    if route.source is None:
        return route
    return msgspec.structs.replace(route, source=str(renamed[ipaddress.ip_address(route.source)]))
