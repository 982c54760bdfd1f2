"""The lab on paper: names, addresses, and the command lines that make it."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.lab.errors import LabError
from bench.lab.plan import (
    BURST_BYTES_MIN,
    HOSTS_MAX,
    hosts_file,
    link_lines,
    make_plan,
    node_lines,
    parse_rate,
    rate_line,
)


@given(hosts=st.integers(1, HOSTS_MAX), subnet=st.integers(0, 255))
def test_every_node_has_addresses_of_its_own_in_one_subnet(hosts: int, subnet: int) -> None:
    plan = make_plan("lab", [f"h{number}" for number in range(hosts)], subnet=subnet)
    assert len(plan.nodes) == hosts + 1
    network = ipaddress.ip_network(f"10.77.{subnet}.0/24")
    network6 = ipaddress.ip_network(f"fd77::{subnet:x}:0/112")
    for attribute in ("address", "address6", "mac", "wire_end"):
        assert len({getattr(node, attribute) for node in plan.nodes}) == hosts + 1
    for node in plan.nodes:
        assert ipaddress.ip_address(node.address) in network
        assert ipaddress.ip_address(node.address6) in network6
        assert str(ipaddress.ip_address(node.address6)) == node.address6
        # Linux device names: IFNAMSIZ is 16 with its end.
        assert max(len(node.wire_end), len(node.slow_end), len(node.line_end)) < 16


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "a\n", "ä", "x" * 42])
def test_a_name_that_is_no_plain_word_is_refused(name: str) -> None:
    with pytest.raises(LabError):
        make_plan(name, ["A"])
    with pytest.raises(LabError):
        make_plan("lab", [name])


@pytest.mark.parametrize("hosts", [[], ["A", "a"], ["A", "A"], ["client"], ["Client"]])
def test_hosts_that_could_be_mistaken_for_each_other_are_refused(hosts: list[str]) -> None:
    with pytest.raises(LabError):
        make_plan("lab", hosts)


def test_more_hosts_than_addresses_are_refused() -> None:
    with pytest.raises(LabError):
        make_plan("lab", [f"h{number}" for number in range(HOSTS_MAX + 1)])


@pytest.mark.parametrize(
    ("text", "bits"),
    [("1bit", 1), ("56kbit", 56_000), ("100mbit", 100_000_000), ("10Gbit", 10_000_000_000)],
)
def test_rates_are_read_as_tc_writes_them(text: str, bits: int) -> None:
    assert parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "0mbit", "1", "mbit", "1gbps", "-1mbit", "1 mbit", "1.5mbit"])
def test_a_rate_that_tc_would_read_otherwise_is_refused(text: str) -> None:
    with pytest.raises(LabError):
        parse_rate(text)


def test_a_slow_link_still_passes_whole_segments_and_a_fast_one_a_tick() -> None:
    assert f"burst {BURST_BYTES_MIN} " in rate_line("uplink", 1_000_000)
    assert "burst 5000000 " in rate_line("uplink", 10_000_000_000)


def test_the_hosts_file_names_every_node_by_both_families() -> None:
    text = hosts_file(make_plan("lab", ["A", "B"]))
    assert "10.77.0.102 B\n" in text
    assert "fd77::102 B\n" in text
    assert "10.77.0.1 client\n" in text


def test_only_hosts_have_a_bridge_and_a_line_stands_in_it_for_the_link() -> None:
    plan = make_plan("lab", ["A"])
    host, client = plan.nodes
    assert any("type bridge" in line for line in node_lines(host))
    assert not any("bridge" in line for line in node_lines(client))
    assert "link set slow0 addrgenmode none master br0 up" in link_lines(host, has_line=True)
    assert "link set wire1 addrgenmode none master br0 up" in link_lines(client, has_line=False)
    assert (host.port(has_line=True), host.port(has_line=False)) == ("slow0", "wire0")
