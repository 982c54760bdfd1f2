"""Frames for a container that stands still: kept where it stood, delivered where it runs again. And
the last ones of its own, which go on.

An unplugged port drops what comes, and a client sends again only when its timer expires, which
doubles each time (RFC 6298): back after 300 ms, a container may wait as long again for its client's
next try. So the source listens on the bridge of the unplugged port (packet(7)) and keeps what was
for the container; the target puts it into the container's own interface when that is plugged, and a
source that takes its container back puts it there itself.

    kept       unicast to the container's MAC, and what asks for its addresses: ARP requests, IPv6
               neighbour solicitations (RFC 4861: to 33:33:ff and the address's last 3 bytes)
    not kept   what has a VLAN tag, what the container has sent itself, and what is more than
               FRAMES_MAX or BYTES_MAX: it is dropped, as all of it was before

The frames are as packet sockets with PACKET_VNET_HDR give and take them (`HeldFrame`). One that was
kept may have come to the target by another way as well; a network may double frames at any time.

Between the unplugging and the last task's standstill the container answers what it has still got.
Nobody would send these answers again soon: a restored connection does not know its round trip time,
so its kernel waits a second (RFC 6298, 2.1), and a client that waits for each answer as long. So
what leaves the container in these moments is kept as well, and put into the bridge.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from migrate import packet_filter
from migrate.announce import mac_bytes
from migrate.errors import remedy_of
from migrate.network_identity import (
    FRAME_BYTES_MAX,
    FRAME_HEADER_BYTES,
    FRAMES_MAX,
    HeldFrame,
    NetworkError,
    parse_address,
)
from migrate.packet_filter import JUMP_IF_EQUAL, LOAD_BYTE, LOAD_HALF, LOAD_WORD, RETURN, Program

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from migrate.network_identity import Interface, NetworkIdentity, Port

BYTES_MAX = 1 << 20
"""Of one container, together; as base64 they fit one message of the control channel."""

_SYS_NET = Path("/sys/class/net")
_ETH_P_ALL = 0x0003
_SENDS_ONLY = 0
_ETH_P_ARP = 0x0806
_PACKET_OUTGOING = 4
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_SO_RCVBUFFORCE = 33
# The kernel counts its own buffers, which are about twice what is in them, and 2 KiB at least.
_QUEUE_BYTES = 4 << 20
_IS_MULTICAST = 0x01

_IS_TAGGED = 0xFFFFF000 + 48  # SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT
_WHOLE = 0x40000
_NOTHING: Program = [(RETURN, 0, 0, 0)]
_ALL: Program = [(RETURN, 0, 0, _WHOLE)]


class HeldFrames:
    """What comes for a container from `begin` on, and what leaves it between `watch` and `send_on`.
    For whoever is in its host's own network."""

    def __init__(self, network: NetworkIdentity) -> None:
        """Keeps nothing yet. Raises NetworkError."""
        self._network = network
        self._heard: list[tuple[Port, socket.socket]] = []
        self._leaving: list[socket.socket] = []
        self._onward: list[socket.socket] = []
        self._programs: list[Program] = []
        self._taken: tuple[HeldFrame, ...] = ()
        try:
            for port, interface in _plugged(network, network.ports):
                packets = _packet_socket(_ETH_P_ALL)
                self._heard.append((port, packets))
                self._programs.append(program(interface))
                packets.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE_BYTES)
                packets.setblocking(False)
                packet_filter.attach(packets, _NOTHING)
                for _ in _entered(packets, str(port.bridge)):
                    pass  # it came before the filter
                leaving = _packet_socket(_SENDS_ONLY)
                self._leaving.append(leaving)
                leaving.setblocking(False)
                packet_filter.attach(leaving, _NOTHING)
                leaving.bind((port.host_end, _ETH_P_ALL))
                onward = _packet_socket(_SENDS_ONLY)
                self._onward.append(onward)
                onward.bind((str(port.bridge), 0))
        except OSError as error:
            self.close()
            raise NetworkError(
                f"nothing can be kept for the container: {error}", remedy=remedy_of(error)
            ) from error

    def watch(self) -> None:
        """Keep what the container sends from now on: before it is unplugged, so that nothing is
        missed. Some microseconds. Raises NetworkError."""
        try:
            for leaving in self._leaving:
                packet_filter.attach(leaving, _ALL)
        except OSError as error:
            raise NetworkError(f"the container's last frames are not kept: {error}") from error

    def send_on(self) -> int:
        """Put what the container has sent since `watch` where it was to go, FRAMES_MAX at most; how
        many frames were taken. Those that still got through are doubled."""
        sent = 0
        for leaving, onward in zip(self._leaving, self._onward, strict=True):
            with contextlib.suppress(OSError):
                packet_filter.attach(leaving, _NOTHING)
                for data in itertools.islice(_left(leaving), FRAMES_MAX):
                    with contextlib.suppress(OSError):
                        onward.send(data)
                        sent += 1
        return sent

    def begin(self) -> None:
        """Keep what comes from now on. Some microseconds. Raises NetworkError."""
        try:
            for (_, packets), wanted in zip(self._heard, self._programs, strict=True):
                packet_filter.attach(packets, wanted)
        except OSError as error:
            raise NetworkError(f"nothing is kept for the container: {error}") from error

    def take(self) -> tuple[HeldFrame, ...]:
        """What has come since the last call, each port's in its order; of all calls together
        FRAMES_MAX and BYTES_MAX at most."""
        kept: list[HeldFrame] = []
        frames_max = FRAMES_MAX - len(self._taken)
        room = BYTES_MAX - sum(len(frame.data) for frame in self._taken)
        for port, packets in self._heard:
            for data in _entered(packets, str(port.bridge)):
                room -= len(data)
                if room < 0 or len(kept) == frames_max:
                    break
                kept.append(HeldFrame(port.interface, data))
        self._taken += tuple(kept)
        return tuple(kept)

    def give_back(self) -> int:
        """Put all that has come into the container here, for which it may have been taken already;
        how many frames that were."""
        self.take()
        return deliver(self._taken, self._network, self._network.ports)

    def close(self) -> None:
        """Idempotent. May take milliseconds: the kernel waits until nobody looks at a socket."""
        for packets in (*(one for _, one in self._heard), *self._leaving, *self._onward):
            packets.close()


