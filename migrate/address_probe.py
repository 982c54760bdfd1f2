"""Whether somebody has an address already: the network that a copy comes to is asked before.

A probe says nothing of who asks, so that nobody learns a wrong MAC from it. It leaves through the
bridge that the copy will be plugged into, as this host's own frames do:

    IPv4   ARP request, sender 0.0.0.0 (RFC 5227)        answer: any ARP packet from that address
    IPv6   solicitation from :: (RFC 4862, section 5.4)  answer: an advert of that address

Somebody else who probes the same address at that moment wants it too, and counts as an answer. What
is silent, as a host that is switched off, can't be found so; neither can what another network than
the bridge's own VLAN has. Blocking.
"""

from __future__ import annotations

import contextlib
import ipaddress
import select
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from migrate import packet_filter
from migrate.announce import (
    ARP_REQUEST,
    NEIGHBOUR_ADVERT,
    NEIGHBOUR_SOLICIT,
    arp_frame,
    icmpv6_frame,
    mac_bytes,
)
from migrate.network_identity import parse_address
from migrate.packet_filter import JUMP_IF_EQUAL, LOAD_BYTE, LOAD_HALF, RETURN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from migrate.network_identity import IP, NetworkIdentity

# RFC 5227 asks three times within three seconds, for hosts behind switches that just woke up. The
# ones that are meant here run, and answer from their kernels.
_PROBES: Final = 3
_PERIOD_S: Final = 0.2
_ETH_P_ALL: Final = 0x0003
_ETHERNET: Final = 14
_ARP_HEAD: Final = bytes((0, 1, 8, 0, 6, 4))
_ICMPV6_AT: Final = _ETHERNET + 40
_NOBODY4: Final = bytes(4)
_NOBODY6: Final = bytes(16)
# Nothing longer is an answer.
_FRAME_BYTES: Final = 256
# ARP and neighbour discovery; all else that goes through a bridge would fill the socket.
_FILTER: Final = (
    (LOAD_HALF, 0, 0, 12),
    (JUMP_IF_EQUAL, 6, 0, 0x0806),
    (JUMP_IF_EQUAL, 0, 6, 0x86DD),
    (LOAD_BYTE, 0, 0, 20),
    (JUMP_IF_EQUAL, 0, 4, socket.IPPROTO_ICMPV6),
    (LOAD_BYTE, 0, 0, _ICMPV6_AT),
    (JUMP_IF_EQUAL, 1, 0, NEIGHBOUR_SOLICIT),
    (JUMP_IF_EQUAL, 0, 1, NEIGHBOUR_ADVERT),
    (RETURN, 0, 0, _FRAME_BYTES),
    (RETURN, 0, 0, 0),
)


def taken(identity: NetworkIdentity) -> dict[IP, str]:
    """Which of a copy's addresses somebody has where it will be plugged in: address to MAC. Takes
    0.6 s. Raises OSError for a bridge that can't be asked through, NetworkError for what is no
    address."""
    return _asked(_by_bridge(identity))


def taken_beside(identity: NetworkIdentity, candidates: Sequence[IP]) -> dict[IP, str]:
    """Which of these addresses somebody has who is in a network of that container's: as `taken`."""
    bridges = {port.bridge for port in identity.ports if port.bridge is not None}
    return _asked({bridge: {one.packed: one for one in candidates} for bridge in bridges})


def _asked(by_bridge: Mapping[str, Mapping[bytes, IP]]) -> dict[IP, str]:
    with contextlib.ExitStack() as stack:
        asked = [
            stack.enter_context(_Bridge(bridge, addresses))
            for bridge, addresses in by_bridge.items()
        ]
        for _ in range(_PROBES):
            for one in asked:
                one.send()
            _listen(asked, time.monotonic() + _PERIOD_S)
        return {address: mac for one in asked for address, mac in one.found.items()}


