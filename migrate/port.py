"""A port: the host's end of a container's veth pair, plugged into a bridge or not.

Unplugging and plugging are in the frozen path, so each is one message, built beforehand, on one
netlink socket that is open already: about 0.1 ms, from any thread. (pyroute2 is used everywhere
else; from 0.9 on it runs an event loop of its own inside each call, so it can't be called from a
thread that runs one, and opens a socket for every thread.)

    nlmsghdr  length u32 | RTM_NEWLINK u16 | REQUEST|ACK u16 | sequence u32 | 0 u32
    ifinfomsg 0 u8 | 0 u8 | 0 u16 | index i32 | IFF_UP or 0 u32 | IFF_UP u32
    rtattr    8 u16 | IFLA_MASTER u16 | the bridge's index or 0 u32          (rtnetlink(7))

An unplugged port is *down* and in no bridge: up without a bridge it would be an interface of the
host, whose kernel answers and routes what the container sends.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from pathlib import Path

from migrate.network_identity import NetworkError, is_interface_name

_SYS_NET = Path("/sys/class/net")

_NLMSG_ERROR = 2
_RTM_NEWLINK = 16
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_IFF_UP = 1
_IFLA_ADDRESS = 1
_IFLA_MASTER = 10
# linux/netdevice.h: the MAC was set by somebody, so a bridge keeps it whatever its ports are.
_NET_ADDR_SET = 3

# The kernel answers a netlink request before send() returns; waiting is a formality.
ACK_DEADLINE_S = 5.0
# An error message repeats the request, which has 44 bytes.
_ANSWER_BYTES_MAX = 4096


class PortSwitch:
    """One port with its socket; idempotent, thread-safe only by being used from one at a time."""

    def __init__(self, name: str, bridge: str) -> None:
        """Raises NetworkError when either does not exist. The bridge's MAC is pinned."""
        self.name = name
        self.bridge = bridge
        self._index = index_of(name)
        bridge_index = index_of(bridge)
        pin_bridge_mac(bridge)
        self._plug = link_message(self._index, is_up=True, master=bridge_index)
        self._unplug = link_message(self._index, is_up=False, master=0)
        self._netlink = _open()

    def plug(self) -> None:
        """Up and into the bridge; raises NetworkError."""
        _exchange(self._netlink, self._plug, f"{self.name} can't be plugged into {self.bridge}")

    def unplug(self) -> None:
        """Down and out of the bridge. A port that is gone is unplugged. Raises NetworkError."""
        _unplug(self._netlink, self._unplug, self.name)

    def is_plugged(self) -> bool:
        """Whether it is in its bridge (a few system calls; not for the frozen path)."""
        return bridge_of(self.name) == self.bridge

    def close(self) -> None:
        """Close the socket; the port stays as it is. Idempotent."""
        self._netlink.close()


def plug(name: str, bridge: str) -> None:
    """Plug one port with a socket of its own: for whoever has none open. Raises NetworkError."""
    with contextlib.closing(PortSwitch(name, bridge)) as port:
        port.plug()


def unplug(name: str) -> None:
    """Unplug one port; one that is gone is unplugged. Raises NetworkError."""
    try:
        index = index_of(name)
    except NetworkError:
        return
    with _open() as netlink:
        _unplug(netlink, link_message(index, is_up=False, master=0), name)


def link_message(index: int, *, is_up: bool, master: int) -> bytes:
    """RTM_NEWLINK that sets an interface's state and its bridge (0: none) at once."""
    attribute = struct.pack("=HHI", 8, _IFLA_MASTER, master)
    return _message(index, _IFF_UP if is_up else 0, _IFF_UP, attribute)


def index_of(name: str) -> int:
    """The index of an interface of this host; raises NetworkError."""
    if not is_interface_name(name):
        raise NetworkError(f"{name[:40]!r} can't be an interface's name")
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise NetworkError(f"this host has no interface {name}") from error


def bridge_of(name: str) -> str | None:
    """The bridge that a port is in, None when it is in none or does not exist."""
    try:
        return (_SYS_NET / name / "master").readlink().name
    except OSError:
        return None


def pin_bridge_mac(bridge: str) -> None:
    """Give a bridge the MAC that it has, for good.

    Without that a bridge takes the lowest MAC of its ports (`net/bridge/br_stp_if.c:
    br_stp_recalculate_bridge_id`), so plugging or unplugging one can change the host's own MAC, and
    its connections, ours among them, stall until every peer's ARP entry has expired.
    """
    directory = _SYS_NET / bridge
    try:
        if int((directory / "addr_assign_type").read_text()) == _NET_ADDR_SET:
            return
        mac = bytes.fromhex((directory / "address").read_text().strip().replace(":", ""))
    except (OSError, ValueError) as error:
        raise NetworkError(f"the MAC of {bridge} can't be read: {error}") from error
    attribute = struct.pack("=HH6s2x", 10, _IFLA_ADDRESS, mac)
    with _open() as netlink:
        request = _message(index_of(bridge), 0, 0, attribute)
        _exchange(netlink, request, f"the MAC of {bridge} can't be set")


def _message(index: int, flags: int, change: int, attributes: bytes) -> bytes:
    body = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, index, flags, change) + attributes
    kind = _NLM_F_REQUEST | _NLM_F_ACK
    return struct.pack("=IHHII", 16 + len(body), _RTM_NEWLINK, kind, 1, 0) + body


def _open() -> socket.socket:
    try:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        netlink.settimeout(ACK_DEADLINE_S)
    except OSError as error:
        raise NetworkError(f"no netlink socket can be opened: {error}") from error
    return netlink


def _unplug(netlink: socket.socket, message: bytes, name: str) -> None:
    _exchange(netlink, message, f"{name} can't be unplugged", ignored=(errno.ENODEV,))


def _exchange(
    netlink: socket.socket, message: bytes, failure: str, *, ignored: tuple[int, ...] = ()
) -> None:
    try:
        netlink.send(message)
        answer = netlink.recv(_ANSWER_BYTES_MAX)
    except OSError as error:
        raise NetworkError(f"{failure}: {error}") from error
    if len(answer) < 20:
        raise NetworkError(f"{failure}: the kernel's answer has {len(answer)} bytes")
    kind, code = struct.unpack_from("=4xH10xi", answer)
    if kind != _NLMSG_ERROR:
        raise NetworkError(f"{failure}: the kernel's answer is of type {kind}")
    if code != 0 and -code not in ignored:
        raise NetworkError(f"{failure}: {os.strerror(-code)}")
