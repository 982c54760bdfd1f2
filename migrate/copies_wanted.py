"""Which copies are asked for: how many, where, by which names and addresses. Pure, but for the
choice of another address.

--to B,C --count 5 --name lamb-{n} --ip 10.0.0.10-10.0.0.19/24
    lamb-1 on B 10.0.0.10, lamb-2 on C 10.0.0.11, lamb-3 on B 10.0.0.12, …

Of a range, what turns out to be taken is left out (`readdressed`), also what turns out to be when
a copy is asked for (`others`).
"""

from __future__ import annotations

import ipaddress
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from migrate.core.messages import MAX_COPIES
from migrate.errors import UsageError
from migrate.runtimes.base import validate_name

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from migrate.core.messages import CopySignal
    from migrate.network_identity import IP

NUMBER: Final = "{n}"
"""What stands for a copy's number in a pattern of names."""
SPARE_MAX: Final = 256
"""So many addresses of a range may be taken: all of them are asked for at once."""


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
    not; None: that of a copy that is alone on its host. hook, signal: as in `messages.CopyOf`.
    pools: what their addresses are of."""

    fill: bool | None = None
    hook: str = ""
    signal: CopySignal | None = None
    pools: tuple[Pool, ...] = ()


def wanted_copies(
    hosts: Sequence[tuple[str, int]], count: int | None, pattern: str, pools: Sequence[Pool]
) -> tuple[Wanted, ...]:
    """The copies, numbered from 1, hosts (and ports) in turn. `count`: one a host if not said.
    Raises UsageError."""
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
    names = [validate_name(pattern.replace(NUMBER, str(number + 1))) for number in range(count)]
    copies = [Wanted(*hosts[at % len(hosts)], name, ()) for at, name in enumerate(names)]
    return readdressed(copies, pools, frozenset())


def readdressed(
    copies: Sequence[Wanted], pools: Sequence[Pool], taken: Collection[IP]
) -> tuple[Wanted, ...]:
    """The same copies with the first addresses of `pools` that are not in `taken`; one that was
    given by itself is kept all the same. Raises UsageError."""
    families = [_family(version, pools, len(copies), taken) for version in (4, 6)]
    return tuple(
        replace(copy, addresses=tuple(family[at] for family in families if family))
        for at, copy in enumerate(copies)
    )


def others(pools: Sequence[Pool], own: Sequence[IP], taken: Collection[IP]) -> tuple[IP, ...]:
    """In place of a copy's own addresses, those of ranges, some that are not in `taken`: any, so
    that two who have met at one address do not go on side by side. Raises UsageError when there are
    no more."""
    ranges = in_ranges(pools)
    found = []
    for address in own:
        if address not in ranges:
            found.append(address)
            continue
        free = [one for one in ranges if one.version == address.version and one not in taken]
        if not free:
            raise UsageError(f"{address} is taken, and no other of its range is free")
        found.append(secrets.choice(free))
    return tuple(found)


def in_ranges(pools: Sequence[Pool]) -> list[IP]:
    """The addresses that can be left out for others."""
    return [address for pool in pools if pool.is_range for address in pool.addresses]


def _family(version: int, pools: Sequence[Pool], count: int, taken: Collection[IP]) -> list[IP]:
    """The addresses of one family, one a copy; none when none are given."""
    of_family = [pool for pool in pools if pool.addresses[0].version == version]
    given = [address for pool in of_family for address in pool.addresses]
    if len(set(given)) < len(given):
        raise UsageError(f"an IPv{version} address is given twice", remedy="give each once")
    if not given:
        return []
    left_out = {address for address in in_ranges(of_family) if address in taken}
    found = [address for address in given if address not in left_out]
    copies = "1 copy needs 1" if count == 1 else f"{count} copies need {count}"
    if len(found) < count:
        there = f"of {len(given)} that are given {len(found)} are free"
        raise UsageError(
            f"{copies} IPv{version} addresses, and "
            + (there if left_out else f"{len(found)} are given"),
            remedy="give more, or a range: --ip FIRST-LAST",
        )
    if len(found) > count and not any(pool.is_range for pool in of_family):
        raise UsageError(f"{copies} IPv{version} addresses, and {len(found)} are given")
    return found[:count]


@dataclass(frozen=True, slots=True)
class Pool:
    """What one --ip says, as far as it may be needed."""

    addresses: tuple[IP, ...]
    is_range: bool

    @classmethod
    def parse(cls, text: str) -> Pool:
        """An address, or a range of them, FIRST-LAST, either with its prefix behind a slash if
        wanted. Raises UsageError."""
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
        return cls(tuple(_some(begin, end)), bool(dash))


def _some(begin: IP, end: IP) -> Iterator[IP]:
    for number in range(min(int(end) - int(begin) + 1, MAX_COPIES + SPARE_MAX)):
        yield begin + number