def probe_frame(own: bytes, address: IP) -> bytes:
    """The question whether somebody has `address`, from the MAC `own`."""
    packed = address.packed
    if address.version == 4:
        return arp_frame(own, ARP_REQUEST, _NOBODY4, bytes(6), packed)
    # The solicited-node address, and its MAC (RFC 4291, section 2.7.1; RFC 2464, section 7).
    node = ipaddress.IPv6Address("ff02::1:ff00:0").packed[:13] + packed[13:]
    ethernet = b"\x33\x33" + node[12:]
    return icmpv6_frame(own, ethernet, _NOBODY6, node, NEIGHBOUR_SOLICIT, bytes(4) + packed)


def claimed_by(frame: bytes, own: bytes) -> tuple[bytes, bytes] | None:
    """(address, MAC) of who says by this frame that an address is, or is to be, theirs; None for
    any other frame, and for those of the MAC `own`."""
    sender = frame[6:12]
    if len(frame) < _ETHERNET + 28 or sender == own:
        return None
    kind = frame[12:14]
    if kind == b"\x08\x06" and frame[14:20] == _ARP_HEAD:
        mac, source, target = frame[22:28], frame[28:32], frame[38:42]
        is_probe = source == _NOBODY4 and frame[20:22] == ARP_REQUEST.to_bytes(2, "big")
        return (target if is_probe else source, mac) if mac != own else None
    if kind == b"\x86\xdd" and frame[20] == socket.IPPROTO_ICMPV6 and frame[21] == 255:
        target = frame[_ICMPV6_AT + 8 : _ICMPV6_AT + 24]
        says = frame[_ICMPV6_AT : _ICMPV6_AT + 1]
        is_probe = says == bytes((NEIGHBOUR_SOLICIT,)) and frame[22:38] == _NOBODY6
        if len(target) == len(_NOBODY6) and (is_probe or says == bytes((NEIGHBOUR_ADVERT,))):
            return target, sender
    return None


class _Bridge:
    """What is asked through one bridge. found: who has said that an address is theirs."""

    def __init__(self, name: str, addresses: Mapping[bytes, IP]) -> None:
        self.found: dict[IP, str] = {}
        self._addresses = addresses
        self._own = mac_bytes(Path("/sys/class/net", name, "address").read_text().strip())
        self._packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            packet_filter.attach(self._packets, _FILTER)
            self._packets.bind((name, _ETH_P_ALL))
            self._packets.setblocking(False)
        except OSError:
            self._packets.close()
            raise

    def __enter__(self) -> _Bridge:
        return self

    def __exit__(self, *_: object) -> None:
        self._packets.close()

    def fileno(self) -> int:
        """For select."""
        return self._packets.fileno()

    def send(self) -> None:
        """Ask for all that nobody has answered for."""
        for address in self._addresses.values():
            if address not in self.found:
                # A queue that is full now: there are further probes.
                with contextlib.suppress(BlockingIOError):
                    self._packets.send(probe_frame(self._own, address))

    def read(self) -> None:
        """Take one frame."""
        claim = claimed_by(self._packets.recv(_FRAME_BYTES), self._own)
        if claim is not None and claim[0] in self._addresses:
            self.found[self._addresses[claim[0]]] = claim[1].hex(":")


def _listen(asked: list[_Bridge], end_s: float) -> None:
    while (left_s := end_s - time.monotonic()) > 0:
        ready, _, _ = select.select(asked, [], [], left_s)
        for one in ready:
            one.read()


def _by_bridge(identity: NetworkIdentity) -> dict[str, dict[bytes, IP]]:
    interfaces = {interface.name: interface for interface in identity.interfaces}
    found: dict[str, dict[bytes, IP]] = {}
    for port in identity.ports:
        if port.bridge is None or port.interface not in interfaces:
            continue
        addresses = [parse_address(one.network)[0] for one in interfaces[port.interface].addresses]
        found.setdefault(port.bridge, {}).update((one.packed, one) for one in addresses)
    return found
