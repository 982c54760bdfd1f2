"""Which copies are asked for: how many, where, by which names and addresses. Pure.

--to B,C --count 5 --name lamb-{n} --ip 10.0.0.10-10.0.0.19/24
    lamb-1 on B 10.0.0.10, lamb-2 on C 10.0.0.11, lamb-3 on B 10.0.0.12, …
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from migrate.core.messages import MAX_COPIES
from migrate.errors import UsageError
from migrate.runtimes.base import validate_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from migrate.core.messages import CopySignal
    from migrate.network_identity import IP

NUMBER: Final = "{n}"
"""What stands for a copy's number in a pattern of names."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A copy that is asked for. port: of its host's agent. addresses: its own, one of each family
    that it is to have."""

    host: str
    port: int
    name: str
    addresses: tuple[IP, ...]


@dataclass(frozen=True, slots=True)
class Alike:
    """What is asked for of all copies. fill: whether all of their memory is brought in, needed or
    not; None: that of a copy that is alone on its host. hook, signal: as in `messages.CopyOf`."""

    fill: bool | None = None
    hook: str = ""
    signal: CopySignal | None = None


def wanted_copies(
    hosts: Sequence[tuple[str, int]], count: int | None, pattern: str, given: Sequence[str]
) -> tuple[Wanted, ...]:
    """The copies, numbered from 1, hosts (and ports) in turn. `count`: one a host if not said.
    `given`: addresses and ranges of them, FIRST-LAST, either with its prefix behind a slash if
    wanted. Raises UsageError."""
    if len({host for host, _ in hosts}) < len(hosts) or not all(host for host, _ in hosts):
        raise UsageError("a host is named twice or not at all", remedy="name each once; --count N")
    count = len(hosts) if count is None else count
    if count < len(hosts):
        raise UsageError(f"{count} copies are too few for {len(hosts)} hosts")
    if count > MAX_COPIES:
        raise UsageError(f"{MAX_COPIES} copies can be made at once, not {count}")
    if count > 1 and NUMBER not in pattern:
        raise UsageError(
            f"{count} copies can't all be called {pattern}",
            remedy=f"give a pattern: --name {pattern}-{NUMBER}",
        )
    pools = [_Pool.parse(text, count) for text in given]
    families = [_family(version, pools, count) for version in (4, 6)]
    return tuple(
        Wanted(
            *hosts[number % len(hosts)],
            validate_name(pattern.replace(NUMBER, str(number + 1))),
            tuple(family[number] for family in families if family),
        )
        for number in range(count)
    )


def _family(version: int, pools: Sequence[_Pool], count: int) -> list[IP]:
    """The addresses of one family, one a copy; none when none are given."""
    of_family = [pool for pool in pools if pool.addresses[0].version == version]
    found = [address for pool in of_family for address in pool.addresses]
    if len(set(found)) < len(found):
        raise UsageError(f"an IPv{version} address is given twice", remedy="give each once")
    if not found:
        return []
    copies = "1 copy needs 1" if count == 1 else f"{count} copies need {count}"
    if len(found) < count:
        raise UsageError(
            f"{copies} IPv{version} addresses, and {len(found)} are given",
            remedy="give more, or a range: --ip FIRST-LAST",
        )
    if len(found) > count and not any(pool.is_range for pool in of_family):
        raise UsageError(f"{copies} IPv{version} addresses, and {len(found)} are given")
    return found[:count]


@dataclass(frozen=True, slots=True)
class _Pool:
    """What one --ip says, as far as it is needed."""

    addresses: tuple[IP, ...]
    is_range: bool

    @classmethod
    def parse(cls, text: str, most: int) -> _Pool:
        """At most `most` addresses of it. Raises UsageError."""
        ends, _, prefix = text.partition("/")
        first, dash, last = ends.partition("-")
        try:
            begin = ipaddress.ip_address(first)
            end = ipaddress.ip_address(last) if dash else begin
            wire = ipaddress.ip_network(f"{begin}/{prefix}", strict=False) if prefix else None
        except ValueError as error:
            raise UsageError(f"{text} is no address and no range of them: {error}") from error
        if begin.version != end.version or int(begin) > int(end):
            raise UsageError(f"{text} is no range: {end} does not come behind {begin}")
        if wire is not None and end not in wire:
            raise UsageError(f"{text} is no range of one network: {end} is not in {wire}")
        return cls(tuple(_some(begin, end, most)), bool(dash))


def _some(begin: IP, end: IP, most: int) -> Iterator[IP]:
    for number in range(min(int(end) - int(begin) + 1, most)):
        yield begin + number
