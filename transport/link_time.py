"""How much of the time that sending takes is the link's.

A thread that sends waits for the link, for the receiver to read, and for processors. Compression
shortens the first alone, so that only it counts when a level is chosen: a host that is short of
processors would be made shorter of them. The kernel keeps count of each connection (Linux:
net/ipv4/tcp.c, tcp_chrono_start; include/uapi/linux/tcp.h, since 4.10)::

    tcpi_busy_time      there was something to send, or to be acknowledged
    tcpi_rwnd_limited   … and the receiver had no room for it

A connection that ends on this host is a tunnel's, whose link is not seen here: all counts then.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import ssl

_TIMES: Final = struct.Struct("<QQ")
_TIMES_AT: Final = 168
_SIZE: Final = _TIMES_AT + _TIMES.size


class LinkTime:
    """Of one connection. Making it raises OSError when that has ended."""

    def __init__(self, connection: socket.socket | ssl.SSLSocket) -> None:
        self._connection = connection
        address = ip_address(connection.getpeername()[0])
        self._is_seen = not address.is_loopback and len(self._info()) == _SIZE
        self._then_s = self._now_s()

    def took_s(self, elapsed_s: float) -> float:
        """The link's part of the seconds since the last call, which may be more than those: what
        was sent before travelled meanwhile. elapsed_s: what sending took."""
        if not self._is_seen:
            return elapsed_s
        then_s, self._then_s = self._then_s, self._now_s()
        return max(self._then_s - then_s, 0.0)

    def _now_s(self) -> float:
        if not self._is_seen:
            return 0.0
        busy_us, receiver_us = _TIMES.unpack_from(self._info(), _TIMES_AT)
        return float(busy_us - receiver_us) / 1e6

    def _info(self) -> bytes:
        return self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
