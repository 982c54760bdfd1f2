"""A port: the host's end of a container's veth pair, plugged into a bridge or not.

Unplugging and plugging are in the frozen path, so each is one message, built beforehand, on one
netlink socket that is open already: about 0.1 ms, from any thread. (pyroute2 is used everywhere
else; from 0.9 on it runs an event loop of its own inside each call, so it can't be called from a
thread that runs one, and opens a socket for every thread.)

    nlmsghdr  length u32 | type u16 | REQUEST|ACK u16 | sequence u32 | 0 u32
    ifinfomsg family u8 | 0 u8 | 0 u16 | index i32 | flags u32 | change u32
    plug      RTM_NEWLINK, flags and change IFF_UP, IFLA_MASTER u32 the bridge's index
    open      RTM_SETLINK, AF_BRIDGE, IFLA_PROTINFO { IFLA_BRPORT_STATE u8 forwarding }
    unplug    the same with the state "disabled"                             (rtnetlink(7))

A port is never taken down to unplug it: the container would lose its carrier, and if it listens for
such events (netlink, RTNLGRP_LINK), they wait in a socket of a frozen task, which CRIU refuses to
dump (`criu/sk-netlink.c: can_dump_netlink_sk`). Its bridge drops whatever goes through a disabled
port, both ways. The target's port waits up as well, in no bridge, so that it forwards as soon as it
is plugged: one that has to come up first drops packets for up to half a millisecond.
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
_RTM_SETLINK = 19
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4
_IFF_UP = 1
_IFLA_ADDRESS = 1
_IFLA_MASTER = 10
_IFLA_PROTINFO = 12
_IFLA_BRPORT_STATE = 1
_NLA_F_NESTED = 0x8000
_AF_BRIDGE = 7
# linux/if_bridge.h, BR_STATE_*
_DISABLED = 0
_FORWARDING = 3
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
        index, bridge_index = index_of(name), index_of(bridge)
        pin_bridge_mac(bridge)
        self._plug = plug_message(index, bridge_index)
        self._open = state_message(index, _FORWARDING)
        self._unplug = state_message(index, _DISABLED)
        self._netlink = _open()

    def plug(self) -> None:
        """Up, into the bridge, and forwarding; raises NetworkError."""
        failure = f"{self.name} can't be plugged into {self.bridge}"
        _exchange(self._netlink, self._plug, failure)
        # It forwards by itself unless `unplug` has disabled it. ENETDOWN: the container's end is
        # down, so there is nothing to forward.
        _exchange(self._netlink, self._open, failure, ignored=(errno.ENETDOWN,))

    def unplug(self) -> None:
        """Let nothing through any more. A port in no bridge is unplugged. Raises NetworkError."""
        _exchange_unplug(self._netlink, self._unplug, self.name)

    def is_plugged(self) -> bool:
        """Whether it forwards for its bridge (a few system calls; not for the frozen path)."""
        return bridge_of(self.name) == self.bridge and is_forwarding(self.name)

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
        _exchange_unplug(netlink, state_message(index, _DISABLED), name)


def plug_message(index: int, bridge: int) -> bytes:
    """The message that brings an interface up and makes it a port of a bridge, by their indices."""
    attribute = struct.pack("=HHI", 8, _IFLA_MASTER, bridge)
    return _message(_RTM_NEWLINK, socket.AF_UNSPEC, index, _IFF_UP, attribute)


def state_message(index: int, state: int) -> bytes:
    """The message that sets a bridge port's state (BR_STATE_*)."""
    inner = struct.pack("=HHB3x", 5, _IFLA_BRPORT_STATE, state)
    attribute = struct.pack("=HH", 4 + len(inner), _IFLA_PROTINFO | _NLA_F_NESTED) + inner
    return _message(_RTM_SETLINK, _AF_BRIDGE, index, 0, attribute)


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


def is_forwarding(name: str) -> bool:
    """Whether a bridge port lets packets through; what is no bridge port does not."""
    try:
        return int((_SYS_NET / name / "brport" / "state").read_text()) == _FORWARDING
    except (OSError, ValueError):
        return False


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
        request = _message(_RTM_NEWLINK, socket.AF_UNSPEC, index_of(bridge), 0, attribute)
        _exchange(netlink, request, f"the MAC of {bridge} can't be set")


def _message(kind: int, family: int, index: int, flags: int, attributes: bytes) -> bytes:
    # `change` says which of the flags are meant: those that are set.
    body = struct.pack("=BxHiII", family, 0, index, flags, flags) + attributes
    how = _NLM_F_REQUEST | _NLM_F_ACK
    return struct.pack("=IHHII", 16 + len(body), kind, how, 1, 0) + body


def _open() -> socket.socket:
    try:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        netlink.settimeout(ACK_DEADLINE_S)
    except OSError as error:
        raise NetworkError(f"no netlink socket can be opened: {error}") from error
    return netlink


def _exchange_unplug(netlink: socket.socket, message: bytes, name: str) -> None:
    # ENODEV: it is gone. EOPNOTSUPP, EINVAL: it is no bridge port (rtnl_bridge_setlink).
    ignored = (errno.ENODEV, errno.EOPNOTSUPP, errno.EINVAL)
    _exchange(netlink, message, f"{name} can't be unplugged", ignored=ignored)


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