def deliver(frames: Sequence[HeldFrame], network: NetworkIdentity, ports: Sequence[Port]) -> int:
    """Put frames into a container by the host's ends of its interfaces; how many were taken.

    Blocking, not long. They may come from a peer: what is not for that interface is left out.
    """
    delivered = 0
    for port, interface in _plugged(network, ports):
        own = mac_bytes(str(interface.mac))
        with contextlib.suppress(OSError), _packet_socket(_SENDS_ONLY) as into:
            into.bind((port.host_end, 0))
            for frame in frames:
                to = frame.data[FRAME_HEADER_BYTES : FRAME_HEADER_BYTES + 6]
                if frame.interface == port.interface and (to == own or to[0] & _IS_MULTICAST):
                    # EINVAL: a header that the kernel does not understand.
                    with contextlib.suppress(OSError):
                        into.send(frame.data)
                        delivered += 1
    return delivered


def _plugged(network: NetworkIdentity, ports: Sequence[Port]) -> Iterator[tuple[Port, Interface]]:
    by_name = {interface.name: interface for interface in network.interfaces}
    for port in ports:
        interface = by_name[port.interface]
        if interface.mac is not None:
            yield port, interface


def _packet_socket(protocol: int) -> socket.socket:
    """Raises OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    packets = socket.socket(socket.AF_PACKET, kind, socket.htons(protocol))
    packets.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    return packets


def _entered(packets: socket.socket, bridge: str) -> Iterator[bytes]:
    """Header and frame of all that has come into a bridge.

    A frame passes several interfaces, and counts where it enters the bridge: at a port, or, where
    this host has sent it, at the bridge's own interface.
    """
    try:
        ports = {port.name for port in (_SYS_NET / bridge / "brif").iterdir()}
    except OSError:
        return  # it was removed meanwhile
    for data, name, is_sent in _received(packets):
        if name == bridge if is_sent else name in ports:
            yield data


def _left(packets: socket.socket) -> Iterator[bytes]:
    """Header and frame of all that has come out of a container by its port."""
    return (data for data, _, is_sent in _received(packets) if not is_sent)


def _received(packets: socket.socket) -> Iterator[tuple[bytes, str, bool]]:
    """Each that is whole: header and frame, the interface, whether that has sent it."""
    while True:
        try:
            data, _, flags, (name, _, kind, *_) = packets.recvmsg(FRAME_BYTES_MAX)
        except OSError:
            return  # EAGAIN: that was all. ENETDOWN: an interface of this host went down.
        if not flags & socket.MSG_TRUNC:
            yield data, name, kind == _PACKET_OUTGOING


def program(interface: Interface) -> Program:
    """The filter. Every test returns by itself, so that no jump is longer than its test."""
    own = mac_bytes(str(interface.mac))
    tests: list[Program] = [
        [(LOAD_BYTE, 0, 0, _IS_TAGGED), (JUMP_IF_EQUAL, 1, 0, 0), (RETURN, 0, 0, 0)],
        _mac_at(6, own, 0),
        _mac_at(0, own, _WHOLE),
    ]
    for address in interface.addresses:
        ip, _ = parse_address(address.network)
        if ip.version == 4:
            tests.append(_asks_for(int(ip)))
        else:
            tests.append(_mac_at(0, b"\x33\x33\xff" + ip.packed[-3:], _WHOLE))
    return [*(one for test in tests for one in test), (RETURN, 0, 0, 0)]


def _mac_at(offset: int, mac: bytes, verdict: int) -> Program:
    high, low = struct.unpack("!IH", mac)
    return [
        (LOAD_WORD, 0, 0, offset),
        (JUMP_IF_EQUAL, 0, 3, high),
        (LOAD_HALF, 0, 0, offset + 4),
        (JUMP_IF_EQUAL, 0, 1, low),
        (RETURN, 0, 0, verdict),
    ]


def _asks_for(ip: int) -> Program:
    """An ARP packet whose target address is `ip`."""
    return [
        (LOAD_HALF, 0, 0, 12),
        (JUMP_IF_EQUAL, 0, 3, _ETH_P_ARP),
        (LOAD_WORD, 0, 0, 38),
        (JUMP_IF_EQUAL, 0, 1, ip),
        (RETURN, 0, 0, _WHOLE),
    ]
