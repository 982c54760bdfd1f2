"""Questions to a network and what counts as an answer, by their bytes."""

from __future__ import annotations

import ipaddress

import pytest

from migrate.address_probe import claimed_by, probe_frame
from migrate.announce import advert_frame, arp_frames, mac_bytes

OWN, OTHER = mac_bytes("02:42:0a:4d:00:32"), mac_bytes("02:00:00:00:00:05")
IP4, IP6 = ipaddress.ip_address("10.77.0.50"), ipaddress.ip_address("fd77::1:2:50")
OTHER_MAC = OTHER.hex(":")


def test_questions_say_nothing_of_who_asks() -> None:
    # Request; our MAC, 0.0.0.0; nobody's MAC, the address.
    assert probe_frame(OWN, IP4) == bytes.fromhex(
        "ffffffffffff 02420a4d0032 0806 0001 0800 06 04 0001"
        " 02420a4d0032 00000000 000000000000 0a4d0032"
    )
    # Version 6, length 24, ICMPv6, 255; :: -> ff02::1:ff02:50; 135, 0, checksum, 0; the address.
    assert probe_frame(OWN, IP6) == bytes.fromhex(
        "3333ff020050 02420a4d0032 86dd 60000000 0018 3a ff"
        " 00000000000000000000000000000000 ff0200000000000000000001ff020050"
        " 87 00 7c8b 00000000 fd770000000000000000000100020050"
    )


@pytest.mark.parametrize(
    ("frame", "address"),
    [
        (arp_frames(OTHER_MAC, str(IP4))[0], IP4),
        (arp_frames(OTHER_MAC, str(IP4))[1], IP4),
        (advert_frame(OTHER_MAC, str(IP6)), IP6),
        (probe_frame(OTHER, IP4), IP4),
        (probe_frame(OTHER, IP6), IP6),
    ],
    ids=["request", "reply", "advert", "probe", "solicitation"],
)
def test_who_has_or_wants_an_address_is_heard(
    frame: bytes, address: ipaddress.IPv4Address | ipaddress.IPv6Address
) -> None:
    assert claimed_by(frame, OWN) == (address.packed, OTHER)
    assert claimed_by(frame, OTHER) is None
    # Whatever is cut off, nothing is claimed in somebody else's name.
    for length in range(len(frame)):
        assert claimed_by(frame[:length], OWN) in (None, (address.packed, OTHER))


def test_what_claims_nothing() -> None:
    question = bytearray(arp_frames(OTHER_MAC, str(IP4))[0])
    question[38:42] = ipaddress.ip_address("10.77.0.51").packed
    assert claimed_by(bytes(question), OWN) == (IP4.packed, OTHER)
    # Not of the link: a router was on the way.
    advert = bytearray(advert_frame(OTHER_MAC, str(IP6)))
    advert[21] = 254
    assert claimed_by(bytes(advert), OWN) is None
    assert claimed_by(bytes(60), OWN) is None
