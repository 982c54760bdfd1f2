"""What the machines' kernel can do; it may be an older one (CONTRIBUTING.md)."""

from __future__ import annotations

from bench.lab.lab import Lab

# Linux 6.7 has what the tracker needs.
WRITE_PROTECT_SINCE = (6, 7)
TRACKERS = ("write-protect", "soft-dirty", "predump")


def trackers(machines: Lab) -> tuple[str, ...]:
    """Those that work there, the best first."""
    major, minor, *_ = machines.host("A").run(["uname", "-r"]).stdout.split(".")
    return TRACKERS if (int(major), int(minor)) >= WRITE_PROTECT_SINCE else TRACKERS[1:]
