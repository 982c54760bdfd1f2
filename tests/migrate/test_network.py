"""The pure parts of the network: identities, messages to the kernel, names. The rest is in lab/."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import msgspec
import pytest

from migrate import netns, network, port
from migrate.network_identity import (
    Interface,
    InterfaceAddress,
    InvalidIdentityError,
    Neighbour,
    NetworkError,
    NetworkIdentity,
    Port,
    Route,
    is_interface_name,
    parse_address,
    validate,
)

LO = Interface("lo", "loopback", "00:00:00:00:00:00", 65536, True, (), index=1)
ETH0 = Interface(
    name="eth0",
    kind="veth",
    mac="02:42:0a:4d:00:32",
    mtu=1500,
    up=True,
    addresses=(
        InterfaceAddress("10.77.0.50/24", broadcast="10.77.0.255"),
        InterfaceAddress("fd77::50/112"),
    ),
    index=2,
)
IDENTITY = NetworkIdentity(
    hostname="web",
    interfaces=(LO, ETH0),
    routes=(
        Route("inet", "default", "10.77.0.1", "eth0"),
        Route("inet6", "fd00::/8", "fd77::1", "eth0", metric=1024),
        Route("inet", "10.9.0.0/16", None, None, kind="blackhole"),
    ),
    neighbours=(Neighbour("eth0", "10.77.0.1", "02:00:00:00:00:01", 2),),
    ports=(Port("eth0", "v-web", "br0"),),
    sysctls={"net/core/somaxconn": "77", "net/ipv4/ip_local_port_range": "1024\t60999"},
)


def changed(part: Any, **fields: Any) -> Any:
    return msgspec.structs.replace(part, **fields)


def with_eth0(**fields: Any) -> NetworkIdentity:
    return changed(IDENTITY, interfaces=(LO, changed(ETH0, **fields)))


def with_route(**fields: Any) -> NetworkIdentity:
    return changed(IDENTITY, routes=(changed(IDENTITY.routes[0], **fields),))


def test_an_identity_survives_the_wire() -> None:
    data = msgspec.json.encode(IDENTITY)
    assert msgspec.json.decode(data, type=NetworkIdentity) == IDENTITY
    assert validate(IDENTITY) is IDENTITY


@pytest.mark.parametrize(
    "identity",
    [
        with_eth0(kind="loopback"),
        with_eth0(name="lo"),
        with_eth0(index=1),
        with_eth0(addresses=(InterfaceAddress("10.77.0.50/33"),)),
        with_eth0(addresses=(InterfaceAddress("10.77.0.50.1/24"),)),
        with_eth0(addresses=(InterfaceAddress("10.77.0.50/24", broadcast="fd77::1"),)),
        with_route(destination="10.0.0.1/8"),
        with_route(destination="fd00::/8"),
        with_route(gateway="fd77::1"),
        with_route(source="...."),
        with_route(device="eth7"),
        with_route(device=None),
        changed(IDENTITY, neighbours=(Neighbour("eth1", "10.0.0.1", "02:00:00:00:00:01", 2),)),
        changed(IDENTITY, neighbours=(Neighbour("eth0", "10.0.0", "02:00:00:00:00:01", 2),)),
        changed(IDENTITY, ports=()),
        changed(IDENTITY, ports=IDENTITY.ports * 2),
    ],
)
def test_what_makes_no_sense_is_refused(identity: NetworkIdentity) -> None:
    with pytest.raises(InvalidIdentityError):
        validate(identity)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"eth0"', '"../eth0"'),
        ('"eth0"', '"-eth0"'),
        ('"eth0"', '"eth0\\n"'),
        ('"v-web"', '"v/web"'),
        ('"mtu":1500', '"mtu":67'),
        ('"mtu":1500', '"mtu":"1500"'),
        ('"kind":"veth"', '"kind":"macvlan"'),
        ("02:42:0a:4d:00:32", "02:42:0A:4d:00"),
        ("net/core/somaxconn", "net/../kernel/core_pattern"),
        ("net/core/somaxconn", "kernel/core_pattern"),
        ("net/core/somaxconn", "net/core"),
        ('"77"', '"|/bin/sh"'),
        ('"hostname":"web"', '"hostname":"web","more":1'),
        ('"metric":1024', '"metric":-1'),
    ],
)
def test_what_a_peer_may_not_send_is_not_decoded(before: str, after: str) -> None:
    text = msgspec.json.encode(IDENTITY).decode()
    assert before in text
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(text.replace(before, after, 1), type=NetworkIdentity)


def test_long_lists_are_not_decoded() -> None:
    many = changed(IDENTITY, routes=IDENTITY.routes * 1000)
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(msgspec.json.encode(many), type=NetworkIdentity)


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "a/b", "a b", "a\n", "x" * 16, "é"])
def test_names_that_no_interface_may_have(name: str) -> None:
    assert not is_interface_name(name)
    with pytest.raises(NetworkError):
        port.index_of(name)


def test_names_that_an_interface_may_have() -> None:
    for name in ("lo", "eth0.100", "v-web", "a@b", "x" * 15):
        assert is_interface_name(name)


def test_addresses_are_parsed() -> None:
    ip, prefix_len = parse_address("fd77::50/112")
    assert (str(ip), prefix_len) == ("fd77::50", 112)


def test_plugging_is_these_messages() -> None:
    assert port.plug_message(5, 3) == bytes.fromhex(
        "28000000 1000 0500 01000000 00000000"  # 40 bytes, RTM_NEWLINK, REQUEST|ACK, sequence 1
        "00 00 0000 05000000 01000000 01000000"  # index 5, flags UP, change UP
        "0800 0a00 03000000"  # IFLA_MASTER 3
    )
    assert port.state_message(5, 3) == bytes.fromhex(
        "2c000000 1300 0500 01000000 00000000"  # 44 bytes, RTM_SETLINK
        "07 00 0000 05000000 00000000 00000000"  # AF_BRIDGE, index 5
        "0c00 0c80 0500 0100 03000000"  # IFLA_PROTINFO { IFLA_BRPORT_STATE 3 }
    )


def test_ports_that_are_not_there() -> None:
    port.unplug("no-such-port")
    with pytest.raises(NetworkError, match="no interface no-such-port"):
        port.plug("no-such-port", "no-such-bridge")
    assert port.bridge_of("no-such-port") is None


def test_a_free_name_is_the_wanted_one_or_a_new_one() -> None:
    assert network.free_port_name("no-such-port") == "no-such-port"
    other = network.free_port_name("lo")
    assert other != "lo"
    assert is_interface_name(other)
    assert network.free_port_name(None) != other


def test_a_missing_bridge_is_said_before_anything_is_made() -> None:
    with pytest.raises(NetworkError, match="no interface no-such-bridge"):
        network.plan(IDENTITY, "test-web", {"eth0": "no-such-bridge"})
    unknown = changed(IDENTITY, ports=(Port("eth0", "v-web", None),))
    with pytest.raises(NetworkError, match="no bridge is given"):
        network.plan(unknown, "test-web")
    assert not netns.path_of("test-web").exists()


@pytest.mark.parametrize("name", ["", "..", "a/b", ".x", "x" * 65])
def test_names_that_no_namespace_may_have(name: str) -> None:
    with pytest.raises(NetworkError):
        netns.path_of(name)


def test_only_namespaces_below_run_netns_are_removed() -> None:
    with pytest.raises(NetworkError, match="not below"):
        netns.remove(netns.OWN_NETNS)


def test_the_own_network_is_refused_as_a_containers() -> None:
    with pytest.raises(NetworkError, match="host's own network") as caught:
        network.capture(netns.OWN_NETNS)
    assert caught.value.remedy


def test_what_was_restored_into_the_own_network_is_given_nothing() -> None:
    handle = network.NetworkHandle("/run/netns/no-such-namespace", IDENTITY.ports)
    with pytest.raises(NetworkError, match="host's own network"):
        network.hand_over(IDENTITY, handle, os.getpid())


def test_a_namespace_without_a_name_ends_with_its_tasks() -> None:
    network.destroy(network.NetworkHandle("/proc/1/ns/net", ()))


def test_work_inside_a_namespace_returns_or_raises_in_the_callers_thread() -> None:
    threads: list[int] = []

    def work() -> list[str]:
        threads.append(threading.get_ident())
        return [name for _, name in socket.if_nameindex()]

    assert "lo" in netns.run_in(netns.OWN_NETNS, work)
    assert threads != [threading.get_ident()]

    def failing() -> None:
        raise LookupError("of the work's own")

    with pytest.raises(LookupError):
        netns.run_in(netns.OWN_NETNS, failing)
    with pytest.raises(FileNotFoundError):
        netns.run_in(netns.NETNS_DIRECTORY / "no-such-namespace", work)
