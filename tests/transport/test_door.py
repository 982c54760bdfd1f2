"""Who is let in, who is turned away, and how much of it is logged."""

from __future__ import annotations

import random

import pytest

from transport.complaints import Complaints
from transport.door import Door, Guest, site_of


class Visitors:
    """Guests of a door, and who of them was turned away."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.turned_away: list[Guest] = []

    def come(self, address: str) -> Guest | None:
        guest = Guest(address, lambda: self.turned_away.append(guest))
        return guest if self.door.enter(guest) else None


def test_a_flood_of_one_address_turns_away_itself() -> None:
    visitors = Visitors(Door(waiting_max=4))
    early = visitors.come("10.0.0.1")
    flood = [visitors.come("10.0.0.66") for _ in range(1000)]
    late = visitors.come("10.0.0.2")
    assert visitors.door.waiting == 4
    assert visitors.turned_away == flood[:998]
    for one in (early, late, flood[-1]):
        assert one is not None
        assert visitors.door.admit(one)
    assert flood[0] is not None
    assert not visitors.door.admit(flood[0])
    assert flood[0].was_turned_away


def test_a_flood_of_many_addresses_turns_away_the_oldest() -> None:
    visitors = Visitors(Door(waiting_max=4))
    guests = [visitors.come(f"10.0.0.{number}") for number in range(7)]
    assert visitors.turned_away == guests[:3]


def test_the_addresses_of_a_network_of_ipv6_are_one() -> None:
    visitors = Visitors(Door(waiting_max=3))
    other = visitors.come("2001:db8:1::1")
    flood = [visitors.come(f"2001:db8:2::{number:x}") for number in range(5)]
    assert visitors.turned_away == flood[:3]
    assert other not in visitors.turned_away


@pytest.mark.parametrize(
    ("address", "site"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("2001:db8::1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("?", "?"),
    ],
)
def test_what_counts_as_one(address: str, site: str) -> None:
    assert site_of(address) == site


def test_no_more_inside_than_allowed_in_all_and_of_one() -> None:
    visitors = Visitors(Door(inside_max=5, inside_of_one_max=3))
    inside = [visitors.come("10.0.0.1") for _ in range(3)]
    for guest in inside:
        assert guest is not None
        assert visitors.door.admit(guest)
    assert visitors.come("10.0.0.1") is None
    for _ in range(2):
        guest = visitors.come("10.0.0.2")
        assert guest is not None
        visitors.door.admit(guest)
    assert visitors.come("10.0.0.3") is None
    assert inside[0] is not None
    visitors.door.leave(inside[0])
    visitors.door.leave(inside[0])
    assert visitors.come("10.0.0.1") is not None
    assert visitors.turned_away == []


def test_whoever_is_inside_is_never_turned_away() -> None:
    chance = random.Random(5)
    visitors = Visitors(Door(waiting_max=3, inside_max=50, inside_of_one_max=20))
    inside: list[Guest] = []
    for _ in range(2000):
        guest = visitors.come(f"10.0.0.{chance.randrange(4)}")
        if guest is not None and chance.random() < 0.3 and visitors.door.admit(guest):
            inside.append(guest)
        if inside and chance.random() < 0.25:
            visitors.door.leave(inside.pop(chance.randrange(len(inside))))
        assert visitors.door.waiting <= 3
    assert inside
    assert not set(inside) & set(visitors.turned_away)
    assert len(visitors.turned_away) == len(set(visitors.turned_away))


def test_the_log_is_not_flooded_and_says_what_is_missing() -> None:
    now_s = 0.0
    complaints = Complaints(of_one_max=2, total_max=5, period_s=60.0, clock=lambda: now_s)
    assert [complaints.allow("10.0.0.1") for _ in range(4)] == [{}, {}, None, None]
    assert complaints.allow("10.0.0.2") == {"left_out": 2}
    assert complaints.allow("10.0.0.2") == {}
    assert complaints.allow("10.0.0.3") == {}
    assert complaints.allow("10.0.0.4") is None
    now_s = 61.0
    assert complaints.allow("10.0.0.1") == {"left_out": 1}
    assert complaints.allow("10.0.0.1") == {}
