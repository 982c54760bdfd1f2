"""Where connections to a host really go: to the host itself, or through something that stands here.

Names prove nothing on either way: whoever answers has to show the host's certificate.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from aiohttp.abc import AbstractResolver, ResolveResult

if TYPE_CHECKING:
    import aiohttp


@dataclass(frozen=True, slots=True)
class Way:
    """places: of a port of the host the address and port to connect to instead; by default none, so
    that all goes to the host by its name."""

    places: Mapping[int, tuple[str, int]] = field(default_factory=dict)

    def to(self, host: str, port: int) -> tuple[str, int]:
        """Where to connect for this port of the host."""
        return self.places.get(port, (host, port))

    def resolver(self) -> aiohttp.abc.AbstractResolver:
        """The same for aiohttp."""
        return _Resolver(self)


DIRECT: Final = Way()
"""To the host itself."""


class _Resolver(AbstractResolver):
    """aiohttp asks for the addresses of a name, and connects to the port that the answer has."""

    def __init__(self, way: Way) -> None:
        self._way = way

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Raises OSError."""
        place = self._way.to(host, port)
        found = await asyncio.get_running_loop().getaddrinfo(
            *place, type=socket.SOCK_STREAM, family=family
        )
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=int(address[1]),
                family=kind,
                proto=protocol,
                flags=socket.AI_NUMERICHOST,
            )
            for kind, _, protocol, _, address in found
        ]

    async def close(self) -> None:
        """Nothing is kept."""
