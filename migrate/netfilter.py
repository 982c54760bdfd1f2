"""Whether a network namespace has firewall rules: they are the kernel's and do not move.

Asked by netlink, in the namespace of the calling thread, so no `nft` has to be installed.

    nlmsghdr  length u32 | (NFNL_SUBSYS_NFTABLES << 8 | GETTABLE) u16 | REQUEST|DUMP u16 | 0 | 0
    nfgenmsg  family u8 (0: every) | version u8 0 | 0 u16          (linux/netfilter/nfnetlink.h)
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_NETLINK_NETFILTER = 12
_GET_TABLE = 10 << 8 | 1
_NEW_TABLE = 10 << 8 | 0
_REQUEST_AND_DUMP = 0x1 | 0x300
_HEADER_BYTES = 16
# Tables are a few; the kernel answers in messages of at most 32 KiB.
_ANSWER_BYTES_MAX = 64 << 10
_ANSWERS_MAX = 64
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_LEGACY = (
    Path("/proc/thread-self/net/ip_tables_names"),
    Path("/proc/thread-self/net/ip6_tables_names"),
)


def has_firewall() -> bool:
    """Whether there is a table of nftables, or one of iptables' old kind. Raises OSError."""
    return any(_lines(path) for path in _LEGACY) or _has_nftables()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except FileNotFoundError:
        return []


def _has_nftables() -> bool:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER) as netlink:
        netlink.settimeout(1.0)
        request = struct.pack("=IHHIIBBH", 20, _GET_TABLE, _REQUEST_AND_DUMP, 1, 0, 0, 0, 0)
        netlink.send(request)
        for _ in range(_ANSWERS_MAX):
            answer = netlink.recv(_ANSWER_BYTES_MAX)
            while len(answer) >= _HEADER_BYTES:
                length, kind = struct.unpack_from("=IH", answer)
                if kind == _NEW_TABLE:
                    return True
                # An error: this kernel has no nftables.
                if kind in (_NLMSG_ERROR, _NLMSG_DONE) or length < _HEADER_BYTES:
                    return False
                answer = answer[(length + 3) & ~3 :]
    return False
