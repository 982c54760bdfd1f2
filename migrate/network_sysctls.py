"""The sysctls of a network namespace that its container may depend on. Called inside of it.

The kernel shows each thread the values of its own network namespace below /proc/sys/net.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from migrate.network_identity import NetworkError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

# What a container may have been given beyond the defaults, and its programs may depend on. Names of
# `linux.sysctl` in config.json come on top.
NAMESPACE_SYSCTLS = (
    "net/core/somaxconn",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_unprivileged_port_start",
    "net/ipv4/ping_group_range",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv6/conf/all/forwarding",
)
INTERFACE_SYSCTLS = (
    "net/ipv4/conf/{}/arp_announce",
    "net/ipv4/conf/{}/arp_ignore",
    "net/ipv4/conf/{}/forwarding",
    "net/ipv4/conf/{}/proxy_arp",
    "net/ipv4/conf/{}/rp_filter",
    "net/ipv6/conf/{}/disable_ipv6",
    "net/ipv6/conf/{}/forwarding",
    "net/ipv6/conf/{}/accept_ra",
    "net/ipv6/conf/{}/accept_dad",
    "net/ipv6/conf/{}/addr_gen_mode",
)

_PROC_SYS = Path("/proc/sys")


def read_sysctls(keys: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Path below /proc/sys to value: `keys`, and of each interface in `names` its own."""
    wanted = [*NAMESPACE_SYSCTLS, *keys]
    wanted += [key.format(name) for name in names if name != "lo" for key in INTERFACE_SYSCTLS]
    found: dict[str, str] = {}
    for key in wanted:
        try:
            found[key] = (_PROC_SYS / key).read_text().strip()
        except OSError:
            # A kernel without IPv6, or a sysctl that is not set for each namespace.
            continue
    return found


def write_sysctls(sysctls: Mapping[str, str]) -> None:
    """Set what differs. Raises NetworkError."""
    for key, value in sysctls.items():
        path = _PROC_SYS / key
        try:
            # Writing what is there already can have effects too (forwarding resets others).
            if path.read_text().split() != value.split():
                path.write_text(value)
        except FileNotFoundError as error:
            raise NetworkError(f"this kernel has no sysctl {key}") from error
        except OSError as error:
            raise NetworkError(f"the sysctl {key} can't be set to {value!r}: {error}") from error
