"""Tell the network where the container is now: gratuitous ARP and unsolicited neighbour adverts.

Every bridge and switch on the way learns the MAC's new port from them, and every neighbour that
cached another MAC for the address forgets it. The frames leave through the container's own
interface, so the host's bridge learns as well. They are built and their sockets opened before the
freeze; sending them is a few system calls.

    ARP (RFC 826, RFC 5227)           NA (RFC 4861, section 4.4), in IPv6, hop limit 255
    +--------------------------+      +--------------------------------------+
    | Ethernet: broadcast, MAC |      | Ethernet: 33:33:00:00:00:01, MAC     |
    | 1, 0x800, 6, 4, request  |      | address -> ff02::1                   |
    | MAC, IP                  |      | 136, 0, checksum, O=1                |
    | 0 (reply: MAC), same IP  |      | address, option 2: MAC               |
    +--------------------------+      +--------------------------------------+
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from typing import TYPE_CHECKING

from migrate.netns import run_in
from migrate.network_identity import NetworkError, parse_address

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from migrate.network_identity import Interface, NetworkIdentity

# At once, because a client waits; again soon, in case the first was lost; and late, for switches
# that were busy. RFC 5227 repeats an announcement as well.
REPEAT_DELAYS_S = (0.0, 0.01, 0.5)

_ETH_BROADCAST = b"\xff" * 6
# ff02::1, "all nodes", as a multicast MAC (RFC 2464, section 7).
_ETH_ALL_NODES = b"\x33\x33\x00\x00\x00\x01"
_ALL_NODES = ipaddress.IPv6Address("ff02::1").packed
_ETH_P_ARP = 0x0806
_ETH_P_IPV6 = 0x86DD
ARP_REQUEST = 1
_ARP_REPLY = 2
_ICMPV6 = 58
NEIGHBOUR_SOLICIT = 135
NEIGHBOUR_ADVERT = 136
# "Override": take this MAC even if you know another (RFC 4861). Not "Solicited", not "Router".
_NA_OVERRIDE = 0x2000_0000
_OPTION_TARGET_MAC = 2
# Neighbour discovery must be dropped below 255: it proves that no router was on the way.
_HOP_LIMIT = 255


def arp_frames(mac: str, ip: str) -> tuple[bytes, bytes]:
    """The announcement as a request and as a reply: hosts differ in which of them they believe."""
    own = mac_bytes(mac)
    address = ipaddress.IPv4Address(ip).packed
    return (
        arp_frame(own, ARP_REQUEST, address, bytes(6), address),
        arp_frame(own, _ARP_REPLY, address, own, address),
    )


def arp_frame(own: bytes, operation: int, sender: bytes, mac: bytes, target: bytes) -> bytes:
    """ARP to everybody: that `own` is the MAC of the address `sender`, about `target` and `mac`."""
    ethernet = struct.pack("!6s6sH", _ETH_BROADCAST, own, _ETH_P_ARP)
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
    return ethernet + head + own + sender + mac + target


def advert_frame(mac: str, ip: str) -> bytes:
    """An unsolicited neighbour advertisement of the IPv6 address `ip`."""
    own = mac_bytes(mac)
    address = ipaddress.IPv6Address(ip).packed
    option = struct.pack("!BB6s", _OPTION_TARGET_MAC, 1, own)
    body = struct.pack("!I16s", _NA_OVERRIDE, address) + option
    return icmpv6_frame(own, _ETH_ALL_NODES, address, _ALL_NODES, NEIGHBOUR_ADVERT, body)


def icmpv6_frame(
    own: bytes, ethernet: bytes, source: bytes, destination: bytes, kind: int, body: bytes
) -> bytes:
    """A message of neighbour discovery from the MAC `own` to the MAC `ethernet`."""
    unchecked = struct.pack("!BBH", kind, 0, 0) + body
    pseudo = source + destination + struct.pack("!IHBB", len(unchecked), 0, 0, _ICMPV6)
    checksum = internet_checksum(pseudo + unchecked)
    message = struct.pack("!BBH", kind, 0, checksum) + body
    head = struct.pack("!IHBB", 6 << 28, len(message), _ICMPV6, _HOP_LIMIT)
    link = struct.pack("!6s6sH", ethernet, own, _ETH_P_IPV6)
    return link + head + source + destination + message


def internet_checksum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071), 0..0xffff."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - total


def mac_bytes(mac: str) -> bytes:
    """The six bytes of "02:00:00:00:00:10"."""
    return bytes.fromhex(mac.replace(":", ""))


def frames_of(interface: Interface) -> list[bytes]:
    """Every announcement of one interface, for each of its addresses."""
    frames: list[bytes] = []
    if interface.mac is None:
        return frames
    for address in interface.addresses:
        ip, _ = parse_address(address.network)
        if ip.version == 4:
            frames += arp_frames(interface.mac, str(ip))
        else:
            frames.append(advert_frame(interface.mac, str(ip)))
    return frames


class Announcer:
    """The frames of one container and the sockets to send them; open it before the freeze."""

    def __init__(self, netns: Path, identity: NetworkIdentity) -> None:
        """Opens a socket per plugged interface inside `netns`. Blocking; raises NetworkError."""
        self._ports: list[tuple[socket.socket, list[bytes]]] = []

        def open_sockets() -> None:
            for interface in identity.interfaces:
                if interface.kind != "veth":
                    continue
                # Protocol 0: it only sends, and the kernel queues nothing for it to read.
                packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
                self._ports.append((packets, frames_of(interface)))
                packets.bind((interface.name, 0))
                packets.setblocking(False)

        try:
            run_in(netns, open_sockets)
        except OSError as error:
            self.close()
            raise NetworkError(f"no announcement can be sent from {netns}: {error}") from error

    def send(self) -> int:
        """Send every frame once, without blocking; the number of those that the kernel took.

        An unplugged interface takes and drops them.
        """
        sent = 0
        for packets, frames in self._ports:
            for frame in frames:
                try:
                    packets.send(frame)
                    sent += 1
                except OSError:
                    # ENOBUFS, ENETDOWN: the next repetition is near.
                    continue
        return sent

    async def announce(self, delays_s: Sequence[float] = REPEAT_DELAYS_S) -> int:
        """Send after each of the delays (seconds from now, rising); all frames that were taken."""
        sent = 0
        past_s = 0.0
        for delay_s in delays_s:
            await asyncio.sleep(max(0.0, delay_s - past_s))
            past_s = delay_s
            sent += self.send()
        return sent

    def close(self) -> None:
        """Close the sockets. Idempotent."""
        for packets, _ in self._ports:
            packets.close()
        self._ports = []
