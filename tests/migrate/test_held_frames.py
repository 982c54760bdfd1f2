"""What the filter of kept frames takes, by the kernel itself. Whole frames are in lab/."""

from __future__ import annotations

import socket
import struct

import pytest

from migrate import held_frames, packet_filter
from migrate.announce import advert_frame, arp_frames, mac_bytes
from migrate.network_identity import HeldFrame
from tests.migrate.test_network import ETH0, IDENTITY

OWN = mac_bytes(str(ETH0.mac))
OTHER = mac_bytes("02:42:0a:4d:00:33")
EVERYBODY = b"\xff" * 6


def ethernet(to: bytes, sender: bytes = OTHER, kind: int = 0x0800) -> bytes:
    return to + sender + struct.pack("!H", kind) + bytes(46)


def asking(ip: str, sender: str = "02:42:0a:4d:00:33") -> bytes:
    """An ARP request; what `arp_frames` makes asks for the address that it announces."""
    return arp_frames(sender, ip)[0]


@pytest.fixture
def filtered() -> tuple[socket.socket, socket.socket]:
    """What is written into the first comes out of the second if the filter wants it."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    packet_filter.attach(ends[1], held_frames.program(ETH0))
    ends[1].setblocking(False)
    return ends


@pytest.mark.parametrize(
    ("frame", "is_kept"),
    [
        (ethernet(OWN), True),
        (ethernet(OWN, kind=0x86DD), True),
        (asking("10.77.0.50"), True),
        (ethernet(b"\x33\x33\xff\x00\x00\x50", kind=0x86DD), True),
        (ethernet(OTHER), False),
        (ethernet(EVERYBODY), False),
        (asking("10.77.0.51"), False),
        (ethernet(b"\x33\x33\xff\x00\x00\x51", kind=0x86DD), False),
        (ethernet(b"\x33\x33\x00\x00\x00\x01", kind=0x86DD), False),
        (ethernet(OWN, sender=OWN), False),
        (asking("10.77.0.50", str(ETH0.mac)), False),
        (advert_frame(str(ETH0.mac), "fd77::50"), False),
        (OWN, False),
    ],
)
def test_what_is_kept(
    filtered: tuple[socket.socket, socket.socket], frame: bytes, is_kept: bool
) -> None:
    into, out = filtered
    with into, out:
        into.send(frame)
        if is_kept:
            assert out.recv(1 << 16) == frame
        else:
            with pytest.raises(BlockingIOError):
                out.recv(1 << 16)


def test_nothing_is_put_where_it_does_not_belong() -> None:
    """Not even looked for: the port of this network is on no host."""
    frame = HeldFrame("eth0", bytes(10) + ethernet(OWN))
    assert held_frames.deliver([frame], IDENTITY, IDENTITY.ports) == 0
