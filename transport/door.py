"""Who may wait at a port before they have proven who they are, and how many come in of each.

A connection costs its host memory and a descriptor before anybody knows whose it is. So there is
room for some only. When it is taken, somebody has to go: the one that has waited longest, of the
address that has most of them there. A flood of connections that say nothing pushes out itself, and
who speaks at once is let in long before it is the oldest.

Knows no sockets and no clocks: whoever has them says how a guest is turned away. Any thread.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WAITING_MAX = 64
"""More than the streams that all sessions of an agent open at the same moment."""
INSIDE_MAX = 256
"""A connection takes 256 KiB (asyncio's buffer for TLS), and a handful serve a session."""
INSIDE_OF_ONE_MAX = 96
"""Of one address: six for each session, if all of them come from there."""

_IPV6_SITE_BITS = 64
"""Whoever has one address of a /64 has them all."""


@dataclass(eq=False, slots=True)
class Guest:
    """A connection at the door. `turn_away` ends it, from any thread; it is called once at most."""

    address: str
    turn_away: Callable[[], object] = field(default=lambda: None, repr=False)
    is_inside: bool = False
    was_turned_away: bool = False


class Door:
    """See the module."""

    def __init__(
        self,
        *,
        waiting_max: int = WAITING_MAX,
        inside_max: int = INSIDE_MAX,
        inside_of_one_max: int = INSIDE_OF_ONE_MAX,
    ) -> None:
        self._waiting_max = waiting_max
        self._inside_max = inside_max
        self._inside_of_one_max = inside_of_one_max
        self._lock = threading.Lock()
        # In the order in which they came.
        self._waiting: dict[Guest, str] = {}
        self._inside: dict[Guest, str] = {}

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def enter(self, guest: Guest) -> bool:
        """Let `guest` wait, and turn away another one if there is no room for both.

        False, and it does not wait: too many are inside, or of its address.
        """
        site = site_of(guest.address)
        victim = None
        with self._lock:
            of_one = sum(other == site for other in self._inside.values())
            if len(self._inside) >= self._inside_max or of_one >= self._inside_of_one_max:
                return False
            self._waiting[guest] = site
            if len(self._waiting) > self._waiting_max:
                victim = self._longest_of_most()
                del self._waiting[victim]
                victim.was_turned_away = True
        if victim is not None:
            victim.turn_away()
        return True

    def admit(self, guest: Guest) -> bool:
        """`guest` has proven who it is, and is served now; False if it was turned away before."""
        with self._lock:
            if guest in self._waiting:
                self._inside[guest] = self._waiting.pop(guest)
                guest.is_inside = True
            return guest.is_inside

    def leave(self, guest: Guest) -> None:
        """Its connection has ended. Idempotent."""
        with self._lock:
            self._waiting.pop(guest, None)
            self._inside.pop(guest, None)

    def _longest_of_most(self) -> Guest:
        most = Counter(self._waiting.values()).most_common(1)[0][0]
        return next(guest for guest, site in self._waiting.items() if site == most)


def site_of(address: str) -> str:
    """What of an IP address one attacker is likely to have to itself."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ip)
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((int(ip), _IPV6_SITE_BITS), strict=False))
