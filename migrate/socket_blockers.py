"""Which sockets of a container CRIU can't dump, or would lose something of. Pure.

Tables are from criu/sockets.c and criu/sk-inet.c of CRIU 4.2.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from migrate.refusals import Refusal

if TYPE_CHECKING:
    from migrate.socket_scan import SocketView

_SOCKETS_DUMPED = (
    socket.AF_UNIX,
    socket.AF_INET,
    socket.AF_INET6,
    socket.AF_PACKET,
    socket.AF_NETLINK,
)
# criu/sk-inet.c: can_dump_ipproto
_PROTOCOLS_DUMPED = (
    0,
    socket.IPPROTO_TCP,
    socket.IPPROTO_UDP,
    socket.IPPROTO_ICMP,
    socket.IPPROTO_ICMPV6,
    136,  # UDP-Lite
)
_MPTCP = 262
_FAMILY_NAMES = {38: "AF_ALG", 40: "AF_VSOCK", 44: "AF_XDP", 29: "AF_CAN", 30: "AF_TIPC"}
_PROTOCOL_NAMES = {_MPTCP: "MPTCP", 132: "SCTP", 33: "DCCP"}


def of_socket(one: SocketView, who: str, own: set[int]) -> Refusal | None:
    """Why the socket of `who` can't be dumped, None if it can; `own`: inodes of the container."""
    if one.family not in _SOCKETS_DUMPED:
        name = _FAMILY_NAMES.get(one.family, f"family {one.family}")
        return Refusal(
            "socket-family",
            f"{who} has a socket of {name}, which CRIU can't dump",
            "configure the program without it",
        )
    if one.is_foreign:
        return Refusal(
            "foreign-socket",
            f"{who} has a socket of another network namespace (handed in from outside)",
            "let the program open its sockets itself",
        )
    if one.family == socket.AF_UNIX:
        # criu/sk-unix.c: "Unix socket without peer", "Dangling connection".
        if not one.is_dangling and (one.peer in own or not one.peer):
            return None
        name = f" at {one.peer_name}" if one.peer_name else ""
        return Refusal(
            "external-unix-socket",
            f"{who} is connected to a unix socket{name} of a process outside of the container",
            "close the connection before, or reach that service by TCP",
        )
    if one.family not in (socket.AF_INET, socket.AF_INET6):
        return None
    return _of_internet_socket(one, who)


def _of_internet_socket(one: SocketView, who: str) -> Refusal | None:
    if one.kind != socket.SOCK_RAW and one.protocol not in _PROTOCOLS_DUMPED:
        name = _PROTOCOL_NAMES.get(one.protocol, f"protocol {one.protocol}")
        remedy = "have the program use TCP or UDP"
        if one.protocol == _MPTCP:
            remedy = "have it use plain TCP (Go: GODEBUG=multipathtcp=0; mptcpize disable)"
        return Refusal("socket-protocol", f"{who} has a socket of {name}", remedy)
    if one.upper_protocol:
        # CRIU does not know of it: the restored connection would send what was to be encrypted.
        return Refusal(
            "socket-ulp",
            f"{who} has a connection with {one.upper_protocol} in the kernel",
            "switch kernel TLS off in the program (nginx: ssl_conf_command Options -KTLS)",
        )
    if one.is_corked:
        return Refusal(
            "udp-cork", f"{who} holds back a datagram (UDP_CORK)", "have the program send it"
        )
    return None
