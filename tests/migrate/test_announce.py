"""Announcements by their bytes: golden frames, and properties of the checksum."""

from __future__ import annotations

import ipaddress
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.announce import (
    Announcer,
    advert_frame,
    arp_frames,
    frames_of,
    internet_checksum,
    mac_bytes,
)
from migrate.netns import OWN_NETNS
from migrate.network_identity import Interface, InterfaceAddress, NetworkError, NetworkIdentity

MAC = "02:42:0a:4d:00:32"

# ff:ff.. <- MAC, 0x806; Ethernet, IPv4, 6, 4, request; MAC, 10.77.0.50; zeros, 10.77.0.50
ARP_REQUEST = (
    "ffffffffffff 02420a4d0032 0806 0001 0800 06 04 0001"
    " 02420a4d0032 0a4d0032 000000000000 0a4d0032"
)
ARP_REPLY = (
    "ffffffffffff 02420a4d0032 0806 0001 0800 06 04 0002"
    " 02420a4d0032 0a4d0032 02420a4d0032 0a4d0032"
)
# 33:33::1 <- MAC, 0x86dd; version 6, length 32, ICMPv6, 255; fd77::50 -> ff02::1;
# 136, 0, checksum, override; fd77::50; option 2, 8 bytes, MAC
ADVERT = (
    "333300000001 02420a4d0032 86dd 60000000 0020 3a ff"
    " fd770000000000000000000000000050 ff020000000000000000000000000001"
    " 88 00 4e4f 20000000 fd770000000000000000000000000050 02 01 02420a4d0032"
)


def interface(*addresses: str, mac: str | None = MAC) -> Interface:
    return Interface(
        name="eth0",
        kind="veth",
        mac=mac,
        mtu=1500,
        up=True,
        addresses=tuple(InterfaceAddress(network=address) for address in addresses),
    )


def test_gratuitous_arp_is_a_request_and_a_reply() -> None:
    assert arp_frames(MAC, "10.77.0.50") == (bytes.fromhex(ARP_REQUEST), bytes.fromhex(ARP_REPLY))


def test_an_unsolicited_advertisement_overrides_what_neighbours_know() -> None:
    assert advert_frame(MAC, "fd77::50") == bytes.fromhex(ADVERT)


def test_the_checksum_is_that_of_rfc_1071() -> None:
    # The RFC's own example, section 3.
    assert internet_checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D
    assert internet_checksum(b"") == 0xFFFF


@given(st.binary(max_size=200))
def test_data_with_its_checksum_sums_to_zero(data: bytes) -> None:
    even = data + b"\0" * (len(data) % 2)
    with_checksum = even + struct.pack("!H", internet_checksum(even))
    assert internet_checksum(with_checksum) == 0


@given(st.ip_addresses(v=6))
def test_every_advertisement_verifies(address: ipaddress.IPv6Address) -> None:
    frame = advert_frame(MAC, str(address))
    source, target, message = frame[22:38], frame[38:54], frame[54:]
    assert frame[21] == 255
    assert struct.unpack("!H", frame[18:20]) == (len(message),)
    pseudo = source + target + struct.pack("!IHBB", len(message), 0, 0, 58)
    assert internet_checksum(pseudo + message) == 0


def test_every_address_of_an_interface_is_announced() -> None:
    frames = frames_of(interface("10.77.0.50/24", "fd77::50/112", "fe80::42/64"))
    assert frames == [
        *arp_frames(MAC, "10.77.0.50"),
        advert_frame(MAC, "fd77::50"),
        advert_frame(MAC, "fe80::42"),
    ]
    assert frames_of(interface("10.77.0.50/24", mac=None)) == []


def test_mac_bytes() -> None:
    assert mac_bytes("02:42:0a:4d:00:32") == b"\x02\x42\x0a\x4d\x00\x32"


def test_an_announcer_of_an_interface_that_is_not_there_is_an_error() -> None:
    identity = NetworkIdentity(
        hostname="web",
        interfaces=(interface("10.77.0.50/24"),),
        routes=(),
        neighbours=(),
        ports=(),
    )
    absent = Interface("no-such-device", "veth", MAC, 1500, True, ())
    with pytest.raises(NetworkError, match="no announcement"):
        Announcer(OWN_NETNS, NetworkIdentity("web", (absent,), (), (), ()))
    with pytest.raises(NetworkError, match="no announcement"):
        Announcer(OWN_NETNS / "none", identity)
