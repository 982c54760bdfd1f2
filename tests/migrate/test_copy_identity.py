"""Who a copy is: what of its original's network it keeps, and what it has of its own."""

from __future__ import annotations

import ipaddress
import itertools
import json

import pytest

from bench.oci_spec import oci_spec
from migrate.copy_identity import config_of, identity_of, left_out, random_mac, unusable
from migrate.errors import UsageError
from migrate.network_identity import (
    Interface,
    InterfaceAddress,
    Neighbour,
    NetworkIdentity,
    Port,
    Route,
    validate,
)

IP4, IP6 = ipaddress.ip_address("10.0.0.9"), ipaddress.ip_address("fd00::9")
LOOPBACK = Interface("lo", "loopback", None, 65536, True, (InterfaceAddress("127.0.0.1/8"),))
ORIGINAL = NetworkIdentity(
    hostname="ram",
    interfaces=(
        LOOPBACK,
        Interface(
            "eth0",
            "veth",
            "02:00:00:00:00:05",
            1500,
            True,
            (
                InterfaceAddress("10.0.0.5/24", broadcast="10.0.0.255"),
                InterfaceAddress("fd00::5/64"),
                InterfaceAddress("fe80::ff:fe00:5/64", scope=253),
            ),
            2,
        ),
    ),
    routes=(
        Route("inet", "default", "10.0.0.1", "eth0", source="10.0.0.5"),
        Route("inet6", "default", "fd00::1", "eth0", source="fd00::5"),
    ),
    neighbours=(Neighbour("eth0", "10.0.0.1", "02:00:00:00:00:01", 2),),
    ports=(Port("eth0", "v-ram", "br0"),),
)


def test_a_copy_has_what_is_its_own_and_keeps_the_rest() -> None:
    copy = identity_of(ORIGINAL, "sheep", [IP4, IP6], lambda: "02:00:00:00:00:0c")
    validate(copy.network)
    loopback, eth0 = copy.network.interfaces
    assert loopback == LOOPBACK
    assert (eth0.mac, eth0.index, eth0.mtu) == ("02:00:00:00:00:0c", 2, 1500)
    assert [one.network for one in eth0.addresses] == [
        "10.0.0.9/24",
        "fd00::9/64",
        "fe80::ff:fe00:c/64",
    ]
    assert eth0.addresses[0].broadcast == "10.0.0.255"
    assert [one.source for one in copy.network.routes] == ["10.0.0.9", "fd00::9"]
    assert copy.network.hostname == "sheep"
    assert copy.renamed == (("10.0.0.5", "10.0.0.9"), ("fd00::5", "fd00::9"))
    assert left_out(ORIGINAL, [copy]) == []
    assert (copy.network.neighbours, copy.network.ports) == (ORIGINAL.neighbours, ORIGINAL.ports)


def test_an_address_that_it_is_given_none_for_is_left_out_with_its_routes() -> None:
    copy = identity_of(ORIGINAL, "sheep", [IP4])
    validate(copy.network)
    assert [one.family for one in copy.network.routes] == ["inet"]
    assert left_out(ORIGINAL, [copy]) == ["fd00::5"]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([], "needs an address of its own"),
        ([ipaddress.ip_address("10.0.0.5")], "the container's own"),
        ([ipaddress.ip_address("10.0.1.9")], "no free address"),
        ([ipaddress.ip_address("10.0.0.1")], "no free address"),
        ([ipaddress.ip_address("10.0.0.255")], "no free address"),
        ([IP4, ipaddress.ip_address("10.0.0.8")], "no IPv4 address that 10.0.0.8 stands for"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(
    given: list[ipaddress.IPv4Address], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        identity_of(ORIGINAL, "sheep", given)


def test_what_the_original_knows_is_no_address_of_a_range() -> None:
    asked = ["10.0.0.1", "10.0.0.5", "10.0.0.9", "10.0.0.255", "10.0.1.9", "fd00::1", "fd00::9"]
    found = unusable(ORIGINAL, [ipaddress.ip_address(text) for text in asked])
    assert sorted(map(str, found)) == ["10.0.0.1", "10.0.0.255", "10.0.0.5", "fd00::1"]


def test_a_container_without_a_wire_takes_no_address() -> None:
    alone = NetworkIdentity("sheep", (LOOPBACK,), (), (), ())
    assert identity_of(alone, "sheep", []).network == alone
    with pytest.raises(UsageError, match="has no IPv4 address"):
        identity_of(alone, "sheep", [IP4])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("/dolly/ram", "/dolly/sheep"),
        ("ram", "sheep"),
        ("system.slice:runc:ram", "system.slice:runc:sheep"),
        ("", ""),
    ],
)
def test_its_configuration_names_it(before: str, after: str) -> None:
    spec = oci_spec(
        ["/bin/x"], hostname="ram", network_namespace="/run/netns/x", cgroup=before, annotations={}
    )
    found = json.loads(config_of(json.dumps(spec), "sheep"))
    assert found["hostname"] == "sheep"
    assert found["linux"]["cgroupsPath"] == after
    del found["hostname"], spec["hostname"]
    del found["linux"]["cgroupsPath"], spec["linux"]["cgroupsPath"]
    assert found == spec


def test_macs_are_local_and_never_twice() -> None:
    macs = list(itertools.islice(iter(random_mac, None), 100))
    assert len(set(macs)) == 100
    assert all(mac.startswith("02:") and len(mac) == 17 for mac in macs)
