"""Which copies a command line asks for."""

from __future__ import annotations

import ipaddress

import pytest

from migrate.copies_wanted import Pool, Wanted, in_ranges, others, readdressed, wanted_copies
from migrate.core.messages import MAX_COPIES
from migrate.errors import MigrateError

B, C = ("B", 7337), ("C", 7400)


def wanted(
    hosts: list[tuple[str, int]], count: int | None, pattern: str, given: list[str]
) -> tuple[Wanted, ...]:
    return wanted_copies(hosts, count, pattern, [Pool.parse(text) for text in given])


def told(copies: tuple[Wanted, ...]) -> list[tuple[str, ...]]:
    return [(one.host, one.name, *map(str, one.addresses)) for one in copies]


def said(
    hosts: list[tuple[str, int]], count: int | None, pattern: str, given: list[str]
) -> list[tuple[str, ...]]:
    return told(wanted(hosts, count, pattern, given))


def test_one_copy_on_each_host_by_turns() -> None:
    assert said([B], None, "ram-{n}", []) == [("B", "ram-1")]
    assert said([B], None, "ram", ["10.0.0.7", "fd00::7"]) == [("B", "ram", "10.0.0.7", "fd00::7")]
    assert said([B, C], None, "ram-{n}", []) == [("B", "ram-1"), ("C", "ram-2")]
    assert [one[0] for one in said([B, C], 5, "ram-{n}", [])] == ["B", "C", "B", "C", "B"]
    assert [one.port for one in wanted([B, C], 3, "{n}ram", [])] == [7337, 7400, 7337]


def test_addresses_come_from_lists_and_ranges_of_each_family() -> None:
    given = ["10.0.0.7-10.0.0.8/24", "fd00::7", "10.0.0.20", "fd00::a-fd00::ff"]
    assert said([B], 3, "ram-{n}", given) == [
        ("B", "ram-1", "10.0.0.7", "fd00::7"),
        ("B", "ram-2", "10.0.0.8", "fd00::a"),
        ("B", "ram-3", "10.0.0.20", "fd00::b"),
    ]
    # However large it is.
    assert said([B], 1, "ram", ["10.0.0.0-10.255.255.255", "::1-ffff::"]) == [
        ("B", "ram", "10.0.0.0", "::1")
    ]


def test_what_is_taken_of_a_range_is_left_out() -> None:
    given = ["10.0.0.7-10.0.0.9", "10.0.0.20", "fd00::7"]
    pools = [Pool.parse(text) for text in given]
    (one,) = wanted([B], 1, "ram", given)
    taken = {
        ipaddress.ip_address(text) for text in ("10.0.0.7", "10.0.0.9", "10.0.0.20", "fd00::7")
    }
    assert list(map(str, in_ranges(pools))) == ["10.0.0.7", "10.0.0.8", "10.0.0.9"]
    # What was given by itself is kept.
    assert told(readdressed([one], pools, taken)) == [("B", "ram", "10.0.0.8", "fd00::7")]
    given[-1] = "fd00::7-fd00::9"
    pools = [Pool.parse(text) for text in given]
    three = wanted([B], 3, "ram-{n}", given)
    assert told(readdressed(three[:2], pools, taken)) == [
        ("B", "ram-1", "10.0.0.8", "fd00::8"),
        ("B", "ram-2", "10.0.0.20", "fd00::9"),
    ]
    with pytest.raises(MigrateError, match="need 3 IPv4 addresses, and of 4 that are given 2 are"):
        readdressed(three, pools, taken)


@pytest.mark.parametrize(
    ("hosts", "count", "pattern", "given", "match"),
    [
        ([B, B], None, "ram-{n}", [], "named twice"),
        ([("", 7337)], None, "ram-{n}", [], "not at all"),
        ([B, C], 1, "ram-{n}", [], "1 copies are too few for 2 hosts"),
        ([B], MAX_COPIES + 1, "ram-{n}", [], "can be made at once"),
        ([B], 2, "ram", [], "can't all be called ram"),
        ([B], 1, "../ram", [], "name"),
        ([B], 3, "ram-{n}", ["10.0.0.7-10.0.0.8"], "3 copies need 3 IPv4 addresses, and 2 are"),
        ([B], 2, "ram-{n}", ["10.0.0.7", "10.0.0.8", "fd00::7"], "2 IPv6 addresses, and 1 are"),
        ([B], 1, "ram", ["10.0.0.7", "10.0.0.8"], "1 copy needs 1 IPv4 addresses, and 2 are"),
        ([B], 2, "ram-{n}", ["10.0.0.7", "10.0.0.7"], "twice"),
        ([B], 1, "ram", ["10.0.0"], "no address"),
        ([B], 1, "ram", ["10.0.0.7-"], "no address"),
        ([B], 1, "ram", ["10.0.0.8-10.0.0.7"], "no range"),
        ([B], 1, "ram", ["10.0.0.8-fd00::7"], "no range"),
        ([B], 1, "ram", ["10.0.0.250-10.0.1.7/24"], "10.0.1.7 is not in 10.0.0.0/24"),
        ([B], 1, "ram", ["10.0.0.250-10.0.0.251/33"], "no address"),
    ],
)
def test_what_cannot_be_is_refused(
    hosts: list[tuple[str, int]], count: int | None, pattern: str, given: list[str], match: str
) -> None:
    with pytest.raises(MigrateError, match=match):
        wanted(hosts, count, pattern, given)


def test_what_turns_out_to_be_taken_is_replaced_by_another_of_the_range() -> None:
    pools = [Pool.parse(text) for text in ("10.0.0.7-10.0.0.9", "fd00::7", "fd00::a-fd00::b")]
    own = [ipaddress.ip_address(text) for text in ("10.0.0.7", "fd00::7")]
    taken = {*own, ipaddress.ip_address("10.0.0.8")}
    # The one that was given by itself stays, whoever has it.
    assert list(map(str, others(pools, own, taken))) == ["10.0.0.9", "fd00::7"]
    with pytest.raises(MigrateError, match="no other of its range"):
        others(pools, own, {*taken, ipaddress.ip_address("10.0.0.9")})
